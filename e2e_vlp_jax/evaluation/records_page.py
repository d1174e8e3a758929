"""One picture with records of a prepared dataset, as training will see them.

It shows a wrong box format, mixed-up classes or lost captions before a run is
started. Boxes have one colour a class, crowds are dashed; what `prepare` has
changed or left out is orange. Captions whose phrases have boxes are printed
with the phrases in the colours of their boxes.
"""
import collections
import dataclasses
import json
import os

import numpy as np
from PIL import Image, ImageDraw

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import boxes as boxes_lib
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data import records
from e2e_vlp_jax.evaluation import drawing
from e2e_vlp_jax.evaluation import phrase_rows
from e2e_vlp_jax.tasks import base

NAME = 'records.png'
_SIDE, _EDGE, _COLUMNS = 480, 14, 3  # pixels, pixels, pictures side by side
_MANY = 15    # objects of an image that still get tags
_ROWS = 4     # rows of texts, of questions, of changes below an image
_LETTERS = 220  # of a text
_CHANGED, _MARGIN = '#ffa13d', '#3a4149'
_OUT = .3     # how far beyond the image a box is drawn, in images
# Lists of a record besides texts and objects, and how an item is written.
_LISTS = {
    'questions': lambda i: f'{i["question"]} {" | ".join(i["answers"])}',
    'statements': lambda i: i['statement'] + (
        f' ({i["label"]})' if i['has_label'] else ''),
    'entailment': lambda i: f'{i["text"]} ({i["label"]})'}


def write_page(data_dir, name, count, path=None):
  """Draws records of all splits; returns the path of the PNG.

  Args:
    data_dir: folder of the prepared datasets.
    name: of the dataset.
    count: number of records. Up to half of a split's are some that `prepare`
      has changed, the others are evenly spread.
    path: of the PNG; default: `NAME` in the dataset's folder.

  Raises:
    UserError: the dataset is not prepared, or the file cannot be written.
  """
  folder = records.prepared_folder(data_dir, name)
  report = _read(os.path.join(folder, records.REPORT))
  changes = _read(os.path.join(folder, records.CHANGES))
  path = path or os.path.join(folder, NAME)
  splits = list(report['splits'])
  space = records.label_space(data_dir, name)
  cells = []
  for k, split in enumerate(splits):
    opened = records.open_split(data_dir, name, split)
    changed = {int(i): c for i, c in changes.get(split, {}).items()}
    wanted = (k + 1) * count // len(splits) - k * count // len(splits)
    for i in _chosen(len(opened), sorted(changed), wanted):
      cells.append(_cell(f'{split} {i}', opened.get(i), changed.get(i, ()),
                         space.classes if space else ()))
  sheet = _sheet(_title(name, report, space), cells)
  try:
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    sheet.save(path, 'PNG')
  except (OSError, ValueError) as e:
    raise errors.UserError(f'{path}: cannot be written ({e})') from e
  return path


def _read(path):
  """The content of a JSON file; {} if there is none."""
  if not os.path.exists(path):
    return {}
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def _chosen(total, changed, wanted):
  """Numbers of records to draw, in order."""
  spread = lambda n, most: [k * n // most for k in range(most)]
  some = [changed[k] for k in spread(len(changed),
                                     min(len(changed), wanted // 2))]
  others = [i for i in spread(total, min(total, 2 * wanted)) if i not in some]
  rest = max(0, min(wanted, total) - len(some))
  return sorted(some + [others[k] for k in spread(
      len(others), min(rest, len(others)))])


# --- One record -------------------------------------------------------------
def _cell(title, record, changes, classes):
  """The image of a record with its boxes, and all else in rows below it."""
  boxes, legend = _objects(record, classes)
  grounded, captions, expressions = phrase_rows.of_record(record)
  if grounded and not boxes:
    legend = []
  boxes += [dataclasses.replace(b, tag='') if boxes else b for b in grounded]
  photo = _photo(record, _given(changes) + boxes)
  rows = [[(title, base.INK), (f'id {record["image_id"]}, '
                               f'{record["width"]}x{record["height"]}',
                               base.FAINT)]]
  rows += legend
  plain = [t for k, t in enumerate(record['texts']) if k not in captions]
  rows += _some(list(captions.values()))
  rows += _some([[(f'“{t}”', base.INK)] for t in _cut(plain)])
  rows += _some([[(f'phrase: {p["text"]}', base.FAINT)]
                 for p in record['phrases'] if p['text_number'] < 0])
  rows += _some(expressions)
  for field, write in _LISTS.items():
    rows += _some([[(t, base.FAINT)] for t in _cut(map(write, record[field]))])
  rows += _some([[(c['what'] + f' ({c["name"]})' * bool(c['name']), _CHANGED)]
                 for c in changes])
  rows = [part for row in rows
          for part in drawing.wrap(row, int(_SIDE / drawing.LETTER))]
  cell = Image.new('RGB', (_SIDE, photo.height + len(rows) * drawing.LINE),
                   drawing.PAPER)
  cell.paste(photo, ((_SIDE - photo.width) // 2, 0))
  pen = ImageDraw.Draw(cell)
  for k, row in enumerate(rows):
    drawing.write(pen, 0, photo.height + k * drawing.LINE, row)
  return cell


def _cut(texts):
  return [t if len(t) <= _LETTERS else t[:_LETTERS] + '…' for t in texts]


def _some(rows, most=_ROWS):
  """The first rows, and how many there are more."""
  more = len(rows) - most
  return rows[:most] + ([[(f'… and {more} more', base.FAINT)]]
                         if more > 0 else [])


def _photo(record, boxes):
  """The image with boxes, and a margin if they stick out of it."""
  pixels = photographs.decode_image(record['image'], record['image_id'])
  corners = np.clip([b.box for b in boxes] or [[0, 0, 1, 1]], -_OUT, 1 + _OUT)
  start = np.minimum(corners[:, :2].min(0), 0)
  extent = np.maximum(corners[:, 2:].max(0), 1) - start
  scale = _SIDE / max(extent * pixels.shape[1::-1])
  size = np.maximum(np.round(np.array(pixels.shape[1::-1]) * scale), 1)
  photo = Image.new('RGB', tuple(np.ceil(extent * size).astype(int).tolist()),
                    _MARGIN)
  # Drawn scenes stay sharp-edged when enlarged many times.
  kind = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
  photo.paste(Image.fromarray(pixels).resize(size.astype(int).tolist(), kind),
              np.round(-start * size).astype(int).tolist())
  drawing.draw_boxes(photo, [dataclasses.replace(
      b, box=(c - [*start, *start]) * [*size, *size])
                             for b, c in zip(boxes, corners)], 1.)
  return photo


def _objects(record, classes):
  """(boxes in [0, 1], rows that count them by class)."""
  counts = collections.Counter(o['label'] for o in record['objects'])
  # The same colour in all images, if there are enough colours.
  order = classes if len(classes) <= len(base.COLOURS) else list(counts)
  colours = {label: base.COLOURS[order.index(label) % len(base.COLOURS)]
             for label in counts}
  many = len(record['objects']) > _MANY
  boxes = []
  for o in record['objects']:
    crowd = o['is_crowd']
    tag = ' '.join([*['crowd:'] * crowd, *o['attributes'][:3], o['label']])
    boxes.append(base.Box(
        boxes_lib.swap_axes(o['bbox']), colours[o['label']],
        '' if many and not crowd else tag, 'dashed' if crowd else 'bold'))
  crowds = sum(o['is_crowd'] for o in record['objects'])
  row = [(f'■ {label}' + (f' ×{n}' if n > 1 else ''), colours[label])
         for label, n in counts.items()]
  if crowds:
    row.append((f'({crowds} dashed: crowds)', base.FAINT))
  return boxes, [row or [('no objects', base.FAINT)]]


def _given(changes):
  """Boxes as the annotations had them, where they were changed or dropped."""
  return [base.Box(c['box'], _CHANGED, c['what'].partition(' ')[2], 'dashed')
          for c in changes if c['box']]


# --- The page ---------------------------------------------------------------
def _title(name, report, space):
  """Rows about the whole dataset."""
  rows = [[(f'{name}:', base.INK), ('; '.join(
      f'{split} {r["images"]} images, {r["boxes"]} boxes, {r["texts"]} texts'
      + ''.join(f', {r[k]} {k}' for k in ('phrases', 'expressions') if r.get(k))
      for split, r in report['splits'].items()), base.INK)]]
  if space and space.classes:
    some = ', '.join(space.classes[:40])
    rows.append([(f'{len(space.classes)} classes: {some}'
                  + (', …' if len(space.classes) > 40 else ''), base.FAINT)])
  for split, r in report['splits'].items():
    rows += _some([[(f'{split}: left out {s["count"]}: {reason}', _CHANGED)]
                   for reason, s in r['skipped'].items()]
                  + [[(f'{split}: {n}: {what}', _CHANGED)]
                     for what, n in r['changed'].items()], 3 * _ROWS)
  return rows


def _sheet(title, cells):
  """Puts each cell at the end of the shortest column."""
  columns = max(1, min(_COLUMNS, len(cells)))
  step = _SIDE + 2 * _EDGE
  width = columns * step
  rows = [part for row in title for part in drawing.wrap(
      row, int((width - 2 * _EDGE) / drawing.LETTER))]
  top = 2 * _EDGE + len(rows) * drawing.LINE
  ends, places = [top] * columns, []
  for cell in cells:
    column = min(range(columns), key=ends.__getitem__)
    places.append((column * step + _EDGE, ends[column]))
    ends[column] += cell.height + 2 * _EDGE
  sheet = Image.new('RGB', (width, max(ends)), drawing.PAPER)
  pen = ImageDraw.Draw(sheet)
  for k, row in enumerate(rows):
    drawing.write(pen, _EDGE, _EDGE + k * drawing.LINE, row)
  for cell, place in zip(cells, places):
    sheet.paste(cell, place)
  return sheet
