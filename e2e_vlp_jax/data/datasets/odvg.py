"""ODVG: one JSON object a line, as toolboxes for grounding read it.

  {"filename", "height", "width",
   "grounding": {"caption", "regions": [{"bbox": [x0, y0, x1, y1], "phrase",
                                         "tokens_positive"}]}}
  {"filename", "height", "width",
   "detection": {"instances": [{"bbox", "label": 0, "category": "person"}]}}

`tokens_positive` may be absent: the phrase is then looked for in the caption.
A region may have a list of boxes. (OpenDataVisionGrounding; MMDetection's
docs/en/user_guides, and Open-GroundingDino.)
"""
import json

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import grounded
from e2e_vlp_jax.data.datasets import values


def read(path, names=None):
  """The `grounded.Image`s of a file, in its order.

  Args:
    path: of the .jsonl file.
    names: {label: class name} of a label map, or None.

  Raises:
    UserError: a line that is no such object, or a label whose category is not
      that of the label map.
  """
  found = {}
  try:
    with open(path, encoding='utf-8-sig') as f:
      for number, line in enumerate(f, 1):
        if line.strip():
          _add(found, json.loads(line), f'{path}:{number}', names)
  except FileNotFoundError as e:
    raise errors.UserError(f'no annotation file {path}') from e
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f'{path} is not readable, one JSON object a line: '
                           f'{e}') from e
  return list(found.values())


def label_map(path):
  """{label: name} of a JSON file {"0": "person", ...}."""
  content = values.load_json(path)
  if not isinstance(content, dict):
    raise values.Wrong(content, path, 'an object {label: name}')
  return {values.integer(k, f'{path}: label', 0):
          values.text(v, f'{path}: {k}') for k, v in content.items()}


def _add(found, entry, where, names):
  """Adds a line's captions and boxes to those of its image."""
  if not isinstance(entry, dict):
    raise values.Wrong(entry, where, 'an object')
  name = values.field(values.text, entry, 'filename', where)
  size = [values.integer(entry[s], f'{where}.{s}', 1)
          if entry.get(s) is not None else None for s in ('height', 'width')]
  image = found.setdefault(name, grounded.Image(name, name, *size))
  if 'grounding' not in entry and 'detection' not in entry:
    raise errors.UserError(f"{where}: neither 'grounding' nor 'detection'")
  if 'grounding' in entry:
    part, where = entry['grounding'], f'{where}.grounding'
    text = values.field(values.text, part, 'caption', where)
    image.captions.append((text, [
        phrase for k, r in enumerate(_list(part, 'regions', where))
        for phrase in _phrases(r, f'{where}.regions[{k}]', name)]))
  else:
    where = f'{where}.detection'
    image.objects += [
        dict(xywh=_xywh(o.get('bbox')), name=f'{name}#{k}',
             label=_label(o, f'{where}.instances[{k}]', names))
        for k, o in enumerate(_list(entry['detection'], 'instances', where))]


def _list(part, key, where):
  if not isinstance(part, dict):
    raise values.Wrong(part, where, 'an object')
  return values.objects(part.get(key, []), f'{where}.{key}')


def _phrases(region, where, name):
  """One `grounded.Phrase` for each box of a region."""
  boxes = region.get('bbox')
  several = isinstance(boxes, list) and boxes and isinstance(boxes[0], list)
  text = region.get('phrase')
  # MMDetection writes a list of phrases where one box has several.
  if isinstance(text, list):
    text = ' '.join(map(str, text))
  if text is not None:
    text = values.text(text, f'{where}.phrase')
  for box in boxes if several else [boxes]:
    yield grounded.Phrase(_xywh(box), f'{name}#{where.rpartition(".")[2]}',
                          region.get('tokens_positive') or None, text)


def _xywh(corners):
  """x0, y0, x1, y1 -> x, y, w, h; what is no box stays as it is."""
  try:
    x0, y0, x1, y1 = values.box(corners, 'bbox')
  except values.Wrong:
    return corners
  return [x0, y0, x1 - x0, y1 - y0]


def _label(instance, where, names):
  """The class name of an instance."""
  category = instance.get('category')
  label = instance.get('label')
  if names is None and category is None:
    raise errors.UserError(f"{where} has no 'category'; name the file of the "
                           'labels with --label_map')
  if names is None:
    return values.text(category, f'{where}.category')
  label = values.integer(label, f'{where}.label', 0)
  if label not in names:
    raise errors.UserError(f'{where}.label is {label}, which the label map '
                           f'lacks; it has {len(names)} labels, {min(names)} '
                           f'to {max(names)}')
  if category is not None and category != names[label]:
    raise errors.UserError(
        f'{where}: label {label} is {names[label]!r} in the label map, but its '
        f'category is {category!r}; is that the label map of this file? '
        '(COCO has maps of 80 and of 91 labels)')
  return names[label]
