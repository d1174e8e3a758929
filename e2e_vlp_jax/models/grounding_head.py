"""The head of FIBER's fine stage: boxes, and which tokens of a text they are.

Classes are not weights but tokens: the logit of a location and a token is the
product of the location's features and the token's projected state. A label (a
phrase of a caption, or a class name in a list of names) is a set of tokens.
"""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax.ops import nms
from e2e_vlp_jax.ops import pixel_boxes

_SMALL = nn.initializers.normal(.01)
_PRIOR = .01  # probability of a token at the start, as in RetinaNet
_LARGEST = 5e4  # of a logit
_SMALLEST_NORM = 1e-12


class Grounding(nn.Module):
  """Boxes, centerness and token logits of every location of a pyramid.

  Attributes:
    width: channels of the pyramid.
    levels: of the pyramid.
  """
  width: int
  levels: int = 5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, levels, text):
    """One text for each image.

    Args:
      levels: [[B, h, w, C] of each level], finest first.
      text: [B, L, D] states of the tokens, zero where there is none.

    Returns:
      float32, A = locations of all levels, row by row: token_logits [B, A, L],
      box_code [B, A, 4] (see `pixel_boxes.decode`), centerness [B, A] logits.
    """
    boxes = nn.Dense(4, kernel_init=_SMALL, name='boxes')
    center = nn.Dense(1, kernel_init=_SMALL, name='centerness')
    scales = self.param('scales', nn.initializers.ones, (self.levels,))
    flat = [x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
            for x in levels]
    code = [boxes(x) * scale for x, scale in zip(flat, scales)]
    x = jnp.concatenate(flat, 1)
    return {'token_logits': self._tokens(x, text.astype(jnp.float32)),
            'box_code': jnp.concatenate(code, 1),
            'centerness': center(x)[..., 0]}

  def _tokens(self, x, text):
    """[B, A, C], [B, L, D] -> logits [B, A, L]."""
    d = text.shape[-1]
    log_scale = self.param('log_scale', nn.initializers.zeros, (1,))
    weight = self.param('token_bias', nn.initializers.zeros, (d,))
    bias = self.param('bias', nn.initializers.constant(
        -math.log((1 - _PRIOR) / _PRIOR)), (1,))
    # Padding is zero; the square root has no gradient there.
    square = (text * text).sum(-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, _SMALLEST_NORM**2))
    text = text / norm
    token = nn.Dense(self.width, name='text_projection')(text / 2)
    logits = jnp.einsum('bac,blc->bal', x, token) / jnp.exp(log_scale)
    logits = logits + (text @ weight + bias)[:, None]
    return jnp.clip(logits, -_LARGEST, _LARGEST)


def objects(outputs, tokens, size, *, threshold=.05, candidates=1000,
            iou=.6, most=100):
  """Arrays of the head `grounding` -> scored boxes of labels.

  A label's score at a location is the mean probability of its tokens. Of each
  level, the pairs of location and label with a score above `threshold` are
  candidates, of which the best `candidates` by score x centerness stay. Their
  boxes are decoded and clipped to the image, boxes of the same label that
  overlap a better one are dropped, and the best `most` are left.

  All shapes are static, so it can be jitted; it works in float32. The released
  settings are the defaults for detection (LVIS: most=300 for each 40 names);
  for a phrase or an expression they are threshold=0, candidates=3000.

  Args:
    outputs: of the view `joint`, head `grounding`, for P texts an image:
      token_logits [B, P, A, L], box_code [B, P, A, 4], centerness [B, P, A],
      anchors {level: [B, P, A_l, 4]}, canvas pixels.
    tokens: [..., C, L] bool or 0/1, which tokens of the text belong to each of
      C labels; broadcasts to [B, P, C, L]. A label without tokens is never
      found, so unused rows are padding.
    size: [B, 2] height and width of the real image on the canvas, in pixels;
      see `image_size`.
    threshold: least score of a candidate, before centerness.
    candidates: most candidates of a level.
    iou: overlap, in inclusive pixels, above which a box is dropped.
    most: number of results K.

  Returns:
    dict, best first: boxes [B, P, K, 4] (x0, y0, x1, y1), relative to the real
    image, in [0, 1]; scores [B, P, K], sqrt(score x centerness); labels
    [B, P, K] int32, numbers of rows of `tokens`. Where nothing more was found
    the label is -1, the score 0, the box 0.
  """
  found = _candidates(outputs, tokens, size, threshold, candidates)
  keep = nms.by_class(found['boxes'], found['scores'], found['labels'], most,
                      iou)
  there = keep >= 0
  at = jnp.maximum(keep, 0)
  pick = lambda x: jnp.take_along_axis(x, at, -1)
  boxes = pixel_boxes.to_relative(
      jnp.take_along_axis(found['boxes'], at[..., None], -2),
      size[:, None, None])
  return {'boxes': jnp.where(there[..., None], boxes, 0.),
          'scores': jnp.where(there, pick(found['scores']), 0.),
          'labels': jnp.where(there, pick(found['labels']), -1)}


def image_size(mask):
  """[B, H, W] True on real pixels -> [B, 2] float32 height and width."""
  return jnp.stack([mask.any(2).sum(1), mask.any(1).sum(1)],
                   -1).astype(jnp.float32)


def _candidates(outputs, tokens, size, threshold, most):
  """The best pairs of location and label of every level.

  Returns:
    dict of boxes [B, P, N, 4] (inclusive pixels, clipped), scores (0 = no
    candidate) and labels [B, P, N], the levels one after the other.
  """
  tokens = tokens.astype(jnp.float32)
  share = tokens / jnp.maximum(tokens.sum(-1, keepdims=True), 1.)
  probability = jax.nn.sigmoid(outputs['token_logits'].astype(jnp.float32))
  scores = jnp.einsum('...al,...cl->...ac', probability, share,
                      precision='highest')
  center = jax.nn.sigmoid(outputs['centerness'].astype(jnp.float32))
  ranked = jnp.where(scores > threshold, scores * center[..., None], 0.)
  found, start = [], 0
  for name in sorted(outputs['anchors']):
    anchors = outputs['anchors'][name]
    stop = start + anchors.shape[-2]
    level = ranked[..., start:stop, :]
    level = level.reshape(*level.shape[:-2], -1)
    best, index = jax.lax.top_k(level, min(most, level.shape[-1]))
    place, label = index // scores.shape[-1], index % scores.shape[-1]
    at = lambda x, place=place: jnp.take_along_axis(x, place[..., None], -2)
    boxes = pixel_boxes.decode(
        at(outputs['box_code'][..., start:stop, :].astype(jnp.float32)),
        at(anchors))
    found.append({'boxes': pixel_boxes.clip(boxes, size[:, None, None]),
                  'scores': jnp.sqrt(best), 'labels': label})
    start = stop
  return {k: jnp.concatenate([level[k] for level in found],
                             -2 if k == 'boxes' else -1) for k in found[0]}
