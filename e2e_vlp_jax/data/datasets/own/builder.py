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
import functools
import os

import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import values
from e2e_vlp_jax.data.datasets.own import coco_folder
from e2e_vlp_jax.data.datasets.own import coco_json
from e2e_vlp_jax.data.datasets.own import layout
from e2e_vlp_jax.data.datasets.own import yolo


class Builder(base.RecordBuilder):
  """Reads a `Layout`, splits it and checks every box and image."""
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
      'limit': (0, 'images to keep per split, the first; 0 keeps all')}

  def annotation_files(self):
    return self._layout.files

  def label_space(self):
    return label_space.LabelSpace(self._layout.classes, [], {})

  def sources(self):
    self._layout = self._found()
    self._hold_out()
    limit = self.options['limit']
    found = {}
    for name in layout.ORDER:
      if name in self._layout.splits:
        split = self._layout.splits[name]
        if not split.items:
          raise errors.UserError(f'{self.source}: split {name} has no images')
        most = min(limit or len(split.items), len(split.items))
        found[name] = most, functools.partial(self._records, name, split, most)
    return found

  # --- The folder -----------------------------------------------------------
  def _found(self):
    """The `Layout` of the source."""
    if not os.path.isdir(self.source):
      raise errors.UserError(f'--source: no folder {self.source!r}')
    if self.options['annotations']:
      return self._chosen()
    names = yolo.find(self.source)
    files, others = coco_folder.find(self.source)
    if files and names:
      raise errors.UserError(
          f'{self.source!r} has a COCO file, {self._relative(files[0].path)}, '
          f'and the names of a YOLO folder, {self._relative(names)}; choose '
          'with --annotations')
    if files:
      return coco_folder.read(self.source, files)
    if names:
      return yolo.read(self.source, names)
    raise errors.UserError(
        f'{self.source!r} has no annotations that can be read; looked for '
        f'{coco_folder.LOOKED_FOR} and for a YOLO folder\'s {yolo.NAMES}'
        + self._instead(others))

  def _chosen(self):
    paths = [os.path.join(self.source, p.strip())
             for p in self.options['annotations'].split(',') if p.strip()]
    for path in paths:
      if not os.path.isfile(path):
        raise errors.UserError(
            f'--annotations: no file {path!r}' + errors.nearest(
                os.path.basename(path), os.listdir(self.source)))
    jsons = [p for p in paths if p.endswith('.json')]
    if not jsons and len(paths) == 1:
      return yolo.read(self.source, paths[0])
    if len(jsons) < len(paths) or not paths:
      raise errors.UserError(
          f'--annotations {self.options["annotations"]!r}; expected COCO JSON '
          'files, or one file with the names of a YOLO folder')
    return coco_folder.read(self.source, [
        coco_json.parse(p, values.load_json(p)) for p in jsons])

  def _instead(self, others):
    """What was found in place of annotations, for the error."""
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
    total = len(train.items)
    if total < 2:
      train.changed.append('split with one image: none held out')
      return
    count = min(max(1, round(share * total)), total - 1)
    held = set(np.random.default_rng(self.options['seed']).permutation(
        total)[:count].tolist())
    splits['validation'] = layout.Split(
        [i for k, i in enumerate(train.items) if k in held], train.load)
    train.items = [i for k, i in enumerate(train.items) if k not in held]

  # --- Records --------------------------------------------------------------
  def _records(self, name, split, limit):
    for reason, what in split.skipped:
      self.skip(name, reason, what)
    for what in split.changed:
      self.note(name, what)
    written = 0
    loaded = split.load([i.name for i in split.items])
    for item, stored in zip(split.items, loaded):
      if isinstance(stored, errors.UserError):
        self.skip(name, f'image: {base.reason(stored, item.name)}', item.name)
        continue
      if stored.changed:
        self.note(name, f'image encoded again: {stored.changed}')
      texts = [base.clean(t) for t in item.texts]
      for _ in range(texts.count('')):
        self.skip(name, 'empty caption', item.name)
      yield base.record(
          image=stored.data, image_id=item.image_id, height=stored.height,
          width=stored.width, texts=[t for t in texts if t],
          objects=self._objects(name, item, stored))
      written += 1
      if written == limit:
        return

  def _objects(self, split, item, stored):
    """The valid objects of an image; counts the others."""
    size = item.size or (stored.height, stored.width)
    scale = stored.height * stored.width / (size[0] * size[1])
    objects = []
    for one in item.boxes:
      xywh = one.xywh
      if item.relative:
        xywh = [v * n for v, n in zip(xywh, (size[1], size[0]) * 2)]
      box = self.box(split, 'box', one.name, xywh, stored, *size)
      if box is None:
        continue
      w, h = map(float, xywh[2:])
      objects.append(dict(
          bbox=base.stored_box(box), label=one.label, attributes=[],
          is_crowd=one.crowd, area=(one.area or w * h) * scale, id=one.id))
    return objects
