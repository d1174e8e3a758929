"""`grounding`: captions whose phrases have boxes, from MDETR's JSON or ODVG.

  python -m e2e_vlp_jax.prepare grounding --name gqa --source DIR \
      --annotations final_mixed_train_no_coco.json --data_dir data

DIR holds the annotation files and the images, in any folders. The files are
`mdetr_json.py` (.json) and `odvg.py` (.jsonl); both may be mixed. The split is
the first word train, val or test in a file's name, and train without one.

A phrase that is not in its caption, characters outside the caption and boxes
without area are left out and counted. Look at the result: --show 12 prints
each caption with its phrases in the colours of their boxes.
"""
import collections
import functools
import os
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data.datasets import grounded
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import mdetr_json
from e2e_vlp_jax.data.datasets import odvg
from e2e_vlp_jax.data.datasets import values

_SPLITS = {'train': 'train', 'val': 'validation', 'valid': 'validation',
           'validation': 'validation', 'test': 'test'}
_FOLDERS = ('', 'annotations')


class Builder(grounded.GroundedRecords):
  """Finds the files and reads them."""
  name = 'grounding'
  NEEDS_SOURCE = True
  OPTIONS = {
      'name': ('grounding', 'name of the dataset, for data=NAME'),
      'annotations': ('', 'files under --source to read, joined by commas; '
                      'default: all .json and .jsonl files of --source and '
                      'its annotations/'),
      'images': ('', 'folders or zips of images under --source, joined by '
                 'commas; default: all of --source'),
      'label_map': ('', 'JSON file {label: name} for ODVG detection'),
      'limit': (0, 'images to keep per split, the first; 0 keeps all'),
      'upright': (False, 'boxes were drawn on upright pictures: turn none by '
                  'EXIF')}

  def annotation_files(self):
    return self._files()

  def label_space(self):
    return label_space.LabelSpace(self._classes, [], {}) if (
        self._classes) else None

  def sources(self):
    files = image_files.ImageFiles(self.source, self._image_folders())
    names = (odvg.label_map(os.path.join(self.source,
                                         self.options['label_map']))
             if self.options['label_map'] else None)
    found = collections.defaultdict(list)
    for path in self._files():
      found[_split(path)] += self._read(path, names)
    found = {split: grounded.joined(images)
             for split, images in found.items()}
    classes = {o['label']: None for images in found.values()
               for image in images for o in image.objects}
    self._classes = list(names.values()) if names else sorted(classes)
    limit = self.options['limit']
    known = [i.file_name for images in found.values() for i in images]
    for split, some in found.items():
      if not some:
        raise errors.UserError(f'{self.source}: split {split} has no images')
    return {split: (most := min(limit or len(some), len(some)),
                    functools.partial(self.grounded_records, split, some,
                                      files, most, known))
            for split, some in found.items()}

  def _image_folders(self):
    """Those named, or --source and the folders and zips two levels down."""
    if not os.path.isdir(self.source):
      raise errors.UserError(f'--source: no folder {self.source!r}')
    named = [f.strip() for f in self.options['images'].split(',') if f.strip()]
    if named:
      return named
    found = ['']
    for folder in ('', *_in(self.source, '')):  # Links are followed.
      if os.path.isdir(os.path.join(self.source, folder)):
        found += _in(self.source, folder)
    return list(dict.fromkeys(found))

  def _files(self):
    """Paths of the annotation files."""
    named = [n.strip() for n in self.options['annotations'].split(',')
             if n.strip()]
    if named:
      paths = [os.path.join(self.source, n) for n in named]
      for path in paths:
        if not os.path.isfile(path):
          raise errors.UserError(f'--annotations: no file {path}')
      return paths
    paths = [os.path.join(self.source, f, n) for f in _FOLDERS
             if os.path.isdir(os.path.join(self.source, f))
             for n in sorted(os.listdir(os.path.join(self.source, f)))
             if n.endswith(('.json', '.jsonl'))
             and n != os.path.basename(self.options['label_map'])]
    if not paths:
      raise errors.UserError(
          f'no .json or .jsonl file in {self.source!r} or its annotations/; '
          "expected MDETR's JSON or ODVG lines (--annotations FILE)")
    return paths

  def _read(self, path, names):
    if path.endswith('.jsonl'):
      return odvg.read(path, names)
    content = values.load_json(path)
    if not mdetr_json.is_mdetr(content):
      raise errors.UserError(
          f"{path} is not MDETR's JSON: it has no images with a caption; "
          'choose the files with --annotations (`prepare own` reads boxes of '
          'classes in COCO JSON)')
    return mdetr_json.read(path, content)


def _in(source, folder):
  """Folders and zip files, without .zip, in a folder of the source."""
  there = [os.path.join(folder, n)
           for n in sorted(os.listdir(os.path.join(source, folder)))]
  return ([n for n in there if os.path.isdir(os.path.join(source, n))]
          + [n[:-4] for n in there if n.endswith('.zip')])


def _split(path):
  """The split that a file's name says."""
  words = re.findall('[a-z]+', os.path.basename(path).lower())
  return next((_SPLITS[w] for w in words if w in _SPLITS), 'train')
