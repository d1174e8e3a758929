"""Geometry of boxes in inclusive pixels, and their code relative to anchors.

Detectors that descend from the first Faster R-CNN code (maskrcnn-benchmark,
GLIP, FIBER's fine stage) count a box's last pixel as part of it: a box (x0, y0,
x1, y1) is x1 - x0 + 1 wide. Anchors, the box code, the assignment and the
suppression use this convention; the GIoU loss and metrics do not. Boxes are
float arrays [..., 4].
"""
import math

import jax.numpy as jnp

from e2e_vlp_jax.ops import boxes as box_ops

WEIGHTS = (10., 10., 5., 5.)  # of the code's four values, as in Fast R-CNN
_LARGEST = math.log(1000 / 16)  # of a decoded log ratio of sides
_EPSILON = 1e-7


def from_relative(boxes, size):
  """Relative (cx, cy, w, h) -> inclusive pixels.

  Args:
    boxes: [..., 4], relative to an image.
    size: [..., 2] height and width of that image, in pixels.
  """
  h, w = size[..., 0], size[..., 1]
  return (box_ops.to_xyxy(boxes) * jnp.stack([w, h, w, h], -1)
          - jnp.array([0., 0., 1., 1.]))


def to_relative(boxes, size):
  """Inclusive pixels -> (x0, y0, x1, y1) relative to an image.

  Args:
    boxes, size: see `from_relative`.
  """
  h, w = size[..., 0], size[..., 1]
  return (boxes + jnp.array([0., 0., 1., 1.])) / jnp.stack([w, h, w, h], -1)


def clip(boxes, size):
  """Clips boxes to the pixels of an image of `size` [..., 2]."""
  h, w = size[..., 0], size[..., 1]
  return jnp.clip(boxes, 0, jnp.stack([w, h, w, h], -1) - 1)


def center(boxes):
  """[..., 2] (x, y)."""
  return (boxes[..., :2] + boxes[..., 2:]) / 2


def iou(a, b):
  """IoU of boxes that broadcast against each other."""
  low = jnp.maximum(a[..., :2], b[..., :2])
  high = jnp.minimum(a[..., 2:], b[..., 2:])
  overlap = jnp.prod(jnp.maximum(high - low + 1, 0), -1)
  return overlap / (_area(a) + _area(b) - overlap)


def _area(boxes):
  return jnp.prod(boxes[..., 2:] - boxes[..., :2] + 1, -1)


def encode(boxes, anchors):
  """Code of boxes relative to anchors: shift of centres, log ratio of sides."""
  side = anchors[..., 2:] - anchors[..., :2] + 1
  shift = (center(boxes) - center(anchors)) / side
  ratio = jnp.log((boxes[..., 2:] - boxes[..., :2] + 1) / side)
  return jnp.concatenate([shift, ratio], -1) * jnp.array(WEIGHTS)


def decode(code, anchors):
  """The boxes of a code; the inverse of `encode`."""
  code = code / jnp.array(WEIGHTS)
  side = anchors[..., 2:] - anchors[..., :2] + 1
  middle = code[..., :2] * side + center(anchors)
  reach = (jnp.exp(jnp.minimum(code[..., 2:], _LARGEST)) * side - 1) / 2
  return jnp.concatenate([middle - reach, middle + reach], -1)


def giou_loss(boxes, targets):
  """1 - GIoU of boxes and their targets, without the inclusive pixel.

  As in the released code: a box whose corners are swapped counts as empty, and
  1e-7 is added to union and hull.

  Args:
    boxes, targets: [..., 4].

  Returns:
    [...].
  """
  boxes = jnp.concatenate([boxes[..., :2], jnp.maximum(boxes[..., :2],
                                                       boxes[..., 2:])], -1)
  overlap = box_ops.intersection(boxes, targets)
  union = box_ops.area(boxes) + box_ops.area(targets) - overlap + _EPSILON
  hull = jnp.prod(jnp.maximum(boxes[..., 2:], targets[..., 2:])
                  - jnp.minimum(boxes[..., :2], targets[..., :2]),
                  -1) + _EPSILON
  return 1 - overlap / union + (hull - union) / hull


def centerness(boxes, anchors):
  """How central the anchors' centres lie in boxes that contain them, [0, 1].

  sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of the distances to the
  four sides (FCOS; Tian et al., ICCV 2019); 0 outside of the box.
  """
  point = center(anchors)
  before, after = point - boxes[..., :2], boxes[..., 2:] - point
  nearer, farther = jnp.minimum(before, after), jnp.maximum(before, after)
  inside = (nearer > 0).all(-1)
  share = jnp.prod(jnp.where(inside[..., None], nearer, 0.)
                   / jnp.where(inside[..., None], farther, 1.), -1)
  return jnp.sqrt(share)
