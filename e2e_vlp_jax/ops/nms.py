"""Non-maximum suppression with a fixed number of results."""
import jax
import jax.numpy as jnp

from e2e_vlp_jax.ops import pixel_boxes

NONE = -1


def by_class(boxes, scores, labels, most, threshold=.6):
  """Greedy suppression among boxes of the same label.

  The best box is kept, boxes of its label that overlap it by more than
  `threshold` are dropped, and so on. Each round finds one result, so `most`
  rounds give the best `most` survivors of a full suppression.

  Args:
    boxes: [..., N, 4] inclusive pixels.
    scores: [..., N]; at most 0 = no candidate.
    labels: [..., N] int.
    most: number of results.
    threshold: IoU.

  Returns:
    [..., most] int32: positions of the kept boxes, best first, then NONE. Of
    equal scores the earlier box comes first.
  """
  lead, n = scores.shape[:-1], scores.shape[-1]
  flat = lambda x: x.reshape(-1, n, *x.shape[len(lead) + 1:])
  found = jax.vmap(lambda b, s, l: _one(b, s, l, most, threshold))(
      flat(boxes), flat(scores), flat(labels))
  return found.reshape(*lead, most)


def _one(boxes, scores, labels, most, threshold):
  """`by_class` for one image."""
  def keep(k, carry):
    left, kept = carry
    best = jnp.argmax(left)
    there = left[best] > 0
    same = labels == labels[best]
    gone = same & (pixel_boxes.iou(boxes, boxes[best]) > threshold)
    left = jnp.where(gone & there, 0., left).at[best].set(0.)
    return left, kept.at[k].set(jnp.where(there, best, NONE))
  start = (jnp.maximum(scores, 0.).astype(jnp.float32),
           jnp.full(most, NONE, jnp.int32))
  return jax.lax.fori_loop(0, most, keep, start)[1].astype(jnp.int32)
