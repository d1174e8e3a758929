"""Grounding: where the phrases of a text are (FIBER's fine stage, GLIP).

Each anchor learns the box that ATSS assigns to it, or that it has none. Three
losses: a focal loss over the tokens of the text, 1 - GIoU of the boxes weighted
by their centerness, and the centerness itself. An image without boxes is
trained to find nothing.

Sums are divided by totals of the global batch: the number of positive anchors
(at least 1) or the sum of their centerness. The released code averages both
over devices, which is the same. It also skips a device's batch that has too few
boxes; we skip nothing.
"""
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.ops import atss
from e2e_vlp_jax.ops import pixel_boxes


@dataclasses.dataclass(frozen=True)
class Objective:
  """The three losses; batches have one text an image.

  Attributes:
    token_weight, box_weight, centerness_weight: loss weights.
    alpha, gamma: of the focal loss.
    nearest: candidates of a box on each level, see `atss.assign`.
    last_token_is_none: anchors without a box have the last token as target, as
      in the released code. It matters only for texts that fill all tokens.
    mesh, batch_axes: set by the training code, for assignment per shard.
  """
  requests: ClassVar = {'joint': ('grounding',)}
  least_weight: ClassVar = {'token': 1., 'centerness': 1.}
  token_weight: float = 1.
  box_weight: float = 2.
  centerness_weight: float = 1.
  alpha: float = .25
  gamma: float = 2.
  nearest: int = 9
  last_token_is_none: bool = True
  mesh: Any = None
  batch_axes: tuple[str, ...] = ()

  def check(self, config, model):
    """UserError unless a row has exactly one text."""
    del model
    if config.data.sentences != 1:
      raise errors.UserError(
          f'data.sentences: {config.data.sentences}; objective grounding '
          'trains one text an image, expected data.sentences=1')

  def __call__(self, outputs, batch):
    out = outputs['joint']
    code, logits, center = (out[k][:, 0].astype(jnp.float32) for k in (
        'box_code', 'token_logits', 'centerness'))
    levels = [out['anchors'][k][:, 0] for k in sorted(out['anchors'])]
    rows = batch['valid'] & batch.get('task_mask/grounding', True)
    size = jnp.stack([batch['image_mask'].any(2).sum(1),
                      batch['image_mask'].any(1).sum(1)], -1)
    boxes = pixel_boxes.from_relative(batch['boxes'],
                                      size[:, None].astype(jnp.float32))
    mask = batch['box_mask'] & rows[:, None]
    owner = atss.assign(levels, boxes, mask, self.nearest, self.mesh,
                        self.batch_axes)
    positive = owner >= 0
    target = jnp.take_along_axis(boxes, jnp.maximum(owner, 0)[..., None], 1)
    anchors = jnp.concatenate(levels, 1)
    # Where there is no box, an anchor is its own, so that all stays finite.
    target = jnp.where(positive[..., None], target, anchors)
    central = jnp.where(positive, pixel_boxes.centerness(target, anchors), 0.)
    apart = pixel_boxes.giou_loss(pixel_boxes.decode(code, anchors), target)
    count = jnp.sum(positive.astype(jnp.float32))
    losses = {
        'token': (self.token_weight * self._tokens(logits, owner, rows, batch),
                  count),
        'box_giou': (self.box_weight * jnp.sum(apart * central),
                     jnp.sum(central)),
        'centerness': (self.centerness_weight * jnp.sum(
            jnp.where(positive, _cross_entropy(center, central), 0.)), count)}
    return losses, _metrics(owner, apart, mask)

  def _tokens(self, logits, owner, rows, batch):
    """Sum of the focal loss over every anchor and real token.

    Args:
      logits: [B, A, L].
      owner: [B, A] from `atss.assign`.
      rows: [B] rows that count.
      batch: has span_mask [B, M, L] and text_mask [B, 1, L].
    """
    spans = batch['span_mask'].astype(jnp.float32)
    none = jnp.zeros(spans.shape[-1]).at[-1].set(
        float(self.last_token_is_none))
    spans = jnp.concatenate([spans, jnp.broadcast_to(
        none, (len(spans), 1, len(none)))], 1)
    target = jnp.take_along_axis(
        spans, jnp.where(owner < 0, spans.shape[1] - 1, owner)[..., None], 1)
    real = batch['text_mask'][:, 0] & rows[:, None]
    loss = focal(logits, target, self.alpha, self.gamma)
    return jnp.sum(loss * real[:, None].astype(jnp.float32))


def focal(logits, target, alpha, gamma):
  """Sigmoid focal loss, elementwise (Lin et al., ICCV 2017)."""
  p = jax.nn.sigmoid(logits)
  found = alpha * (1 - p)**gamma * jax.nn.log_sigmoid(logits)
  missed = (1 - alpha) * p**gamma * jax.nn.log_sigmoid(-logits)
  return -(target * found + (1 - target) * missed)


def _cross_entropy(logits, target):
  """Of a probability, elementwise."""
  return jnp.logaddexp(0., logits) - logits * target


def _metrics(owner, apart, mask):
  """Mean GIoU loss of positives, and the share of boxes without any."""
  positive = owner >= 0
  found = (owner[:, None] == jnp.arange(mask.shape[1])[:, None]).any(-1)
  total = lambda x: jnp.sum(x.astype(jnp.float32))
  return {'box_giou_of_positives': (jnp.sum(jnp.where(positive, 1 - apart,
                                                      0.)), total(positive)),
          'boxes_without_anchor': (total(mask & ~found), total(mask))}
