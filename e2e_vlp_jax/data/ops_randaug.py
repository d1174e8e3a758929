"""RandAugment, as ALBEF, METER and FIBER use it.

The op chooses the changes of an image; `augment` applies them when the picture
is rendered, at its size on the canvas.
"""
import functools

import cv2
import numpy as np

from e2e_vlp_jax.data.rng import uniform
from e2e_vlp_jax.errors import UserError, nearest

_FILL = (128,) * 3  # grey, fills areas from outside the picture
_LEVELS = 10  # maximum of `magnitude`


def randaug(context, count=2, magnitude=7, p=.5, released=False):
  """Chooses `count` changes with replacement, each with probability `p`.

  The ten changes and how `magnitude` (0 to 10) sets their strength are those
  of FIBER's coarse-grained code (microsoft/FIBER, coarse_grained): colour
  factors up to 1.9, shear up to 0.3, shifts up to 10 pixels, 30 degrees.

  Boxes cannot follow these changes: a string with `boxes` too is refused.

  Makes augment, a list of (name, level) for `augment`.

  Args:
    context: unused.
    count, magnitude, p: see above.
    released: reproduce two faults of that code, which whiten an image
      without black (AutoContrast) and give sharp edges false colours
      (Sharpness).
  """
  del context
  strength = magnitude / _LEVELS
  levels = {'Brightness': .1 + 1.8 * strength,
            'Sharpness': .1 + 1.8 * strength, 'ShearX': .3 * strength,
            'ShearY': .3 * strength, 'TranslateX': 10 * strength,
            'TranslateY': 10 * strength, 'Rotate': 30 * strength}

  def apply(example):
    if 'window' not in example:
      raise UserError('pp: decode must stand before randaug')
    if 'box_mask' in example:
      raise UserError(NO_BOXES)
    which, made, sign = uniform(example['seed'], [3, count])
    plan = []
    for name, keep, side in zip(
        (NAMES[int(u * len(NAMES))] for u in which), made < p, sign < .5):
      level = levels.get(name)
      if keep:
        plan.append((name, -level if name in _GEOMETRIC and side else level))
    return {**example, 'augment': plan, 'augment_released': released}
  return apply


NO_BOXES = ('pp: boxes cannot follow the pixels that randaug shears, shifts '
            'and turns; leave out one of the two')


def augment(image, plan, released=False):
  """Applies the changes of `plan`, in order.

  Args:
    image: uint8 [H, W, 3].
    plan: [(name, level)]: a factor for Brightness and Sharpness, a slope for
      ShearX and ShearY, pixels for TranslateX and TranslateY, degrees for
      Rotate, None for the others.
    released: see `randaug`.

  Returns:
    uint8 [H, W, 3].
  """
  for name, level in plan:
    if name not in NAMES:
      raise UserError(f'randaug: no change {name!r}' + nearest(name, NAMES))
    if name in _GEOMETRIC:
      h, w = image.shape[:2]
      matrix = np.array(_GEOMETRIC[name](level, h, w), float)
      image = cv2.warpAffine(image, matrix, (w, h), borderValue=_FILL)
    elif name in _CHANNELS:
      change = functools.partial(_CHANNELS[name], released=released)
      image = np.stack([change(image[..., c]) for c in range(3)], -1)
    elif name == 'Brightness':
      table = np.arange(256, dtype=np.float32) * level
      image = table.clip(0, 255).astype(np.uint8)[image]
    elif name == 'Sharpness':
      image = _sharpen(image, level, released)
  return image


def _auto_contrast(channel, released):
  """Stretches the channel's range to 0..255."""
  low, high = int(channel.min()), int(channel.max())
  if high <= low:
    return channel
  scale = 255 / (high - low)
  # The released code negates an unsigned byte: 256 - low instead of -low.
  shift = (256 - low) % 256 if released else -low
  table = np.arange(256) * scale + shift * scale
  return table.clip(0, 255).astype(np.uint8)[channel]


def _equalize(channel, released):
  """Spreads the channel's values evenly."""
  del released
  counts = np.bincount(channel.ravel(), minlength=256)
  step = counts[counts > 0][:-1].sum() // 255
  if not step:
    return channel
  before = np.concatenate([[step // 2], counts[:-1]])
  return (np.cumsum(before) // step).clip(0, 255).astype(np.uint8)[channel]


def _sharpen(image, factor, released):
  """Moves away from a 3x3 mean with centre weight 5; keeps the border."""
  if min(image.shape[:2]) < 3:
    return image
  h, w = image.shape[:2]
  x = image.astype(np.float32)
  sum_ = sum(x[i:h - 2 + i, j:w - 2 + j] for i in range(3) for j in range(3))
  inner = x[1:-1, 1:-1]
  soft = np.rint((sum_ + 4 * inner) / np.float32(13))
  x[1:-1, 1:-1] = soft + np.float32(factor) * (inner - soft)
  # The released code does not clip, so that 256 becomes 0.
  return (x.astype(np.int32) if released else x.clip(0, 255)).astype(np.uint8)


def _rotation(degrees, h, w):
  """About the centre, as cv2.getRotationMatrix2D."""
  a = np.deg2rad(degrees)
  c, s, x, y = np.cos(a), np.sin(a), w / 2, h / 2
  return [[c, s, (1 - c) * x - s * y], [-s, c, s * x + (1 - c) * y]]


_CHANNELS = {'AutoContrast': _auto_contrast, 'Equalize': _equalize}
_GEOMETRIC = {
    'ShearX': lambda level, h, w: [[1, level, 0], [0, 1, 0]],
    'ShearY': lambda level, h, w: [[1, 0, 0], [level, 1, 0]],
    'TranslateX': lambda level, h, w: [[1, 0, -level], [0, 1, 0]],
    'TranslateY': lambda level, h, w: [[1, 0, 0], [0, 1, -level]],
    'Rotate': _rotation}
NAMES = ('Identity', *_CHANNELS, 'Brightness', 'Sharpness', *_GEOMETRIC)

OPS = {'randaug': randaug}
