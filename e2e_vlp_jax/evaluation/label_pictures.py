"""Draws the labels of a training batch, so that wrong ones are seen at once.

The boxes are those of the batch, after cropping, mirroring and resizing: what
the model learns from. `prepare --show` draws the records.
"""
import os

import numpy as np
from PIL import Image

from e2e_vlp_jax.evaluation import drawing
from e2e_vlp_jax.tasks import base

FOLDER = 'labels'
_SIDE = 480  # pixels of the longer side


def write(workdir, batch, labels, tokenizer, count):
  """Writes WORKDIR/labels/*.png; returns their number, 0 without boxes.

  Args:
    workdir: the run's folder.
    batch: of the training pipeline.
    labels: a `label_space.LabelSpace`.
    tokenizer: a `data.tokenizer.Tokenizer`.
    count: maximum number of pictures.

  Returns:
    number of pictures.
  """
  if 'boxes' not in batch:
    return 0
  rows = np.flatnonzero(batch['valid'] & batch['box_mask'].any(-1))[:count]
  os.makedirs(os.path.join(workdir, FOLDER), exist_ok=True)
  for k, row in enumerate(rows):
    picture(batch, row, labels, tokenizer).save(
        os.path.join(workdir, FOLDER, f'{k:02d}.png'))
  return len(rows)


def picture(batch, row, labels, tokenizer):
  """A row's image, without its padding, with its boxes and their names."""
  mask = batch['image_mask'][row]
  height, width = mask.any(1).sum(), mask.any(0).sum()
  image = Image.fromarray(np.asarray(batch['image'][row][:height, :width]))
  scale = _SIDE / max(image.size)
  image = image.resize([max(1, round(n * scale)) for n in image.size],
                       Image.Resampling.LANCZOS)
  boxes = []
  for k in np.flatnonzero(batch['box_mask'][row]):
    cx, cy, w, h = map(float, batch['boxes'][row, k])
    number, name = _named(batch, row, k, labels, tokenizer)
    boxes.append(base.Box(
        [(cx - w / 2) * image.width, (cy - h / 2) * image.height,
         (cx + w / 2) * image.width, (cy + h / 2) * image.height],
        base.COLOURS[number % len(base.COLOURS)], name))
  drawing.draw_boxes(image, boxes, 1.)
  return image


def _named(batch, row, k, labels, tokenizer):
  """(number of its colour, name) of a box: its class, or words of the text."""
  if 'span_mask' in batch:
    return k, tokenizer.decode(
        batch['text'][row, 0][batch['span_mask'][row, k]])
  class_id = int(batch['box_labels'][row, k])
  names = [labels.attributes[a] for a in batch['box_attributes'][row, k]
           if a >= 0]
  return class_id, ' '.join([*names, labels.classes[class_id]])
