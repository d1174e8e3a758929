"""Finds the COCO JSON files of a folder, and the split and images of each.

Layouts:

  SPLIT/_annotations.coco.json beside the images              Roboflow
  annotations/instances_default.json, images/                 CVAT
  annotations/{instances,captions}_SPLIT.json, SPLIT/         COCO
  result.json, images/                                        Label Studio
  any.json, images beside it or in a folder of its `file_name`

The split is the first word train, val, valid or test in the file's name or in
that of its folder.
"""
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values
from e2e_vlp_jax.data.datasets.own import coco_json
from e2e_vlp_jax.data.datasets.own import layout

_DEPTH = 3     # folders below the source in which files are looked for
_MANY = 20     # JSON files; more of them are hardly COCO's
LOOKED_FOR = ('a COCO JSON (*.json, annotations/*.json, '
              'SPLIT/_annotations.coco.json)')


def find(source):
  """The `coco_json.File`s of a folder, and why others are none.

  Returns:
    ([File], [(path, what it is instead)]).

  Raises:
    UserError: a file is damaged.
  """
  files, others = [], []
  paths = _paths(source)
  for number, path in enumerate(paths):
    content = values.load_json(path)
    if coco_json.is_coco(content):
      files.append(coco_json.parse(path, content))
    else:
      others.append((path, coco_json.other_format(content)))
      if len(paths) > _MANY and number < _MANY and not files:
        break  # One file an image: the first says what they are.
  return files, others


def _paths(source):
  found = []
  for folder, folders, names in os.walk(source):
    depth = os.path.relpath(folder, source).count(os.sep) + (folder != source)
    folders[:] = sorted(f for f in folders if f[0] != '.' and depth < _DEPTH)
    found += [os.path.join(folder, n) for n in sorted(names)
              if n.endswith('.json') and n[0] != '.']
  return found


def read(source, files):
  """The `Layout` of a folder.

  Args:
    source: the folder.
    files: its `coco_json.File`s.

  Raises:
    UserError: files that contradict each other.
  """
  by_split = {}
  for file in files:
    by_split.setdefault(_split(file.path), []).append(file)
  named = None not in by_split
  if not named and len(by_split) > 1:
    raise errors.UserError(
        f'{by_split[None][0].path}: its name has no split, but that of '
        f'{next(f[0].path for s, f in by_split.items() if s)} has; choose '
        'files with --annotations')
  order = [s for s in (None, *layout.ORDER) if s in by_split]
  by_split = {s: _chosen(by_split[s]) for s in order}
  classes = list(dict.fromkeys(
      name for s in order for f in by_split[s] for name in f.classes.values()))
  return layout.Layout(
      {s or 'train': _read_split(source, by_split[s]) for s in order},
      named, classes, [f.path for s in order for f in by_split[s]])


def _split(path):
  name = os.path.basename(path)
  return layout.split_named(os.path.splitext(name)[0],
                            os.path.basename(os.path.dirname(path)))


def _chosen(files):
  """At most one file with boxes and one with captions, of one split."""
  boxes = [f for f in files if f.has_boxes]
  if len(boxes) > 1:               # CVAT writes person_keypoints_*.json too.
    named = [f for f in boxes if 'instances' in os.path.basename(f.path)]
    boxes = named if len(named) == 1 else boxes
  texts = [f for f in files if f.has_texts and f not in boxes]
  for kind, found in (('boxes', boxes), ('captions', texts)):
    if len(found) > 1:
      raise errors.UserError(
          f'{found[0].path} and {found[1].path} both have {kind} of one split; '
          'choose files with --annotations')
  return boxes + texts or files[:1]


def _read_split(source, files):
  """The `Split` of one or two files."""
  split = layout.Split([], None)
  skip = lambda reason, name: split.skipped.append((reason, name))
  images, boxes, texts = {}, {}, {}
  for file in files:
    split.changed += file.changed
    for i, image in file.images.items():
      if images.setdefault(i, image)[0] != image[0]:
        raise errors.UserError(
            f'image {i!r} is {images[i][0]!r} in {files[0].path}, but '
            f'{image[0]!r} in {file.path}; expected the same images')
    for total, found in zip((boxes, texts), coco_json.boxes_and_texts(
        file, skip, split.changed.append)):
      for i, items in found.items():
        total.setdefault(i, []).extend(items)
  ids = sorted(images, key=lambda i: (isinstance(i, str), i))
  split.items = [layout.Item(images[i][0], str(i), images[i][1],
                             boxes[i], texts[i]) for i in ids]
  split.load = image_files.ImageFiles(
      source, _folders(source, files[0].path)).load_all
  return split


def _folders(source, path):
  """Where the images of a file may be, the likeliest first."""
  here = os.path.dirname(os.path.relpath(path, source))
  stem = os.path.splitext(os.path.basename(path))[0]
  # 'train2017' of 'instances_train2017', and 'default' of CVAT's.
  words = [stem.rpartition('_')[2], os.path.basename(here)]
  bases = [here] + ([os.path.dirname(here)] if here else [])
  found = [os.path.join(b, f, w) for w in words if w for b in bases
           for f in ('images', '')]
  found += [os.path.join(b, 'images') for b in bases] + bases
  return list(dict.fromkeys(os.path.normpath(f) for f in found))
