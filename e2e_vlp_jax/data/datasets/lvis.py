"""`lvis`: COCO's photographs with boxes of 1203 classes.

  python -m e2e_vlp_jax.prepare lvis --source DIR --data_dir data

LVIS v1 (Gupta et al., CVPR 2019), https://www.lvisdataset.org. DIR holds
  lvis_v1_{train,val}.json, lvis_v1_minival*.json
(or in annotations/) and COCO's train2017 and val2017, folders or .zip. minival
are the images of val that are not in COCO's train2017 (MDETR's file
lvis_v1_minival_inserted_image_name.json); split `minival`.

LVIS is federated: an image is labelled for some classes only. Which ones its
labels deny (neg_category_ids) or do not list completely (not_exhaustive_
category_ids), and how frequent a class is, stands in federated.json beside the
records; the evaluator `lvis` reads it.
"""
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data.datasets import coco_classes
from e2e_vlp_jax.data.datasets import values

_CLASSES = 1203


class Builder(coco_classes.CocoClasses):
  """COCO's layout, and what is known of the other classes of an image."""
  name = 'lvis'
  FILES = {'train': ('lvis_v1_train.json',),
           'validation': ('lvis_v1_val.json',),
           'minival': ('lvis_v1_minival.json',
                       'lvis_v1_minival_inserted_image_name.json')}
  IMAGES = dict.fromkeys(FILES, ('train2017', 'val2017', 'images/train2017',
                                 'images/val2017', 'images', ''))
  NUM_CLASSES = _CLASSES

  def adapt(self, split, path, content):
    """Names the images' files, and collects what is federated."""
    names = {}
    for k, c in enumerate(content.get('categories', ())):
      where = f'{path}: categories[{k}]'
      names[values.field(values.integer, c, 'id', where)] = values.field(
          values.text, c, 'name', where)
      self._frequency[c['name']] = c.get('frequency', '')
    for k, image in enumerate(content['images']):
      if 'file_name' not in image and isinstance(image.get('coco_url'), str):
        image['file_name'] = '/'.join(image['coco_url'].split('/')[-2:])
      where = f'{path}: images[{k}]'
      some = lambda key, i=image, w=where: [
          self._name(names, n, f'{w}.{key}') for n in i.get(key, ())]
      self._images[str(image.get('id'))] = {
          'absent': some('neg_category_ids'),
          'incomplete': some('not_exhaustive_category_ids')}

  def __init__(self, **options):
    super().__init__(**options)
    self._images, self._frequency = {}, {}

  def _name(self, names, number, where):
    if number not in names:
      raise values.Wrong(number, where, "an id of the file's categories")
    return names[number]

  def side_files(self):
    return {records.FEDERATED: {'frequency': self._frequency,
                                'images': self._images}}
