"""CIDEr optimisation: self-critical sequence training (Rennie et al., 2017).

Before each step, `evaluation/sampled_captions.py` draws captions of the batch's
images from the current model, appends them to `batch['text']` and compares
their CIDEr with a baseline: `batch['advantages']`. The step itself is a pure
function of that batch. It makes captions more likely that are better than the
baseline, and others less likely.
"""
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.objectives import tokens

BASELINES = ('greedy', 'others', 'constant')


@dataclasses.dataclass(frozen=True)
class Objective:
  """-(advantage x mean log-probability of the tokens), mean over the samples.

  Attributes:
    samples: number of captions drawn for each image.
    baseline: what a caption's CIDEr is compared with: 'greedy', that of the
      caption of the likeliest tokens (Rennie et al.); 'others', the mean of
      the image's other samples; 'constant', 1 (FIBER's released code).
    scale: factor of this loss. FIBER adds up the samples of an image, and
      counts CIDEr in percent: 100 x samples.
    truth: share of the cross-entropy of the true captions, in [0, 1); the loss
      above has the rest.
  """
  requests: ClassVar = {'image_only': ('captioning',)}
  feeder: ClassVar = 'sampled_captions'
  samples: int = 5
  baseline: str = 'others'
  scale: float = 1.
  truth: float = 0.

  def check(self, config, model):
    """UserError unless the options and the data fit."""
    del model
    key = 'objective_options.self_critical'
    if self.baseline not in BASELINES:
      raise errors.UserError(f'{key}.baseline: {self.baseline!r}'
                             + errors.nearest(self.baseline, BASELINES))
    least = 2 if self.baseline == 'others' else 1
    if self.samples < least:
      raise errors.UserError(
          f'{key}.samples: {self.samples}; expected at least {least} with '
          f'baseline={self.baseline!r}')
    if not 0 <= self.truth < 1:
      raise errors.UserError(f'{key}.truth: {self.truth}; expected at least 0 '
                             'and less than 1')
    if config.data.get('unit', 'image') != 'image':
      raise errors.UserError(
          f'data.unit: {config.data.unit!r}; self_critical compares the '
          "captions of a whole image, expected 'image'")

  def placeholder(self, batch):
    """A batch [B, S, L] with room for what the feeder adds, to compile with.

    Args:
      batch: numpy arrays.
    """
    def longer(x):
      shape = len(x), self.samples, *x.shape[2:]
      return np.concatenate([x, np.zeros(shape, x.dtype)], 1)
    zeros = np.zeros((len(batch['text']), self.samples), np.float32)
    return {**batch, 'text': longer(batch['text']),
            'text_mask': longer(batch['text_mask']), 'advantages': zeros,
            'rewards': zeros}

  def __call__(self, outputs, batch):
    logits = outputs['image_only']['caption_logits'][:, :, :-1]
    labels = batch['text'][:, :, 1:]
    # Rows without captions have no reward, either.
    valid = (batch['text_mask'][:, :, 1:]
             & batch['task_mask/captioning'][:, None, None])
    drawn = -self.samples
    told = _likelihood(logits[:, drawn:], labels[:, drawn:], valid[:, drawn:])
    count = jnp.sum(valid[:, drawn:].any(-1).astype(jnp.float32))
    loss = -jnp.sum(batch['advantages'] * told)
    losses = {'policy': ((1 - self.truth) * self.scale * loss, count)}
    if self.truth:
      total, weight = tokens.cross_entropy(
          logits[:, :drawn], labels[:, :drawn], valid[:, :drawn])[0]
      losses['truth'] = self.truth * total, weight
    counts = valid[:, drawn:].any(-1)
    return losses, {'sampled_cider': (jnp.sum(batch['rewards'] * counts),
                                      count)}


def _likelihood(logits, labels, valid):
  """[..., T, V] -> [...]: mean log-probability of the valid tokens."""
  logp = tokens.log_likelihood(logits, labels, valid)
  return (jnp.sum(jnp.where(valid, logp, 0), -1)
          / jnp.maximum(jnp.sum(valid, -1), 1))
