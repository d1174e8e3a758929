"""Visual question answering as classification with soft targets."""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Objective:
  """Binary cross-entropy, summed over answers, mean over questions.

  This is the mean over answers times their number, as in SOHO and FIBER (after
  Kim et al., Bilinear Attention Networks, NeurIPS 2018). Questions without an
  answer in the list do not count: FIBER leaves them out of its data; SOHO's
  treatment is not published.

  The metric is the mean score of the most likely answer. It is close to the
  official accuracy, which averages over nine of the ten people.
  """
  requests: ClassVar = {'joint': ('answer',)}

  def __call__(self, outputs, batch):
    logits = outputs['joint']['answer_logits']  # [B, P, A]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    ids, scores = batch['answer_ids'], batch['answer_scores']  # [B, S, K]
    known = ids >= 0
    counts = jnp.any(known, -1) & batch['task_mask/answer'][:, None]
    scores = jnp.where(known, scores, 0)
    # The loss is softplus(x) - target * x; most targets are 0.
    wanted = jnp.take_along_axis(logits, jnp.where(known, ids, 0), -1)
    loss = (jnp.sum(jax.nn.softplus(logits), -1)
            - jnp.sum(scores * wanted, -1))
    best = jnp.argmax(logits, -1)[..., None]
    accuracy = jnp.sum(jnp.where(ids == best, scores, 0), -1)
    total = jnp.sum(counts.astype(jnp.float32))
    return ({'answer': (jnp.sum(loss * counts), total)},
            {'answer_accuracy': (jnp.sum(accuracy * counts), total)})
