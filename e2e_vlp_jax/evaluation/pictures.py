"""Draws pictures that show at a glance what a model got right.

A picture has the image with tagged boxes (two images stand side by side, boxes
on the first) and, below it, the rows of each task
(`tasks.base.Task.draw`). If the truth is known, green is right, red is wrong,
thin white lines are the true boxes and dashed ones were missed. Pictures are
narrow, so that they can be read on a phone.
"""
import contextlib

import numpy as np
from PIL import Image, ImageDraw

from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.evaluation import dataset_checks
from e2e_vlp_jax.evaluation import drawing
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.tasks import base

# Pixels: the larger side for photographs, the smaller for drawn scenes.
_SMALL_SIDE, _SIDE, _EDGE, _GAP = 480, 600, 14, 6


def draw(images, results=(), truth=None):
  """One picture.

  Args:
    images: uint8 [H, W, 3], or a list or tuple of them; small ones are
      enlarged, large ones reduced, to 480 or 600 pixels on the longer side,
      shared by all.
    results: `tasks.base.Result`s of these images, at most one of a task.
    truth: a `tasks.base.Truth` of these images, or None.

  Returns:
    a PIL image.
  """
  images = [images] if isinstance(images, np.ndarray) else list(images)
  longest = max(max(i.shape[:2]) for i in images)
  side = _SMALL_SIDE if longest <= _SMALL_SIDE / 2 else _SIDE
  photo, scale = _side_by_side(images, side)
  of = {r.task: r for r in results}
  drawings = [base.load(name).draw(of.get(name), truth)
              for name in base.names()]
  drawing.draw_boxes(photo, [b for d in drawings for b in d.boxes], scale)

  rows = [row for d in drawings for row in d.sentences]
  legend = [row for d in drawings for row in d.legend]
  if rows and legend:
    rows.append([])
  rows = [part for row in rows + legend
          for part in drawing.wrap(row, int(side / drawing.LETTER))]
  width, top = side + 2 * _EDGE, photo.height + 2 * _EDGE
  sheet = Image.new('RGB', (width, top + len(rows) * drawing.LINE
                            + (_EDGE if rows else 0)), drawing.PAPER)
  sheet.paste(photo, ((width - photo.width) // 2, _EDGE))
  pen = ImageDraw.Draw(sheet)
  for k, row in enumerate(rows):
    drawing.write(pen, _EDGE, top + k * drawing.LINE, row)
  return sheet


def _side_by_side(images, side):
  """(the images in one row, enlargement of the first); `side` for all."""
  each = (side - _GAP * (len(images) - 1)) / len(images)
  scales = [each / max(i.shape[:2]) for i in images]
  photos = []
  for image, scale in zip(images, scales):
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    # Drawn scenes stay sharp-edged when enlarged many times.
    kind = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
    photos.append(Image.fromarray(image).resize(size, kind))
  row = Image.new('RGB', (sum(p.width for p in photos)
                          + _GAP * (len(photos) - 1),
                          max(p.height for p in photos)), drawing.PAPER)
  left = 0
  for photo in photos:
    row.paste(photo, (left, 0))
    left += photo.width + _GAP
  return row, scales[0]


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
      if task.images > 1 and 'second_image' not in batch:
        continue  # Rows of this unit show one image.
      with contextlib.suppress(predictor_lib.NotTrained):
        found.append(_sample(predictor, variables, batch, ids, pipeline, task))
    for row, example_id in enumerate(ids):
      if example_id >= 0 and len(images) < n:
        truth = dataset_checks.truth(pipeline, example_id, pipeline.labels)
        shown = [photographs.decode_image(image, truth.record['image_id'])
                 for image in pipeline.images(example_id)]
        images.append(draw(shown, [of[row] for of in found], truth))
  return images


def _sample(predictor, variables, batch, ids, pipeline, task):
  """A task's results for the rows of a batch, with its `sample_texts`."""
  texts = None
  if task.needs_text:
    units = [pipeline.unit(i) if i >= 0 else None for i in ids]
    texts = task.sample_texts([{**unit[0], 'item': unit[1]} if unit else None
                               for unit in units])
    count = len(texts[0])
    batch = {**batch, **inputs.rows_of(
        batch, {i: task.text_inputs(predictor, own, count)
                for i, own in zip(ids, texts)},
        task.text_inputs(predictor, [], count))}
  return predictor.results(variables, batch, task, texts)
