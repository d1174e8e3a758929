"""Whether a statement about one or two images is true, as a class."""
import dataclasses
from typing import ClassVar

from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean cross-entropy over the statements of the global batch.

  As in SOHO (from memory of the paper) and FIBER. Statements without a label do
  not count.
  """
  requests: ClassVar = {'pair': ('reason',)}

  def __call__(self, outputs, batch):
    loss, accuracy = tokens.cross_entropy(
        outputs['pair']['reason_logits'], batch['statement_labels'],
        (batch['statement_labels'] >= 0) & batch['task_mask/reason'][:, None])
    return {'reason': loss}, {'reason_accuracy': accuracy}
