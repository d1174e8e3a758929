"""Datasets in COCO's layout with many classes of their own.

A subclass, called Builder, says how its files and folders are called.
"""
import functools
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import coco_json
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values

_FOLDERS = ('', 'annotations')


class CocoClasses(coco_json.CocoRecords):
  """Finds the files of the splits and reads them.

  Attributes:
    FILES: {split: names of its file}; the first that is there counts.
    IMAGES: {split: folders of its images}.
    NUM_CLASSES: how many classes the files must have.
  """
  NEEDS_SOURCE = True
  FILES, IMAGES, NUM_CLASSES = {}, {}, 0
  OPTIONS = {'limit': (0, 'images to keep per split, the first by id; 0 keeps '
                       'all'),
             **base.UPRIGHT}

  def annotation_files(self):
    return [path for split in self.FILES if (path := self._find(split))]

  def label_space(self):
    return label_space.LabelSpace(self._classes, [], {})

  def sources(self):
    found, self._classes = {}, None
    for split in self.FILES:
      path = self._find(split)
      if path:
        found[split] = self._read(split, path)
    if not found:
      raise errors.UserError(
          f'no {" or ".join(n for names in self.FILES.values() for n in names)}'
          f' in {self.source!r} or its annotations/')
    return found

  def adapt(self, split, path, content):
    """Changes the content of a file before it is read."""

  def _find(self, split):
    """The path of a split's file, or None."""
    places = [os.path.join(self.source, f, n) for n in self.FILES[split]
              for f in _FOLDERS]
    return next(filter(os.path.isfile, places), None)

  def _read(self, split, path):
    content = values.load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get('images'),
                                                       list):
      raise errors.UserError(f"{path}: no list 'images'; is this an official "
                             f'file of {self.name}?')
    values.objects(content['images'], f'{path}: images')
    self.adapt(split, path, content)
    found = coco_json.CocoJson([path], functools.partial(self.skip, split),
                               functools.partial(self.note, split),
                               {path: content})
    classes = [name for _, name in sorted(found.labels.items())]
    if len(classes) != self.NUM_CLASSES:
      raise errors.UserError(f'{path} has {len(classes)} categories; expected '
                             f'the {self.NUM_CLASSES} of {self.name}')
    if self._classes not in (None, classes):
      raise errors.UserError(f'{path} has other categories than the file '
                             'before it')
    self._classes = classes
    files = image_files.ImageFiles(self.source, self.IMAGES[split])
    most = min(self.options['limit'] or len(found.images), len(found.images))
    return most, functools.partial(self.coco_records, split, found,
                                   found.images, files, most)
