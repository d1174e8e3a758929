"""Masked visual modelling: predict the code of hidden cells (SOHO, 3.3).

The model itself chooses the hidden cells, since they depend on its codes.
"""
import dataclasses
from typing import ClassVar

from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean cross-entropy over hidden cells of the global batch.

  0 if nothing is hidden. Mismatched pairs count, too (as in the released code),
  because the codes of an image do not depend on its text.
  """
  requests: ClassVar = {'joint_masked': ('mvm',)}

  def __call__(self, outputs, batch):
    outputs = outputs['joint_masked']
    labels = outputs['mvm_labels']  # [B, S, N], -1 = not predicted
    # An image without text has no pair.
    valid = (labels >= 0) & (batch['itm_labels'] >= 0)[..., None]
    loss, accuracy = tokens.cross_entropy(outputs['mvm_logits'], labels,
                                          valid)
    usage = {k: (v, 1.) for k, v in outputs.items()
             if k.startswith('codebook_')}
    return {'mvm': loss}, {'mvm_accuracy': accuracy, **usage}
