"""Masked language modelling on true image-text pairs (Devlin et al. 2019)."""
import dataclasses
from typing import ClassVar

from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean cross-entropy over masked tokens of the global batch.

  Mismatched pairs have no labels, since an image does not help to predict the
  words of a text about another one (usual practice; not in the paper).
  """
  requests: ClassVar = {'joint_masked': ('mlm',)}

  def __call__(self, outputs, batch):
    labels = batch['mlm_labels']  # [B, S, L], -1 = not predicted
    valid = (labels >= 0) & batch['task_mask/mlm'][:, None, None]
    loss, accuracy = tokens.cross_entropy(
        outputs['joint_masked']['mlm_logits'], labels, valid)
    return {'mlm': loss}, {'mlm_accuracy': accuracy}
