"""Objects of a record -> padded boxes, class ids and attribute ids."""
import numpy as np

from e2e_vlp_jax.data import boxes as boxes_lib
from e2e_vlp_jax.data import ops_randaug
from e2e_vlp_jax.data.keys import Key, yes
from e2e_vlp_jax.errors import UserError


def boxes(context, drop_unknown=False, crowds=0):
  """The boxes inside the window that `fit` shows.

  Boxes are clipped to the window; those without area there and NaNs are
  dropped. If there are more than M, the largest M are kept, in the record's
  order; if there are more than K attributes, the first K.

  Crowds are dropped too, as in DETR's training (facebookresearch/detr,
  datasets/coco.py). With `crowds` the largest of them become keys of their
  own, so that an objective need not penalise queries that find one.

  Reads objects, has_boxes, has_attributes; window, flipped.

  Args:
    context: has M, K and the label space.
    drop_unknown: drop objects and attributes whose name the label space lacks.
      Otherwise they raise a UserError.
    crowds: C, the maximum number of crowd boxes of a row; 0 = no such keys.
  """
  m, k = context.max_boxes, context.max_attributes

  def ids(look_up, names):
    found = []
    for name in names:
      try:
        found.append(look_up(name))
      except UserError:
        if not drop_unknown:
          raise
        found.append(-1)
    return found

  def apply(example):
    _check_order(example)
    objects = [o for o in example['objects'] if not o['is_crowd']]
    labels = np.array(ids(context.labels.class_id,
                          [o['label'] for o in objects]), int)
    corners = in_window(example, [o['bbox'] for o in objects])
    keep = largest(corners, m, labels >= 0)
    box_labels = np.zeros(m, np.int32)
    box_labels[:len(keep)] = labels[keep]
    attributes = np.full((m, k), -1, np.int32)
    for row, number in enumerate(keep):
      known = [a for a in ids(context.labels.attribute_id,
                              objects[number]['attributes']) if a >= 0][:k]
      attributes[row, :len(known)] = known
    has_boxes = example['has_boxes']
    return {
        **example, **(crowd_keys(example) if crowds else {}),
        'boxes': padded(corners[keep], m), 'box_labels': box_labels,
        'box_attributes': attributes, 'box_mask': np.arange(m) < len(keep),
        'task_mask/detection': has_boxes,
        'task_mask/attributes': has_boxes and example['has_attributes'],
    }

  def crowd_keys(example):
    corners = in_window(example, [o['bbox'] for o in example['objects']
                                  if o['is_crowd']])
    keep = largest(corners, crowds)
    return {'crowd_boxes': padded(corners[keep], crowds),
            'crowd_mask': np.arange(crowds) < len(keep)}
  return apply


def _check_order(example):
  if 'window' not in example:
    raise UserError('pp: decode must stand before boxes')
  if 'augment' in example:
    raise UserError(ops_randaug.NO_BOXES)


def in_window(example, stored):
  """Maps stored boxes to the example's window.

  Args:
    example: has window and flipped.
    stored: n boxes in the form of a record.

  Returns:
    float64 [n, 4], (x0, y0, x1, y1) in [0, 1] of the window, clipped to it.
  """
  corners = boxes_lib.swap_axes(np.array(stored, float).reshape(-1, 4))
  height, width = example['height'], example['width']
  y, x, h, w = example['window']
  corners = np.clip((corners * [width, height, width, height] - [x, y, x, y])
                    / np.maximum([w, h, w, h], 1), 0, 1)
  if example['flipped']:
    corners = corners[:, [2, 1, 0, 3]]
    corners[:, [0, 2]] = 1 - corners[:, [0, 2]]
  return corners


def largest(corners, most, allowed=True):
  """Indices of the largest boxes with an area, in their order."""
  x0, y0, x1, y1 = corners.T
  area = (y1 - y0) * (x1 - x0)
  # A NaN fails every comparison.
  keep = np.flatnonzero((y1 > y0) & (x1 > x0) & (area > 0) & allowed)
  if len(keep) > most:
    keep = np.sort(keep[np.argsort(-area[keep], kind='stable')[:most]])
  return keep


def padded(corners, most):
  """(x0, y0, x1, y1) [n, 4] -> (cx, cy, w, h) float32 [most, 4]."""
  x0, y0, x1, y1 = corners.T
  out = np.zeros((most, 4), np.float32)
  out[:len(corners)] = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0,
                                 y1 - y0], -1)
  return out


def _draw_mask(draw):
  """At least one box per row, from the left."""
  b, m = draw.shape
  return np.arange(m) < draw.rng.integers(1, m + 1, b)[:, None]


def _draw_boxes(mask):
  """Inside the image, where the key `mask` is True."""
  def draw_(draw):
    size = draw.rng.uniform(.1, .5, (*draw.shape[:2], 2))
    centre = draw.rng.uniform(size / 2, 1 - size / 2)
    return np.concatenate([centre, size], -1) * draw.batch[mask][..., None]
  return draw_


def _draw_labels(draw):
  return (draw.rng.integers(0, draw.sizes['num_classes'], draw.shape)
          * draw.batch['box_mask'])


def _draw_attributes(draw):
  """Any number of them, from the left."""
  (b, m, k), number = draw.shape, draw.sizes['num_attributes']
  if not number:
    return np.full(draw.shape, -1)
  there = np.arange(k) < draw.rng.integers(0, k + 1, (b, m, 1))
  return np.where(there & draw.batch['box_mask'][..., None],
                  draw.rng.integers(0, number, draw.shape), -1)


OPS = {'boxes': boxes}
KEYS = {'boxes': (
    Key('box_mask', bool, 'M', False, 'True where there is a box',
        _draw_mask),
    Key('boxes', np.float32, 'M4', 0, 'cx, cy, w, h of the unpadded image',
        _draw_boxes('box_mask')),
    Key('box_labels', np.int32, 'M', 0, 'class ids', _draw_labels),
    Key('box_attributes', np.int32, 'MK', -1, 'attribute ids',
        _draw_attributes),
    Key('task_mask/detection', bool, '', False,
        'whether the dataset has boxes', yes),
    Key('task_mask/attributes', bool, '', False,
        'whether it has attributes too',
        lambda draw: np.full(draw.shape, draw.sizes['num_attributes'] > 0)),
    Key('crowd_mask', bool, 'C', False,
        'True where there is a crowd; only `boxes(crowds=C)` makes these keys',
        lambda draw: draw.rng.random(draw.shape) < .5),
    Key('crowd_boxes', np.float32, 'C4', 0, 'as `boxes`',
        _draw_boxes('crowd_mask')),
)}
SIZES = {'boxes': lambda drop_unknown, crowds: {'C': crowds}}
