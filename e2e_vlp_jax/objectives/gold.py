"""GOLD: captions learnt most where the model already agrees (Pang & He, 2021).

Between cross-entropy and CIDEr optimisation in FIBER's recipe. Each token's
cross-entropy is weighted by the model's own probability of it and of what
follows, so that a caption unlike all others counts little.

FIBER takes these probabilities from a copy of the model that is renewed every
1,000 steps; ours are of the model itself, as constants.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.objectives import tokens

DIVISORS = ('tokens', 'padding')


@dataclasses.dataclass(frozen=True)
class Objective:
  """Weighted next-token cross-entropy, mean over the captions.

  Attributes:
    least: the least weight of a token; FIBER's released code has .1.
    divide_by: what a caption's sum is divided by: 'tokens', their number, or
      'padding', the number of positions behind them, as FIBER's released code
      does (probably a slip: it lets short captions count least).
  """
  requests: ClassVar = {'image_only': ('captioning',)}
  least: float = .1
  divide_by: str = 'tokens'

  def check(self, config, model):
    """UserError unless the options are possible."""
    del config, model
    key = 'objective_options.gold'
    if self.divide_by not in DIVISORS:
      raise errors.UserError(f'{key}.divide_by: {self.divide_by!r}'
                             + errors.nearest(self.divide_by, DIVISORS))
    if not 0 <= self.least <= 1:
      raise errors.UserError(f'{key}.least: {self.least}; expected 0 to 1')

  def __call__(self, outputs, batch):
    logits = outputs['image_only']['caption_logits'][:, :, :-1]
    labels = batch['text'][:, :, 1:]
    valid = (batch['text_mask'][:, :, 1:]
             & batch['task_mask/captioning'][:, None, None])
    logp = tokens.log_likelihood(logits, labels, valid)
    weights = agreement(jax.lax.stop_gradient(jnp.exp(logp)), valid, self.least)
    count = jnp.sum(valid.astype(jnp.float32))
    return {'gold': self.loss(logp, weights, valid)}, {
        'caption_accuracy': tokens.cross_entropy(logits, labels, valid)[1],
        'gold_weight': (jnp.sum(weights * valid), count)}

  def loss(self, logp, weights, valid):
    """(sum over the captions, their number).

    Args:
      logp: [..., T] log-probability of each token.
      weights: [..., T], constants.
      valid: [..., T] bool, which positions have a token.
    """
    length = jnp.sum(valid, -1)
    # FIBER counts one position more, that of the last token's successor.
    behind = valid.shape[-1] + 1 - length
    divisor = behind if self.divide_by == 'padding' else jnp.maximum(length, 1)
    told = -jnp.sum(jnp.where(valid, weights * logp, 0), -1)
    return (jnp.sum(told / divisor),
            jnp.sum((length > 0).astype(jnp.float32)))


def agreement(probabilities, valid, least):
  """[..., T]: p of a token times the mean p from it to the end, or `least`.

  Args:
    probabilities: [..., T], of the caption's tokens.
    valid: [..., T] bool, which positions have a token.
    least: the least weight.
  """
  p = jnp.where(valid, probabilities, 0)
  rest = lambda x: jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)
  mean = rest(p) / jnp.maximum(rest(valid.astype(p.dtype)), 1)
  return jnp.maximum(p * mean, least)
