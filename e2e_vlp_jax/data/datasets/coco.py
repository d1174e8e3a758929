"""`coco`: COCO 2017 photographs with boxes and captions.

Official layout under --source:
  annotations/{instances,captions}_{train2017,val2017}.json
  {train2017,val2017}/ or .zip, or the same under images/
The splits are train (train2017) and validation (val2017); one of them may be
absent, and so may the captions or the instances of a split. Images are sorted
by id. COCO has no attributes.

Boxes are clipped to the image. Boxes without area and missing or broken images
are left out; the report counts and names them. `Stored.frame` turns boxes along
with images that have an EXIF orientation, unless --upright.
"""
import functools
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import coco_json
from e2e_vlp_jax.data.datasets import image_files

_FOLDERS = {'train': 'train2017', 'validation': 'val2017'}


class Builder(coco_json.CocoRecords):
  """Finds the files of the official layout."""
  name = 'coco'
  LABELS = 'coco'
  PHOTOS = 'coco'
  NEEDS_SOURCE = True
  OPTIONS = {
      'limit': (0, 'images to keep per split, the first by id; 0 keeps all'),
      'captioned_only': (
          False, 'keep only images that have boxes and captions'),
      **base.UPRIGHT}

  def annotation_files(self):
    return [p for f in _FOLDERS.values() for p in self._files(f)
            if os.path.exists(p)]

  def sources(self):
    found = {split: self._read(split, folder)
             for split, folder in _FOLDERS.items()
             if any(map(os.path.exists, self._files(folder)))}
    if not found:
      raise errors.UserError(
          f'neither {self._files("train2017")[0]} nor '
          f'{self._files("val2017")[0]} exists; --source should be the folder '
          'that contains annotations/ (`prepare own` reads files of other '
          'names)')
    return found

  def _files(self, folder):
    return [os.path.join(self.source, 'annotations', f'{kind}_{folder}.json')
            for kind in ('instances', 'captions')]

  def _read(self, split, folder):
    """(upper bound of the records, function that yields them) of a split."""
    paths = [p for p in self._files(folder) if os.path.exists(p)]
    for path in self._files(folder):
      if path not in paths:
        if self.options['captioned_only']:
          raise errors.UserError(f'captioned_only: no annotation file {path}')
        self.skip(split, 'annotations: no such file', os.path.basename(path))
    files = image_files.ImageFiles(self.source, [folder, f'images/{folder}'])
    found = coco_json.CocoJson(paths, functools.partial(self.skip, split),
                               functools.partial(self.note, split))
    images = found.images
    if self.options['captioned_only']:
      images = [i for i in images if found.objects.get(i['id'])
                and found.captions.get(i['id'])]
    limit = self.options['limit'] or len(images)
    if not images:
      raise errors.UserError(
          f'{paths[0]}: no image to keep'
          + (' with boxes and captions (captioned_only)'
             if self.options['captioned_only'] else ''))
    return min(limit, len(images)), functools.partial(
        self.coco_records, split, found, images, files, limit)
