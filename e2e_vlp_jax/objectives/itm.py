"""Image-text matching: does this text belong to this image?"""
import dataclasses
from typing import ClassVar

from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean two-way cross-entropy over the pairs of the global batch."""
  requests: ClassVar = {'joint_masked': ('itm',)}

  def __call__(self, outputs, batch):
    labels = batch['itm_labels']  # [B, S], 1 true pair, 0 swapped, -1 none
    valid = (labels >= 0) & batch['task_mask/itm'][:, None]
    loss, accuracy = tokens.cross_entropy(
        outputs['joint_masked']['itm_logits'], labels, valid)
    return {'itm': loss}, {'itm_accuracy': accuracy}
