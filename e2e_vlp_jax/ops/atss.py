"""Which anchor learns which box: ATSS (Zhang et al., CVPR 2020).

For each box, the anchors nearest to its centre on each level are candidates. A
candidate is positive if its IoU reaches mean + standard deviation of all
candidates' IoUs, and if its centre lies inside the box. As in GLIP's code, IoUs
are of inclusive pixels, the deviation is that of a sample, and a box may end
with no anchor.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from e2e_vlp_jax.ops import pixel_boxes

NONE = -1
_INSIDE = .01  # pixels between a positive's centre and the box's sides


@functools.partial(jax.jit, static_argnames=('nearest', 'mesh', 'axes'))
def assign(anchors, boxes, mask, nearest=9, mesh=None, axes=()):
  """The box of each anchor.

  Args:
    anchors: [[B, A_l, 4] of each level], inclusive pixels.
    boxes: [B, M, 4], inclusive pixels.
    mask: [B, M] True where the box is real; others are never assigned.
    nearest: candidates of a box on each level.
    mesh: if given, the batch is split over its axes `axes`, and each device
      assigns its own rows.
    axes: names of mesh axes.

  Returns:
    [B, A] int32: number of the box, or NONE. Of several boxes an anchor takes
    the one with the highest IoU, and of equal ones the first.
  """
  boxes = jax.lax.stop_gradient(boxes).astype(jnp.float32)
  run = jax.vmap(functools.partial(_assign, nearest=nearest))
  if mesh is None or not axes:
    return run(anchors, boxes, mask)
  spec = P(axes)
  return jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec),
                       out_specs=spec, check_vma=False)(anchors, boxes, mask)


def _assign(levels, boxes, mask, nearest):
  """`assign` for one image: boxes [M, 4] -> [A]."""
  anchors = jnp.concatenate(levels)
  index, start = [], 0
  middle = pixel_boxes.center(boxes)[:, None]
  for level in levels:
    away = jnp.linalg.norm(pixel_boxes.center(level) - middle, axis=-1)
    _, near = jax.lax.top_k(-away, min(nearest, len(level)))
    index.append(near + start)
    start += len(level)
  index = jnp.concatenate(index, 1)  # [M, candidates]
  near = anchors[index]
  iou = pixel_boxes.iou(near, boxes[:, None])
  threshold = iou.mean(1) + jnp.std(iou, axis=1, ddof=1)
  point = pixel_boxes.center(near)
  margin = jnp.minimum(point - boxes[:, None, :2], boxes[:, None, 2:] - point)
  positive = ((iou >= threshold[:, None]) & (margin.min(-1) > _INSIDE)
              & mask[:, None])

  # A candidate that is not positive writes out of range, which is dropped.
  slot = jnp.where(positive, index, len(anchors))
  best = jnp.full(len(anchors), -jnp.inf).at[slot].max(iou, mode='drop')
  wins = positive & (iou == best[index])
  number = jnp.broadcast_to(jnp.arange(len(boxes))[:, None], index.shape)
  owner = jnp.full(len(anchors), len(boxes)).at[
      jnp.where(wins, index, len(anchors))].min(number, mode='drop')
  return jnp.where(owner < len(boxes), owner, NONE).astype(jnp.int32)
