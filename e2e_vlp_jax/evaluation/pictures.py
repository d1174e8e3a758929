"""Draws pictures that show at a glance what a model got right.

A picture has the image with tagged boxes and, below it, the rows of each task
(`tasks.base.Task.draw`). If the truth is known, green is right, red is wrong,
thin white lines are the true boxes and dashed ones were missed. Pictures are
narrow, so that they can be read on a phone.
"""
import contextlib
import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.evaluation import dataset_checks
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.tasks import base

_PAPER = '#16191d'
# Pixels: the larger side for photographs, the smaller for drawn scenes.
_SMALL_SIDE, _SIDE, _EDGE, _LINE, _LETTER = 480, 600, 14, 22, 8.4


def draw(image, results=(), truth=None):
  """One picture.

  Args:
    image: uint8 [H, W, 3]; small ones are enlarged, large ones reduced, to
      480 or 600 pixels on the longer side.
    results: `tasks.base.Result`s of this image, at most one of a task.
    truth: a `tasks.base.Truth` of this image, or None.

  Returns:
    a PIL image.
  """
  side = _SMALL_SIDE if max(image.shape[:2]) <= _SMALL_SIDE / 2 else _SIDE
  scale = side / max(image.shape[:2])
  size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
  # Drawn scenes stay sharp-edged when enlarged many times.
  kind = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
  photo = Image.fromarray(image).resize(size, kind)
  of = {r.task: r for r in results}
  drawings = [base.load(name).draw(of.get(name), truth)
              for name in base.names()]
  _draw_boxes(photo, [b for d in drawings for b in d.boxes], scale)

  rows = [row for d in drawings for row in d.sentences]
  legend = [row for d in drawings for row in d.legend]
  if rows and legend:
    rows.append([])
  rows = [part for row in rows + legend
          for part in _wrap(row, int(side / _LETTER))]
  width, top = side + 2 * _EDGE, photo.height + 2 * _EDGE
  sheet = Image.new('RGB', (width, top + len(rows) * _LINE
                            + (_EDGE if rows else 0)), _PAPER)
  sheet.paste(photo, ((width - photo.width) // 2, _EDGE))
  pen = ImageDraw.Draw(sheet)
  for k, row in enumerate(rows):
    _write(pen, _EDGE, top + k * _LINE, row)
  return sheet


def _draw_boxes(photo, boxes, scale):
  """Draws boxes and their tags; earlier tags choose their places last."""
  pen, placed = ImageDraw.Draw(photo), []
  for one in boxes:
    x0, y0, x1, y1 = (round(float(v) * scale) for v in one.box)
    x0, y0 = max(x0, 1), max(y0, 1)
    x1 = max(min(x1, photo.width - 2), x0 + 1)
    y1 = max(min(y1, photo.height - 2), y0 + 1)
    placed.append((one, (x0, y0, x1, y1)))
    if one.style == 'dashed':
      _dashed(pen, placed[-1][1], one.colour)
    elif one.style == 'thin':
      pen.rectangle((x0, y0, x1, y1), outline=one.colour)
    else:
      pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline='black', width=5)
      pen.rectangle((x0, y0, x1, y1), outline=one.colour, width=3)
  taken = []
  for one, pixels in reversed(placed):
    if one.tag:
      _tag(photo, pen, one, pixels, taken)


def _dashed(pen, box, colour, dash=8):
  x0, y0, x1, y1 = box
  for width, ink in ((4, 'black'), (2, colour)):
    for x in range(x0, x1, 2 * dash):
      for y in (y0, y1):
        pen.line((x, y, min(x + dash, x1), y), ink, width)
    for y in range(y0, y1, 2 * dash):
      for x in (x0, x1):
        pen.line((x, y, x, min(y + dash, y1)), ink, width)


def _tag(photo, pen, one, pixels, taken):
  """Writes a box's tag at the first free place around it."""
  font = _font(15)
  width, height = int(font.getlength(one.tag)) + 8, 20
  x0, y0, x1, y1 = pixels
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
  outlined = one.style != 'bold'
  pen.rectangle(taken[-1], fill='#000000' if outlined else one.colour,
                outline=one.colour if outlined else None)
  pen.text((x + 4, y + height / 2), one.tag, font=font, anchor='lm',
           fill=one.colour if outlined else '#000000')


def _write(pen, x, y, row):
  """Writes the parts of a row one after the other, each in its colour."""
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


def sample_sheet(predictor, variables, pipeline, n):
  """Pictures of `n` examples, with all tasks for which the model is trained.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline.
    n: number of examples.

  Returns:
    list of at most n PIL images, the same examples every time.
  """
  tasks = [t for t in map(predictor.task, predictor.task_names())
           if t.in_samples]
  images = []
  for batch, ids in inputs.batches(predictor, pipeline, n):
    ids = np.asarray(ids).tolist()
    found = []
    for task in tasks:
      with contextlib.suppress(predictor_lib.NotTrained):
        found.append(_sample(predictor, variables, batch, ids, pipeline, task))
    for row, example_id in enumerate(ids):
      if example_id >= 0 and len(images) < n:
        truth = dataset_checks.truth(pipeline, example_id, predictor.labels)
        images.append(draw(
            photographs.decode_image(truth.record['image'],
                                     truth.record['image_id']),
            [of[row] for of in found], truth))
  return images


def _sample(predictor, variables, batch, ids, pipeline, task):
  """A task's results for the rows of a batch, with its `sample_texts`."""
  texts = None
  if task.needs_text:
    texts = task.sample_texts([pipeline.record(i) if i >= 0 else None
                               for i in ids])
    count = len(texts[0])
    batch = {**batch, **inputs.text_rows(predictor, batch, {
        i: inputs.tokenize(predictor, own, count)
        for i, own in zip(ids, texts)}, count)}
  return predictor.results(variables, batch, task, texts)
