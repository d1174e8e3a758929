"""`karpathy`: COCO's photographs and captions in Karpathy's splits.

  python -m e2e_vlp_jax.prepare karpathy --source DIR --data_dir data

For retrieval and captioning: published figures on COCO are those of these
splits. --source contains
  dataset_coco.json   of cs.stanford.edu/people/karpathy/deepimagesent/
                      caption_datasets.zip, here or in annotations/
and COCO's photographs,
  {train2014,val2014}/COCO_train2014_000000000009.jpg and so on, or
  {train2017,val2017}/000000000009.jpg, which have the same ids,
as folders or .zip, or the same under images/. Those of 2014 are used if they
exist.

Splits are train, restval, validation and test. All but train are photographs
of val2014: `coco` (train2017) holds nearly all of them. A model that will be
evaluated here must be pre-trained with data.exclude=('karpathy/test',).
"""
from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import karpathy_json
from e2e_vlp_jax.data.datasets import values


class Builder(karpathy_json.KarpathyRecords):
  """Finds COCO's photographs by name or by id."""
  name = 'karpathy'
  PHOTOS = COLLECTION = 'coco'
  PUBLISHED = {'train': (82_783, 414_113), 'restval': (30_504, 152_634),
               'validation': (5_000, 25_010), 'test': (5_000, 25_010)}

  def photographs(self):
    for self._year in (2014, 2017):
      try:
        return image_files.ImageFiles(self.source, [
            f'{top}{part}{self._year}' for part in ('train', 'val')
            for top in ('', 'images/')])
      except errors.UserError as e:
        error = e
    raise errors.UserError(f'no train2014/ or val2014/, and {error}')

  def place(self, entry, where):
    i = values.field(values.integer, entry, 'cocoid', where)
    name = values.field(values.text, entry, 'filename', where)
    return (name if self._year == 2014 else f'{i:012d}.jpg'), i
