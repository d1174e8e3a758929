"""Reads a YOLO folder: names of the classes, images, one text file an image.

Names of the classes are in data.yaml (`names`, a list or a dict), or in
obj.names (Darknet, CVAT), or in classes.txt (Label Studio, labelImg). Images
and label files are in one of these places:

  images/SPLIT/ and labels/SPLIT/        Ultralytics
  SPLIT/images/ and SPLIT/labels/        Roboflow
  images/ and labels/                    Label Studio, one split
  obj_SPLIT_data/ or SPLIT/, each text beside its image; Darknet, CVAT

where SPLIT is train, val or valid, test. If data.yaml names places of the
splits that exist, those are read. A row is `class cx cy w h`, or `class` and
the corners of a polygon, whose bounding box is taken; all are fractions of the
upright image. An image without a label file has no objects.
"""
import dataclasses
import glob
import os
import re

import yaml

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values
from e2e_vlp_jax.data.datasets.own import layout

_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff',
           '.mpo', '.heic', '.heif', '.avif', '.jp2')
_LISTS = ('obj.names', 'classes.txt', '*.names', 'data/*.names',
          'labels/classes.txt')
# Fractions beyond this are pixels, or of another image.
_FAR = 1.5
NAMES = 'data.yaml (with `names`), obj.names, classes.txt'
_NOT_LABELS = ('classes.txt', 'train.txt', 'valid.txt', 'val.txt', 'test.txt',
               'readme.txt', 'readme.roboflow.txt', 'readme.dataset.txt')


def find(source):
  """Path of the file that names the classes, or None."""
  for path in _glob(source, '*.yaml', '*.yml'):
    if isinstance(_yaml(path), dict) and 'names' in _yaml(path):
      return path
  return next(iter(_glob(source, *_LISTS)), None)


def read(source, path, builder):
  """The `Layout` of a folder.

  Args:
    source: the folder.
    path: from `find`, or the user's choice.
    builder: a `RecordBuilder`, which counts what is left out.

  Raises:
    UserError: no names or no images, or a row of a class that has no name.
  """
  about = _yaml(path) if path.endswith(('.yaml', '.yml')) else None
  classes = _names(path, about)
  places = {s: i for s, i in _places(source, path, about or {}).items() if i}
  if not places:
    raise errors.UserError(
        f'{source!r}: no images beside {os.path.basename(path)}; looked in '
        'images/SPLIT, SPLIT/images, images, SPLIT and obj_SPLIT_data, SPLIT '
        'being train, val or valid, test')
  splits = {}
  for split, images in places.items():
    split = split or 'train'
    reader = _Reader(source, classes, _keypoints(about), builder, split)
    splits[split] = layout.Split(reader.images(images), reader.records)
  used = {os.path.realpath(i) for images in places.values() for i in images}
  for image in _images(source):
    if os.path.realpath(image) not in used:
      builder.skip(next(iter(splits)), "image: not in a folder of a split's "
                   'name', os.path.relpath(image, source), 'images')
  return layout.Layout(splits, classes, [path])


def _glob(source, *patterns):
  return [p for pattern in patterns for p in sorted(glob.glob(
      os.path.join(glob.escape(source), pattern)))]


# --- Names of the classes ---------------------------------------------------
def _yaml(path):
  try:
    with open(path, encoding='utf-8') as f:
      return yaml.safe_load(f)
  except (OSError, ValueError, yaml.YAMLError) as e:
    raise errors.UserError(
        f'{path} is not readable YAML: {" ".join(str(e).split())}') from e


def _names(path, about):
  """The names of the classes; the position is the id."""
  if about is None:
    try:
      with open(path, encoding='utf-8-sig') as f:
        found = [line.strip() for line in f]
    except (OSError, ValueError) as e:
      raise errors.UserError(f'{path} is not readable: {e}') from e
    while found and not found[-1]:
      found.pop()
  else:
    found = about.get('names') if isinstance(about, dict) else None
    if isinstance(found, dict):
      found = _in_order(path, found)
  if not isinstance(found, list) or not found:
    raise errors.UserError(f'{path}: names is {found!r:.60}; expected a list '
                           'of the classes, or a dict {0: name, ...}')
  for k, name in enumerate(found):
    # YAML reads yes, no, on and off as truth values.
    if isinstance(name, bool) or not isinstance(name, (str, int, float)):
      raise errors.UserError(f'{path}: names[{k}] is {name!r}, not a text; '
                             'put the name in quotes')
    if not str(name).strip():
      raise errors.UserError(f'{path}: names[{k}] is empty')
  found = [values.text(' '.join(str(name).split()), f'{path}: names[{k}]')
           for k, name in enumerate(found)]
  repeated = next((n for n in found if found.count(n) > 1), None)
  if repeated is not None:
    ids = [k for k, n in enumerate(found) if n == repeated]
    raise errors.UserError(f'{path}: two classes, {ids[0]} and {ids[1]}, have '
                           f'the same name {repeated!r}')
  return found


def _in_order(path, names):
  """{0: 'a', 1: 'b'} -> ['a', 'b']; ids may be texts."""
  try:
    names = {int(k): v for k, v in names.items()}
  except (TypeError, ValueError) as e:
    raise errors.UserError(f'{path}: names has a key that is not the number '
                           f'of a class: {e}') from e
  if sorted(names) != list(range(len(names))):
    missing = min(set(range(len(names))) - names.keys())
    raise errors.UserError(
        f'{path}: names has {len(names)} classes, but none with id {missing}; '
        'expected the ids 0, 1, 2, ...')
  return [names[k] for k in range(len(names))]


def _keypoints(about):
  """Whether rows have keypoints behind their box."""
  return isinstance(about, dict) and bool(about.get('kpt_shape'))


# --- Places of the images ---------------------------------------------------
def _places(source, path, about):
  """{split or None: paths of its images, sorted}."""
  found = {}
  for key in ('train', 'val', 'valid', 'validation', 'test'):
    images = [i for value in _as_list(about.get(key))
              for i in _listed(source, path, about, value)]
    if images:
      found.setdefault(layout.split_named(key), []).extend(images)
  if 'train' not in found or len(found) < 2:
    for split, images in _by_folder(source).items():
      found.setdefault(split, images)
    if len(found) > 1:
      found.pop(None, None)
  return {split: sorted(dict.fromkeys(images))
          for split, images in found.items()}


def _as_list(value):
  value = value if isinstance(value, list) else [value]
  return [v for v in value if isinstance(v, str) and v.strip()]


def _listed(source, path, about, value):
  """Images of a place that data.yaml names: a folder or a list of files.

  Written on another machine, its paths are often wrong: Roboflow's start with
  a `../` too many, others are absolute.
  """
  root = about.get('path') if isinstance(about.get('path'), str) else ''
  value = value.replace('\\', '/')
  plain = re.sub(r'^(\.\.?/)+', '', value)
  here = os.path.dirname(path)
  for place in (os.path.join(here, root, value), os.path.join(here, value),
                os.path.join(here, plain), os.path.join(source, plain)):
    if os.path.isdir(place):
      return _images(place)
    if os.path.isfile(place) and place.endswith('.txt'):
      with open(place, encoding='utf-8') as f:
        names = [line.strip().replace('\\', '/') for line in f]
      return [i for n in names if n for i in _suffix(
          (os.path.dirname(place), source), n)]
  return []


def _suffix(folders, name):
  """The file of the longest end of a path that exists: [path] or []."""
  parts = [p for p in name.split('/') if p not in ('', '.', '..')]
  for k in range(len(parts)):
    for folder in folders:
      path = os.path.join(folder, *parts[k:])
      if os.path.isfile(path):
        return [path]
  return []


def _by_folder(source):
  """{split or None: images} by the names of the folders."""
  found, rest = {}, []
  for place in (source, os.path.join(source, 'images')):
    if not os.path.isdir(place):
      continue
    for name in sorted(os.listdir(place)):
      folder = os.path.join(place, name)
      split = layout.split_named(name)
      if split and os.path.isdir(folder) and name not in ('images', 'labels'):
        inner = os.path.join(folder, 'images')
        images = _images(inner if os.path.isdir(inner) else folder)
        found.setdefault(split, []).extend(images)
  found = {split: images for split, images in found.items() if images}
  if not found:
    place = os.path.join(source, 'images')
    rest = _images(place if os.path.isdir(place) else source)
  return {None: rest} if rest else found


def _images(folder):
  """Paths of the images under a folder, at any depth."""
  return sorted(os.path.join(where, name)
                for where, _, names in os.walk(folder) for name in names
                if name.lower().endswith(_IMAGES) and name[0] != '.')


# --- Labels -----------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Image:
  """An image and its boxes: [(where, label, x, y, w, h)], fractions of it."""
  name: str
  boxes: list


class _Reader:
  """Reads the label files of one split."""

  def __init__(self, source, classes, keypoints, builder, split):
    self._source, self._classes = source, classes
    self._keypoints = keypoints
    self._builder, self._split = builder, split

  def images(self, paths):
    """The `_Image`s of these files; counts what is left out."""
    found, used, folders = [], set(), set()
    for path in paths:
      labels = _labels_of(path)
      folders.add(os.path.dirname(labels))
      used.add(labels)
      found.append(_Image(os.path.relpath(path, self._source),
                          self._boxes(labels)))
    for folder in sorted(folders):
      for path in _glob(folder, '*.txt'):
        if path not in used and os.path.basename(path).lower() not in (
            _NOT_LABELS):
          self._skip('label file without an image',
                     os.path.relpath(path, self._source), None)
    return found

  def records(self, split, images, limit):
    """Yields at most `limit` records of images."""
    builder, written = self._builder, 0
    loaded = image_files.load_all([i.name for i in images], self._load)
    for image, stored in zip(images, loaded):
      if isinstance(stored, errors.UserError):
        builder.skip_image(split, stored, image.name)
        continue
      builder.note_image(split, stored)
      size, objects = (stored.height, stored.width), []
      for where, label, *fractions in image.boxes:
        xywh = [f * n for f, n in zip(fractions, (size[1], size[0]) * 2)]
        box = builder.box(split, 'box', where, xywh, stored, *size)
        if box is not None:
          objects.append(dict(
              bbox=base.stored_box(box), label=label, attributes=[],
              is_crowd=False, id=-1,
              area=builder.area(split, None, xywh, box, stored, *size)))
      yield base.record(
          # A name on the disk need not be UTF-8.
          image=stored.data, image_id=os.path.splitext(image.name)[0].encode(
              'utf-8', 'backslashreplace').decode(),
          height=stored.height, width=stored.width, objects=objects)
      written += 1
      if written == limit:
        return

  def _load(self, name):
    """(the bytes of an image, False: under its own name)."""
    try:
      with open(os.path.join(self._source, name), 'rb') as f:
        return f.read(), False
    except OSError as e:
      raise errors.UserError(f'{name} cannot be read: {e}') from e

  def _boxes(self, path):
    """The boxes of a label file; counts the rows that cannot be read."""
    if not os.path.isfile(path):
      self._builder.note(self._split,
                         'image without a label file: no objects')
      return []
    relative, boxes = os.path.relpath(path, self._source), []
    try:
      with open(path, encoding='utf-8-sig') as f:
        rows = f.read().splitlines()
    except (OSError, ValueError):
      self._skip('label file cannot be read', relative)
      return []
    for number, row in enumerate(rows, 1):
      if row.strip():
        box = self._box(f'{relative}:{number}', row.split())
        if box:
          boxes.append(box)
    return boxes

  def _box(self, where, words):
    """(where, label, x, y, w, h) of a row, or None."""
    try:
      number, *fractions = [values.number(w, where) for w in words]
    except values.Wrong:
      return self._skip('label row: not numbers', where)
    if number != int(number) or not 0 <= number < len(self._classes):
      raise errors.UserError(
          f'{os.path.join(self._source, where)}: class {words[0]}; expected '
          f'one of the {len(self._classes)} classes, 0 to '
          f'{len(self._classes) - 1}')
    if (self._keypoints and len(fractions) > 4
        or len(fractions) == 5):    # Some tools append a score.
      fractions = fractions[:4]
    if len(fractions) >= 6 and len(fractions) % 2 == 0:
      self._builder.note(self._split, 'polygon: its bounding box taken')
      xs, ys = fractions[::2], fractions[1::2]
      xywh = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    elif len(fractions) == 4:
      cx, cy, w, h = fractions
      xywh = [cx - w / 2, cy - h / 2, w, h]
    else:
      return self._skip(
          'label row: not `class cx cy w h` or a polygon', where)
    if max(map(abs, fractions)) > _FAR:
      return self._skip('label row: not fractions of the image', where)
    return where, self._classes[int(number)], *xywh

  def _skip(self, reason, where, lost='boxes'):
    self._builder.skip(self._split, reason, where, lost)


def _labels_of(image):
  """Path of an image's label file: .../labels/... for .../images/...."""
  stem = os.path.splitext(image)[0]
  front, middle, last = stem.rpartition(f'{os.sep}images{os.sep}')
  if middle:
    path = f'{front}{os.sep}labels{os.sep}{last}.txt'
    if os.path.isfile(path) or not os.path.isfile(f'{stem}.txt'):
      return path
  return f'{stem}.txt'
