"""Whether an image entails a text, as a class."""
import dataclasses
from typing import ClassVar

from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean cross-entropy over the texts of the global batch.

  Texts without a label do not count.
  """
  requests: ClassVar = {'joint': ('entail',)}

  def __call__(self, outputs, batch):
    labels = batch['entailment_labels']
    loss, accuracy = tokens.cross_entropy(
        outputs['joint']['entail_logits'], labels,
        (labels >= 0) & batch['task_mask/entail'][:, None])
    return {'entail': loss}, {'entail_accuracy': accuracy}
