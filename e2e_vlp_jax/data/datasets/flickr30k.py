"""`flickr30k`: photographs of Flickr with five captions, in Karpathy's splits.

  python -m e2e_vlp_jax.prepare flickr30k --source DIR --data_dir data

Flickr30k (Young et al., TACL 2014); its photographs are given on request at
shannon.cs.illinois.edu/DenotationGraph. --source contains
  dataset_flickr30k.json   of cs.stanford.edu/people/karpathy/deepimagesent/
                           caption_datasets.zip, here or in annotations/
  flickr30k-images/        or flickr30k_images/ or images/, folders or .zip
Splits are train, validation and test.
"""
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import karpathy_json
from e2e_vlp_jax.data.datasets import values


class Builder(karpathy_json.KarpathyRecords):
  """The names of the files are the photographs' ids at Flickr."""
  name = COLLECTION = 'flickr30k'
  PHOTOS = 'flickr'
  PUBLISHED = {'train': (29_000, 145_000), 'validation': (1_014, 5_070),
               'test': (1_000, 5_000)}

  def photographs(self):
    return image_files.ImageFiles(self.source, [
        'flickr30k-images', 'flickr30k_images', 'images'])

  def place(self, entry, where):
    name = values.field(values.text, entry, 'filename', where)
    return name, name.rpartition('.')[0] or name
