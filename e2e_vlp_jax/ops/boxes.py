"""Box geometry in pure JAX. Boxes are float arrays [..., 4].

cxcywh: centre and size; xyxy: left, top, right, bottom. Coordinates are
relative to the unpadded image unless a docstring says otherwise.
"""
import jax.numpy as jnp


def to_xyxy(boxes):
  """(cx, cy, w, h) -> (x0, y0, x1, y1)."""
  center, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([center - half, center + half], -1)


def to_cxcywh(boxes):
  """(x0, y0, x1, y1) -> (cx, cy, w, h)."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], -1)


def area(boxes):
  """Area of xyxy boxes, [...]."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a, b):
  """Area of the overlap of xyxy boxes that broadcast against each other."""
  low = jnp.maximum(a[..., :2], b[..., :2])
  high = jnp.minimum(a[..., 2:], b[..., 2:])
  return jnp.prod(jnp.maximum(high - low, 0), -1)


def iou_and_union(a, b):
  """IoU and union of xyxy boxes that broadcast against each other.

  Empty unions (two degenerate boxes) give IoU 0, not NaN.
  """
  overlap = intersection(a, b)
  union = area(a) + area(b) - overlap
  return overlap / jnp.where(union > 0, union, 1), union


def generalized_iou(a, b):
  """GIoU (Rezatofighi et al., CVPR 2019) of xyxy boxes that broadcast."""
  iou, union = iou_and_union(a, b)
  low = jnp.minimum(a[..., :2], b[..., :2])
  high = jnp.maximum(a[..., 2:], b[..., 2:])
  hull = jnp.prod(jnp.maximum(high - low, 0), -1)
  return iou - (hull - union) / jnp.where(hull > 0, hull, 1)
