"""Image-to-text generation, teacher-forced (E2E-VLP's ITG).

The memory comes from the image-only view, so that the decoder cannot copy the
caption from its memory.
"""
import dataclasses
from typing import ClassVar

from e2e_vlp_jax.objectives import tokens


@dataclasses.dataclass(frozen=True)
class Objective:
  """Mean next-token cross-entropy over caption tokens (end token included)."""
  requests: ClassVar = {'image_only': ('captioning',)}

  def __call__(self, outputs, batch):
    labels = batch['text'][:, :, 1:]
    valid = (batch['text_mask'][:, :, 1:]
             & batch['task_mask/captioning'][:, None, None])
    loss, accuracy = tokens.cross_entropy(
        outputs['image_only']['caption_logits'][:, :, :-1], labels, valid)
    return {'captioning': loss}, {'caption_accuracy': accuracy}
