"""`own`: your own photographs, labelled with any tool.

  python -m e2e_vlp_jax.prepare own --name mine --source DIR --data_dir data

writes data/mine, which configs refer to as `data=mine`. DIR is an export of a
labelling tool (Roboflow, CVAT, Label Studio, labelImg, labelme2coco, ...):

- a COCO JSON file, or one for each split, with boxes, captions or both; the
  images beside it, above it or in a folder images/ (`coco_folder.py`).
- a YOLO folder: data.yaml (or obj.names, classes.txt), images and label files
  (`yolo.py`).

The classes are those of the files, in their order, and are stored with the
dataset (labels.json); `data.labels='prepared'` reads them. Splits are those of
the folder. If it has none for validation, a share of the training images is
drawn for it by --validation_share and --seed.

What cannot be used is left out, counted and named in the report, and what
contradicts itself ends with an error. Look at the result: --show 12.
"""
import collections
import functools
import os

import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import coco_json
from e2e_vlp_jax.data.datasets.own import coco_folder
from e2e_vlp_jax.data.datasets.own import layout
from e2e_vlp_jax.data.datasets.own import yolo


class Builder(coco_json.CocoRecords):
  """Finds out what a folder is, and holds out images for validation."""
  name = 'own'
  NEEDS_SOURCE = True
  OPTIONS = {
      'name': ('own', 'name of the dataset, for data=NAME'),
      'annotations': ('', 'files under --source to read, joined by commas: '
                      'COCO JSON files, or the file with the names of a YOLO '
                      'folder; default: those found'),
      'validation_share': (.1, 'share of the training images to hold out as '
                           'split validation if the folder has no such split; '
                           '0 = none'),
      'seed': (0, 'seed of the images held out'),
      'shots': (0, 'keep so few training images that, in their order, each '
                'has a class of which fewer than this were kept before; 0 '
                'keeps all'),
      'limit': (0, 'images to keep per split, the first; 0 keeps all'),
      'captioned_only': (False, 'keep only images that have boxes and '
                         'captions; of COCO files'),
      **base.UPRIGHT}

  def annotation_files(self):
    return self._layout.files

  def label_space(self):
    return label_space.LabelSpace(self._layout.classes, [], {})

  def sources(self):
    if not os.path.isdir(self.source):
      raise errors.UserError(f'--source: no folder {self.source!r}')
    self._layout = self._chosen() or self._found()
    self._hold_out()
    if 'train' not in self._layout.splits:
      split = next(iter(self._layout.splits))
      self.reports[split]['warnings'].append(
          'the folder has no split for training')
    found, limit = {}, self.options['limit']
    for name in layout.ORDER:
      if name in self._layout.splits:
        split = self._layout.splits[name]
        if not split.images:
          raise errors.UserError(f'{self.source}: split {name} has no images')
        most = min(limit or len(split.images), len(split.images))
        shots = self.options['shots'] if name == 'train' else 0
        found[name] = most, functools.partial(
            _few, shots, functools.partial(split.records, name, split.images,
                                           most))
    return found

  def _chosen(self):
    """The `Layout` of the files that --annotations names, None without."""
    paths = [os.path.join(self.source, p.strip())
             for p in self.options['annotations'].split(',') if p.strip()]
    for path in paths:
      if not os.path.isfile(path):
        raise errors.UserError(
            f'--annotations: no file {path!r}' + errors.nearest(
                os.path.basename(path), os.listdir(self.source)))
    jsons = [p for p in paths if p.endswith('.json')]
    if not paths:
      return None
    if not jsons and len(paths) == 1:
      return self._yolo(paths[0])
    if len(jsons) < len(paths):
      raise errors.UserError(
          f'--annotations {self.options["annotations"]!r}; expected COCO JSON '
          'files, or one file with the names of a YOLO folder')
    return coco_folder.read(
        self.source, {p: coco_folder.load(p) for p in jsons}, self)

  def _found(self):
    """The `Layout` of the source."""
    names = yolo.find(self.source)
    contents, others = coco_folder.find(self.source)
    if contents and names:
      raise errors.UserError(
          f'{self.source!r} has a COCO file, '
          f'{self._relative(next(iter(contents)))}, and the names of a YOLO '
          f'folder, {self._relative(names)}; choose with --annotations')
    if contents:
      return coco_folder.read(self.source, contents, self)
    if names:
      return self._yolo(names)
    raise errors.UserError(
        f'{self.source!r} has no annotations that can be read; looked for '
        f'{coco_folder.LOOKED_FOR} and for a YOLO folder\'s {yolo.NAMES}'
        + self._instead(others))

  def _yolo(self, path):
    self.options['upright'] = True  # As those tools show it.
    return yolo.read(self.source, path, self)

  def _instead(self, others):
    """What was found in place of annotations, for the error."""
    for name in sorted(os.listdir(self.source)):
      if name.endswith(('.yaml', '.yml')):
        return f'; {name} has no `names`'
    for path, what in others:
      if what:
        return f'; {self._relative(path)} is {what}'
    for folder, _, names in os.walk(self.source):
      for name in sorted(names):
        if name.endswith('.xml'):
          path = self._relative(os.path.join(folder, name))
          return (f'; {path} seems to be Pascal VOC: export as COCO or YOLO '
                  'instead')
    if others:
      return f'; {self._relative(others[0][0])} is another kind of JSON'
    return ''

  def _relative(self, path):
    return os.path.relpath(path, self.source)

  def _hold_out(self):
    """Draws the split validation if there is none."""
    splits, share = self._layout.splits, self.options['validation_share']
    if not 0 <= share < 1:
      raise errors.UserError(f'--validation_share: {share}; expected a share '
                             'of the training images, 0 or more, below 1')
    if 'validation' in splits or 'train' not in splits or not share:
      return
    train = splits['train']
    total = len(train.images)
    if total < 2:
      self.note('train', 'split with one image: none held out')
      return
    count = min(max(1, round(share * total)), total - 1)
    held = set(np.random.default_rng(self.options['seed']).permutation(
        total)[:count].tolist())
    splits['validation'] = layout.Split(
        [i for k, i in enumerate(train.images) if k in held], train.records)
    train.images = [i for k, i in enumerate(train.images) if k not in held]


def _few(shots, records):
  """The records of a few-shot training set, as GLIP samples them for ODinW.

  Args:
    shots: images of each class; 0 = all.
    records: function that yields the records.
  """
  kept = collections.Counter()
  for record in records():
    classes = {o['label'] for o in record['objects']}
    if not shots or any(kept[c] < shots for c in classes):
      kept.update(classes)
      yield record
