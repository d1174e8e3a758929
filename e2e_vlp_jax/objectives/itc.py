"""Image-text contrast over the global batch (CLIP; FIBER's coarse stage).

Every image against all texts and every text against all images, whatever
device they are on. Where the model keeps a queue of past features (ALBEF's
idea; FIBER's released code), these are further candidates, and the other side
of every comparison is a constant, so that each direction trains the side
that asks.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from e2e_vlp_jax import objectives

_MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean of the cross-entropies image -> text and text -> image.

  With S texts an image, a text's rivals are those of other images.

  Attributes:
    unfilled: let the loss see what the queue holds before it is filled, as
      the released code does, whose queue starts as noise.
  """
  requests: ClassVar = {'image_only': ('itc',), 'text_only': ('itc',)}
  unfilled: bool = False

  def check(self, config):
    """UserError where an image would have no rival."""
    objectives.check_rivals(config, 'itc')

  def __call__(self, outputs, batch):
    found = {**outputs['image_only'], **outputs['text_only']}
    image, text = found['image_embedding'], found['text_embedding']
    b, s, _ = text.shape
    there = batch['text_mask'].any(-1)  # [B, S]; a row without takes no part
    others = lambda x: x
    queued = {k: jnp.zeros((0, image.shape[-1])) for k in ('image', 'text')}
    filled = jnp.zeros((0,), bool)
    if 'queue_filled' in found:
      others = jax.lax.stop_gradient
      queued = {k: found[f'{k}_queue'] for k in queued}
      filled = found['queue_filled'] | self.unfilled
    scaled = lambda a, b: found['itc_scale'] * jnp.einsum('...e,ne->...n', a,
                                                          b)
    own = jnp.eye(b, dtype=bool)

    # Text -> image: [B, S, B + Q] candidates.
    logits = jnp.concatenate([scaled(text, others(image)),
                              scaled(text, queued['image'])], -1)
    allowed = jnp.concatenate([there.any(1), filled])
    logits = jnp.where(allowed, logits, _MASKED)
    rows = jnp.broadcast_to(jnp.arange(b)[:, None, None], (b, s, 1))
    true = jnp.take_along_axis(logits, rows, -1)[..., 0]
    to_image = jax.nn.logsumexp(logits, -1) - true
    right_image = true >= logits.max(-1)

    # Image -> text: each text of the image against those of other images.
    logits = scaled(image, others(text).reshape(b * s, -1))
    logits = jnp.where(there.reshape(-1), logits, _MASKED)
    logits = logits.reshape(b, b, s)
    true = jnp.take_along_axis(logits, rows[:, :1], 1)[:, 0]  # [B, S]
    rivals = jnp.where(own[..., None], _MASKED, logits).reshape(b, -1)
    rivals = jnp.concatenate([rivals, jnp.where(
        filled, scaled(image, queued['text']), _MASKED)], -1)
    to_text = jnp.logaddexp(true, jax.nn.logsumexp(
        rivals, -1, keepdims=True)) - true
    right_text = true >= rivals.max(-1, keepdims=True)

    count = jnp.sum(there.astype(jnp.float32))
    total = lambda x: jnp.sum(jnp.where(there, x, 0.))
    return ({'itc': (.5 * total(to_image + to_text), count)},
            {'itc_text_accuracy': (total(right_text), count),
             'itc_image_accuracy': (total(right_image), count)})
