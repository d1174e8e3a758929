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
import functools
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import coco_json
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values
from e2e_vlp_jax.data.datasets.own import layout

_DEPTH = 3     # folders below the source in which files are looked for
_MANY = 20     # JSON files; more of them are hardly COCO's
LOOKED_FOR = ('a COCO JSON (*.json, annotations/*.json, '
              'SPLIT/_annotations.coco.json)')
# What a file of another format is, and what to do.
_OTHERS = (
    (lambda c: isinstance(c, dict) and 'shapes' in c and 'imagePath' in c,
     'a file of labelme for one image; convert the folder to COCO, for '
     'example with labelme2coco'),
    (lambda c: isinstance(c, list) and c and isinstance(c[0], dict)
     and 'annotations' in c[0] and 'data' in c[0],
     "Label Studio's own format; export as COCO or YOLO instead"),
    (lambda c: isinstance(c, dict) and '_via_img_metadata' in c,
     'a project of the VGG annotator; export as COCO instead'))


def load(path):
  """The content of a COCO JSON file.

  Raises:
    UserError: it is of another format.
  """
  content = values.load_json(path)
  if not _is_coco(content):
    raise errors.UserError(
        f'{path} is {_other_format(content)}' if _other_format(content) else
        f"{path} is no COCO file: no lists 'images' and 'annotations'")
  return content


def find(source):
  """The COCO JSON files of a folder, and why others are none.

  Returns:
    ({path: content}, [(path, what it is instead, or '')]).

  Raises:
    UserError: a file is damaged.
  """
  found, others = {}, []
  paths = _paths(source)
  for number, path in enumerate(paths):
    content = values.load_json(path)
    if _is_coco(content):
      found[path] = content
    else:
      others.append((path, _other_format(content)))
      if len(paths) > _MANY and number == _MANY and not found:
        break  # One file an image: the first say what they are.
  return found, others


def _paths(source):
  found = []
  for folder, folders, names in os.walk(source):
    depth = os.path.relpath(folder, source).count(os.sep) + (folder != source)
    folders[:] = sorted(f for f in folders if f[0] != '.' and depth < _DEPTH)
    found += [os.path.join(folder, n) for n in sorted(names)
              if n.endswith('.json') and n[0] != '.']
  return found


def _is_coco(content):
  return isinstance(content, dict) and all(
      isinstance(content.get(k), list) for k in ('images', 'annotations'))


def _other_format(content):
  """What the content is instead, and what to do; '' if it is unknown."""
  return next((what for test, what in _OTHERS if test(content)), '')


def read(source, contents, builder):
  """The `Layout` of a folder.

  Args:
    source: the folder.
    contents: {path: content} of its COCO JSON files.
    builder: a `coco_json.CocoRecords`, which counts what is left out.

  Raises:
    UserError: files that contradict themselves or each other.
  """
  by_split = {}
  for path in contents:
    by_split.setdefault(_split(source, path), []).append(path)
  if None in by_split and len(by_split) > 1:
    raise errors.UserError(
        f'{by_split[None][0]}: its name has no split, but that of '
        f'{next(f[0] for s, f in by_split.items() if s)} has; choose files '
        'with --annotations')
  splits, classes, files = {}, {}, []
  for split in (None, *layout.ORDER):
    if split in by_split:
      paths = _chosen(by_split[split], contents)
      files += paths
      splits[split or 'train'], names = _read_split(
          source, split or 'train', {p: contents[p] for p in paths}, builder)
      classes.update(dict.fromkeys(names))
  return layout.Layout(splits, list(classes), files)


def _split(source, path):
  folder, name = os.path.split(os.path.relpath(path, source))
  return layout.split_named(os.path.splitext(name)[0],
                            os.path.basename(folder))


def _chosen(paths, contents):
  """At most one file with boxes and one with captions, of one split."""
  has = lambda path, key: any(isinstance(a, dict) and key in a
                              for a in contents[path]['annotations'])
  boxes = [p for p in paths if has(p, 'bbox')]
  if len(boxes) > 1:               # CVAT writes person_keypoints_*.json too.
    named = [p for p in boxes if 'instances' in os.path.basename(p)]
    boxes = named if len(named) == 1 else boxes
  texts = [p for p in paths if has(p, 'caption') and p not in boxes]
  for kind, found in (('boxes', boxes), ('captions', texts)):
    if len(found) > 1:
      raise errors.UserError(f'{found[0]} and {found[1]} both have {kind} of '
                             'one split; choose files with --annotations')
  return boxes + texts or paths[:1]


def _read_split(source, name, contents, builder):
  """(`layout.Split`, names of the classes in their order)."""
  found = coco_json.CocoJson(
      list(contents), functools.partial(builder.skip, name),
      functools.partial(builder.note, name), contents)
  for path, content in contents.items():
    _check_names(path, content, found, functools.partial(builder.note, name))
  files = image_files.ImageFiles(source, _folders(source, next(iter(contents))))
  return layout.Split(
      found.images, lambda split, images, limit: builder.coco_records(
          split, found, images, files, limit)), found.labels.values()


def _check_names(path, content, found, note):
  """Each class has a name of its own; changes the `found.labels`.

  Roboflow's first category is the project, which has no boxes. Its name may be
  that of a class; then it is left out.
  """
  where = f'{path}: categories'
  by_name = {}
  for k, entry in enumerate(content.get('categories') or ()):
    i = values.identity(entry['id'], f'{where}[{k}].id')
    if i not in found.labels:
      continue
    name = ' '.join(found.labels[i].split())
    if not name:
      raise errors.UserError(f'{where}[{k}].name is empty')
    first = by_name.setdefault(name, (i, entry))
    if first[0] == i:
      continue
    if (first[1].get('supercategory') != 'none'
        or any(a.get('category_id') in (first[0], str(first[0]))
               for a in content['annotations'])):
      raise errors.UserError(
          f'{where}: two categories, with ids {first[0]} and {i}, have the '
          f'same name {name!r}; give one another name, or merge them')
    del found.labels[first[0]]
    by_name[name] = i, entry
    note(f'category {first[0]} left out: the project, with the name of class '
         f'{name!r}')


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
