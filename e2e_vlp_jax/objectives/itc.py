"""Image-text contrast over the global batch (CLIP; FIBER's coarse stage).

It contrasts every image with all texts and every text with all images, across
devices. If the model keeps a queue of past features (as in ALBEF and FIBER's
released code), these are additional candidates. Gradients then do not flow into
the candidates: image -> text trains the image side, text -> image the text
side.

With S texts per image the two directions differ. A text has one right image
among the B images. An image has S right texts: each of them in turn competes
with the texts of other images only, so that they do not compete with each
other.
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

  Attributes:
    unfilled: include the noise with which the queue starts, as the released
      code does.
  """
  requests: ClassVar = {'image_only': ('itc',), 'text_only': ('itc',)}
  unfilled: bool = False

  def check(self, config, model):
    """UserError if an image would have no negative."""
    objectives.check_negatives(config, model, 'itc')

  def __call__(self, outputs, batch):
    found = {**outputs['image_only'], **outputs['text_only']}
    image, text = found['image_embedding'], found['text_embedding']
    b, s, _ = text.shape
    valid = batch['text_mask'].any(-1)  # [B, S]; False: no text, no loss
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
    allowed = jnp.concatenate([valid.any(1), filled])
    logits = jnp.where(allowed, logits, _MASKED)
    rows = jnp.broadcast_to(jnp.arange(b)[:, None, None], (b, s, 1))
    true = jnp.take_along_axis(logits, rows, -1)[..., 0]
    to_image = jax.nn.logsumexp(logits, -1) - true
    right_image = true >= logits.max(-1)

    # Image -> text: each text of the image against those of other images.
    logits = scaled(image, others(text).reshape(b * s, -1))
    logits = jnp.where(valid.reshape(-1), logits, _MASKED)
    logits = logits.reshape(b, b, s)
    true = jnp.take_along_axis(logits, rows[:, :1], 1)[:, 0]  # [B, S]
    negatives = jnp.where(own[..., None], _MASKED, logits).reshape(b, -1)
    negatives = jnp.concatenate([negatives, jnp.where(
        filled, scaled(image, queued['text']), _MASKED)], -1)
    to_text = jnp.logaddexp(true, jax.nn.logsumexp(
        negatives, -1, keepdims=True)) - true
    right_text = true >= negatives.max(-1, keepdims=True)

    count = jnp.sum(valid.astype(jnp.float32))
    total = lambda x: jnp.sum(jnp.where(valid, x, 0.))
    return ({'itc': (.5 * total(to_image + to_text), count)},
            {'itc_text_accuracy': (total(right_text), count),
             'itc_image_accuracy': (total(right_image), count)})
