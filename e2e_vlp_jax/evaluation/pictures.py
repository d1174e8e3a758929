"""Pictures on which a person sees at a glance what a model got right.

The image with numbered boxes; below it what the model writes about the image
and what each box is said to be. With ground truth, green is right, red is
wrong, thin white lines are the true boxes and dashed ones were missed. Cards
are narrow, so that they can be read on a telephone.
"""
import functools
import json
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data.datasets.scenes import facts as scene_facts
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import predictor as predictor_lib

RIGHT, WRONG, MISSED = '#2fbf5b', '#f0524d', '#ffffff'
_PAPER, _INK, _FAINT = '#16191d', '#e8eaed', '#9aa3ad'
# Without ground truth: one colour a box, told apart on most photographs.
_COLOURS = ('#4cc2ff', '#ffb02e', '#ff6ec7', '#7ee787', '#c49bff', '#ffd84d',
            '#ff8a5c', '#5ce0d0')
# Pixels. Photographs get the larger side, small drawn scenes the other.
_SMALL_SIDE, _SIDE, _EDGE, _LINE, _LETTER = 480, 600, 14, 22, 8.4
_MANY = 8  # From so many objects on, boxes bear numbers alone.


def draw(image, objects=None, ground_truth=None, caption=None,
         references=None, matches=None, caption_right=None):
  """One picture.

  Args:
    image: uint8 [H, W, 3]; small ones are enlarged, large ones reduced, to
      480 or 600 pixels on the longer side.
    objects: predictions: list of {'label', 'score', 'box' (x0, y0, x1, y1 in
      pixels of `image`), 'attributes': [{'label', 'score'}]}, or None if the
      model was not asked.
    ground_truth: list of {'label', 'box', 'attributes': [names]}, or None.
    caption: what the model wrote.
    references: what people wrote.
    matches: list of {'text', 'score'} and, where it is known, 'right' (bool)
      and 'whose' (e.g. 'own').
    caption_right: whether all that the caption states is true; None if
      nobody can say.

  Returns:
    a PIL image.
  """
  side = _SMALL_SIDE if max(image.shape[:2]) <= _SMALL_SIDE / 2 else _SIDE
  scale = side / max(image.shape[:2])
  size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
  # Drawn scenes stay sharp-edged when enlarged many times.
  kind = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
  photo = Image.fromarray(image).resize(size, kind)
  things = _judge(objects, ground_truth)
  _draw_boxes(photo, things, scale)

  width = side + 2 * _EDGE
  rows = _caption_rows(caption, caption_right, references, matches)
  listed = _list_rows(things, objects is not None, ground_truth is not None)
  if rows and listed:
    rows.append([])
  rows = [part for row in rows + listed
          for part in _wrap(row, int(side / _LETTER))]
  top = photo.height + 2 * _EDGE
  sheet = Image.new('RGB', (width, top + len(rows) * _LINE
                            + (_EDGE if rows else 0)), _PAPER)
  sheet.paste(photo, ((width - photo.width) // 2, _EDGE))
  pen = ImageDraw.Draw(sheet)
  for k, row in enumerate(rows):
    _write(pen, _EDGE, top + k * _LINE, row)
  return sheet


def _judge(objects, truth):
  """Things to draw: dicts with box, tag ('': none), colour, row, note."""
  things, of = [], {}
  many = max(len(objects or ()), len(truth or ())) > _MANY
  if truth is not None and objects:
    of = dict(detection.match_boxes(
        [o['box'] for o in objects], [o['score'] for o in objects],
        [t['box'] for t in truth]))
  for k, thing in enumerate(objects or ()):
    match = truth[of[k]] if k in of else None
    words = [(a['label'], _FAINT if truth is None else _INK
              if match is None or not match['attributes'] else
              RIGHT if a['label'] in match['attributes'] else WRONG)
             for a in thing['attributes']]
    if truth is None:
      colour = name = _COLOURS[k % len(_COLOURS)]
      note = []
    else:
      good = match is not None and match['label'] == thing['label']
      name = RIGHT if good else WRONG
      colour = RIGHT if good and all(c != WRONG for _, c in words) else WRONG
      note = ([] if match is not None else [('· nothing there', WRONG)])
      if match is not None and colour == WRONG:
        note = [('· is ' + ' '.join([*match['attributes'], match['label']]),
                 _FAINT)]
    things.append(dict(
        box=thing['box'], colour=colour,
        tag=f'{k + 1}' if many else f'{k + 1} {thing["label"]}',
        row=[(f'{k + 1}', colour), *words, (thing['label'], name),
             (f'{thing["score"]:.2f}', _FAINT)], note=note))
  for m, thing in enumerate(truth or ()):
    name = ' '.join([*thing['attributes'], thing['label']])
    things.append(dict(box=thing['box'], colour=MISSED, note=[],
                       tag='' if m in of.values() else '–' if many else
                       thing['label'],
                       row=[('–', MISSED), (name, MISSED)]))
  return things


def _list_rows(things, asked, judged):
  """Rows of the list of objects: lists of (text, colour)."""
  found = [t for t in things if t['colour'] != MISSED]
  missed = [t for t in things if t['colour'] == MISSED and t['tag']]
  rows = []
  if asked:
    right = sum(t['colour'] == RIGHT for t in found)
    wrong = len(found) - right
    rows.append([(f'found {len(found)}' if found else 'found nothing',
                  _FAINT)])
    if judged and found:
      rows[-1] += [(f'· {right} right', RIGHT if right else _FAINT),
                   (f'· {wrong} wrong', WRONG if wrong else _FAINT)]
  for thing in found:
    rows.append([*thing['row'], *thing['note']])
  if missed:
    rows.append([('missed:' if asked else 'ground truth:', _FAINT)])
    rows += [t['row'] for t in missed]
  return rows


def _caption_rows(caption, right, references, matches):
  """Rows below the image."""
  rows = []
  mark = {True: [('✓', RIGHT)], False: [('✗', WRONG)], None: []}
  if caption is not None:
    rows.append([*mark[right], ('model:', _FAINT),
                 (caption or '(no words)', _INK)])
  for text in references or ():
    rows.append([('reference:', _FAINT), (text, _FAINT)])
  for match in matches or ():
    whose = f'{match["whose"]} text' if 'whose' in match else 'match'
    rows.append([*mark[match.get('right')],
                 (f'{whose} {match["score"]:.2f}:', _FAINT),
                 (match['text'], _INK)])
  return rows


def _draw_boxes(photo, things, scale):
  pen = ImageDraw.Draw(photo)
  # The truth first, so that it hides nothing.
  things = sorted(things, key=lambda t: t['colour'] != MISSED)
  for thing in things:
    x0, y0, x1, y1 = (round(float(v) * scale) for v in thing['box'])
    x0, y0 = max(x0, 1), max(y0, 1)
    x1 = max(min(x1, photo.width - 2), x0 + 1)
    y1 = max(min(y1, photo.height - 2), y0 + 1)
    thing['pixels'] = (x0, y0, x1, y1)
    if thing['colour'] == MISSED and thing['tag']:
      _dashed(pen, thing['pixels'])
    elif thing['colour'] == MISSED:
      pen.rectangle(thing['pixels'], outline=MISSED)
    else:
      pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline='black', width=5)
      pen.rectangle((x0, y0, x1, y1), outline=thing['colour'], width=3)
  taken = []
  for thing in reversed(things):
    if thing['tag']:
      _tag(photo, pen, thing, taken)


def _dashed(pen, box, dash=8):
  x0, y0, x1, y1 = box
  for width, colour in ((4, 'black'), (2, MISSED)):
    for x in range(x0, x1, 2 * dash):
      for y in (y0, y1):
        pen.line((x, y, min(x + dash, x1), y), colour, width)
    for y in range(y0, y1, 2 * dash):
      for x in (x0, x1):
        pen.line((x, y, x, min(y + dash, y1)), colour, width)


def _tag(photo, pen, thing, taken):
  """The name at the first free place around its box."""
  font = _font(15)
  width, height = int(font.getlength(thing['tag'])) + 8, 20
  x0, y0, x1, y1 = thing['pixels']
  places = [(x0, y0 - height), (x0, y1), (x1 - width, y0 - height),
            (x1 - width, y1), (x0 + 2, y0 + 2), (x1, y0), (x0 - width, y0),
            (x0 + 2, y1 - height - 2)]
  free = []
  for x, y in places:
    place = (x, y, x + width, y + height)
    inside = (x >= 0 and y >= 0 and place[2] <= photo.width
              and place[3] <= photo.height)
    overlap = sum(max(0, min(place[2], t[2]) - max(x, t[0]))
                  * max(0, min(place[3], t[3]) - max(y, t[1])) for t in taken)
    free.append((not inside, overlap, place))
  # min keeps the first of equals.
  _, _, (x, y, _, _) = min(free, key=lambda f: f[:2])
  x = min(max(x, 0), max(photo.width - width, 0))
  y = min(max(y, 0), max(photo.height - height, 0))
  taken.append((x, y, x + width, y + height))
  dark = thing['colour'] == MISSED
  pen.rectangle(taken[-1], fill='#000000' if dark else thing['colour'],
                outline=MISSED if dark else None)
  pen.text((x + 4, y + height / 2), thing['tag'], font=font, anchor='lm',
           fill=MISSED if dark else '#000000')


def _write(pen, x, y, row):
  """Words of a row one after the other, each in its colour."""
  font = _font(15)
  for text, colour in row:
    pen.text((x, y + _LINE / 2), text, fill=colour, font=font, anchor='lm')
    x += font.getlength(text + ' ')


def _wrap(row, letters):
  """Breaks a row of (text, colour) into rows of at most `letters` letters."""
  rows, length = [[]], 0
  for word, colour in [(w, c) for text, c in row for w in text.split(' ')]:
    if length and length + len(word) > letters:
      rows.append([('   ', colour)])
      length = 4
    rows[-1].append((word, colour))
    length += len(word) + 1
  return rows


@functools.lru_cache(None)
def _font(size):
  """DejaVu Sans, which matplotlib ships: it has the check marks."""
  import matplotlib  # pylint: disable=g-import-not-at-top
  return ImageFont.truetype(os.path.join(
      matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), size)


def sample_sheet(predictor, variables, pipeline, n, threshold=.5):
  """Pictures of `n` examples, with all that the model has heads for.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline.
    n: how many.
    threshold: least score of the boxes shown.

  Returns:
    list of at most n PIL images, the same examples every time.
  """
  images = []
  for batch, ids in predictor_lib.batches(predictor, pipeline, n):
    asked = {h: h in predictor.model.heads
             for h in ('detection', 'captioning', 'itm')}
    nobody = [None] * len(ids)
    found = (predictor.detect(variables, batch) if asked['detection']
             else nobody)
    captions = (predictor.caption(variables, batch) if asked['captioning']
                else nobody)
    matches = nobody
    if asked['itm']:
      # Each image with its own first text and with its neighbour's.
      own = {k: batch[k][:, :1] for k in ('text', 'text_mask')}
      other = {k: np.roll(v, -1, 0) for k, v in own.items()}
      matches = predictor.match(variables, {**batch, **{
          k: np.concatenate([own[k], other[k]], 1) for k in own}})
    for i, example_id in enumerate(ids):
      if example_id >= 0 and len(images) < n:
        record = pipeline.record(example_id)
        n = len(batch['example_id'])  # rows of one host: `roll` stays there
        neighbour = ids[i // n * n + (i + 1) % n]
        images.append(_sample(predictor, record, found[i], captions[i],
                              matches[i], pipeline.record(neighbour)
                              if neighbour >= 0 else None, threshold))
  return images


def _sample(predictor, record, found, caption, match, neighbour, threshold):
  """The picture of one record; what the model was not asked is None."""
  size = record['height'], record['width']
  scene = json.loads(record['scene_json'] or 'null')
  texts = [t for t in record['texts'] if t.strip()]
  right = (scene_facts.check_caption(caption[0], scene)['right']
           if caption and scene else None)
  rows = []
  if match is not None and texts:
    rows.append({'text': texts[0], 'score': match[0], 'whose': 'own',
                 'right': match[0] > .5})
    if neighbour and neighbour['texts'] and neighbour['texts'][0] not in texts:
      rows.append({'text': neighbour['texts'][0], 'score': match[1],
                   'whose': 'other', 'right': match[1] <= .5})
  return draw(
      photographs.decode_image(record['image'], record['image_id']),
      objects=predictor.objects_of(found, *size, threshold) if found else None,
      ground_truth=[o for o in detection.ground_truth(
          record, predictor.labels) if not o['is_crowd']]
      if record['objects'] else None,
      caption=caption[0] if caption else None, caption_right=right,
      references=texts[:2] if caption else None, matches=rows)
