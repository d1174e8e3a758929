"""Image-text matching: does this text belong to this image?"""
import dataclasses

from e2e_vlp_jax import objectives
from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean two-way cross-entropy over the pairs of the global batch.

  Attributes:
    view: the view whose pairs are classified. A view that makes its own pairs
      ('hard_negative') also makes their labels (`itm_labels`). For other views
      the input pipeline has swapped texts.
  """
  view: str = 'joint_masked'

  def check(self, config, model):
    """UserError if there would be no negative pair."""
    if self.view == 'hard_negative':
      objectives.check_negatives(config, model, 'itm')

  @property
  def requests(self):
    return {self.view: ('itm',)}

  def __call__(self, outputs, batch):
    outputs = outputs[self.view]
    # [B, P]: 1 = true pair, 0 = swapped, -1 = no pair.
    labels = outputs.get('itm_labels', batch['itm_labels'])
    valid = (labels >= 0) & batch['task_mask/itm'][:, None]
    loss, accuracy = tokens.cross_entropy(outputs['itm_logits'], labels,
                                          valid)
    return {'itm': loss}, {'itm_accuracy': accuracy}
