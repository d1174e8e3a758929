"""Reads a JSON file of COCO's format, from any tool that writes it."""
import dataclasses

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import values
from e2e_vlp_jax.data.datasets.own import layout

# What a file of another format is, and what to do.
_OTHERS = (
    (lambda c: isinstance(c, dict) and 'shapes' in c and 'imagePath' in c,
     'a file of labelme for one image; convert the folder to COCO, for '
     'example with labelme2coco'),
    (lambda c: isinstance(c, list) and c and isinstance(c[0], dict)
     and 'annotations' in c[0] and 'data' in c[0],
     "Label Studio's own format; export as COCO or YOLO instead"),
    (lambda c: isinstance(c, dict) and '_via_img_metadata' in c,
     "a project of the VGG annotator; export as COCO instead"))


@dataclasses.dataclass
class File:
  """A file, checked where an entry cannot do without a value.

  Attributes:
    path: of the file.
    images: {id: (file name, (height, width) or None if it gives no size)}.
    classes: {category id: name}, in the order of the file.
    annotations: list of dicts, not yet checked.
    has_boxes, has_texts: whether annotations have 'bbox', 'caption'.
    changed: [text] of what is kept, but changed.
  """
  path: str
  images: dict
  classes: dict
  annotations: list
  has_boxes: bool
  has_texts: bool
  changed: list


def is_coco(content):
  """Whether the content of a JSON file looks like COCO's format."""
  return isinstance(content, dict) and isinstance(
      content.get('images'), list) and (
          'annotations' in content or 'categories' in content)


def other_format(content):
  """What the content is instead, and what to do; '' if it is unknown."""
  return next((what for test, what in _OTHERS if test(content)), '')


def parse(path, content):
  """The `File` of a JSON file's content.

  Raises:
    UserError: it is not of COCO's format, an id is missing or comes twice, or
      two categories have the same name.
  """
  if not is_coco(content):
    what = other_format(content)
    raise errors.UserError(f'{path} is {what or "not of the COCO format"}'
                           + ('' if what else ": no list 'images' and "
                              "'annotations'"))
  where = f'{path}: images'
  found = values.unique(values.objects(content['images'], where), 'id', where,
                        read_id)
  images = {i: (_file_name(image, f'{where} with id {i!r}'), _size(image))
            for i, image in found.items()}
  where = f'{path}: annotations'
  annotations = values.objects(content.get('annotations') or [], where)
  classes, changed = _classes(path, content.get('categories') or [],
                              annotations)
  return File(path, images, classes, annotations,
              any('bbox' in a for a in annotations),
              any('caption' in a for a in annotations), changed)


def read_id(value, where):
  """An image's id: a whole number, or any other text."""
  try:
    return values.integer(value, where)
  except values.Wrong:
    if isinstance(value, str) and value.strip():
      return values.text(value, where)
    raise


def _file_name(image, where):
  name = values.text(image.get('file_name'), f'{where}: file_name')
  if not name.strip():
    raise errors.UserError(f'{where}: file_name is empty')
  return name


def _size(image):
  """(height, width), or None; some tools write 0 or null."""
  try:
    return tuple(values.integer(image.get(k), k, 1)
                 for k in ('height', 'width'))
  except values.Wrong:
    return None


def _classes(path, categories, annotations):
  """({id: name}, [text of what was changed])."""
  where = f'{path}: categories'
  found = values.unique(values.objects(categories, where), 'id', where,
                        values.integer)
  used = {a.get('category_id') for a in annotations
          if isinstance(a.get('category_id'), (int, str))}
  used |= {str(u) for u in used}
  classes, changed = {}, []
  for i, category in found.items():
    name = ' '.join(values.text(category.get('name'),
                                f'{where} with id {i}: name').split())
    if not name:
      raise errors.UserError(f'{where} with id {i}: name is empty')
    classes[i] = name
  for name in {n for n in classes.values()
               if list(classes.values()).count(n) > 1}:
    # Roboflow's first category is the project, with no boxes. Its name may be
    # that of a class.
    ids = [i for i, n in classes.items() if n == name]
    project = ids[0]
    if (len(ids) == 2 and found[project].get('supercategory') == 'none'
        and str(project) not in used):
      del classes[project]
      changed.append(f'category {project} left out: the project, with the '
                     f'name of class {name!r}')
    else:
      raise errors.UserError(
          f'{where}: two categories, with ids {ids[0]} and {ids[1]}, have the '
          f'same name {name!r}; give one another name, or merge them')
  return classes, changed


def boxes_and_texts(file, skip, change):
  """({image id: [`layout.Box`]}, {image id: [text]}) of a file.

  What cannot be read is left out and counted.

  Args:
    file: a `File`.
    skip: function (reason, name).
    change: function (text).
  """
  boxes, texts = ({i: [] for i in file.images} for _ in range(2))
  for k, a in enumerate(file.annotations):
    where = f'annotations[{k}]'
    try:
      i = read_id(a.get('image_id'), f'{where}.image_id')
    except values.Wrong as e:
      skip(f'annotation: {e.reason}', where)
      continue
    if i not in file.images:
      skip('annotations of an image that is not listed', i)
      continue
    name = f'{file.images[i][0]}#{a.get("id", k)}'
    if 'caption' in a:
      try:
        texts[i] += values.texts(a['caption'], f'{where}.caption', change)
      except values.Wrong as e:
        skip(f'caption: {e.reason}', name)
    if 'bbox' in a or 'caption' not in a:
      box = _box(a, name, where, file.classes, skip, change)
      if box:
        boxes[i].append(box)
  return boxes, texts


def _box(a, name, where, classes, skip, change):
  """The `layout.Box` of an annotation, or None if it is left out."""
  try:
    category = values.integer(a.get('category_id'), f'{where}.category_id')
    # Half of the tools leave it out.
    crowd = values.flag(a.get('iscrowd') or 0, f'{where}.iscrowd')
  except values.Wrong as e:
    return skip(f'box: {e.reason}', name)
  if category not in classes:
    return skip(f'box: category {category} is not listed', name)
  area = None
  if a.get('area') is not None:
    try:
      area = values.positive(a['area'], f'{where}.area')
    except values.Wrong:
      change("area replaced by the box's")
  try:
    number = values.integer(a.get('id'), f'{where}.id')
  except values.Wrong:
    number = -1
  return layout.Box(name, classes[category], a.get('bbox'), crowd, area,
                    number)
