"""Warm start of a trunk: classify the object that covers each grid cell.

Replaces the ImageNet weights that the papers start from, in runs that train
from scratch. Our addition; not part of any paper.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from e2e_vlp_jax.ops import boxes as box_ops


@dataclasses.dataclass(frozen=True)
class Objective:
  """Class and attributes of the smallest box over each cell's center.

  Attributes:
    background_weight: weight of cells that no box covers.
  """
  requests: ClassVar = {'grid': ('grid_classes',)}
  background_weight: float = .3

  def __call__(self, outputs, batch):
    outputs = outputs['grid']
    xy = outputs['grid_xy'][:, :, None]  # [B, N, 1, 2]
    true = box_ops.to_xyxy(batch['boxes'])[:, None]  # [B, 1, M, 4]
    mask = batch['box_mask'] & batch['task_mask/detection'][:, None]
    inside = jnp.all((xy >= true[..., :2]) & (xy <= true[..., 2:]), -1)
    inside = inside & mask[:, None]  # [B, N, M]
    size = jnp.where(inside, box_ops.area(true), jnp.inf)
    owner = jnp.argmin(size, -1)  # [B, N]
    covered = inside.any(-1)
    logits = outputs['grid_logits']
    labels = jnp.take_along_axis(batch['box_labels'], owner, 1)
    labels = jnp.where(covered, labels, logits.shape[-1] - 1)
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, labels[..., None], -1)[..., 0]
    valid = outputs['grid_mask'] & batch['task_mask/detection'][:, None]
    weight = jnp.where(covered, 1., self.background_weight) * valid
    losses = {'grid_class': (jnp.sum(nll * weight),
                             jnp.sum(weight))}
    right = (jnp.argmax(logits, -1) == labels) & covered & valid
    metrics = {'grid_accuracy': (
        jnp.sum(right.astype(jnp.float32)),
        jnp.sum((covered & valid).astype(jnp.float32)))}

    if 'grid_attributes' not in outputs:
      return losses, metrics
    attributes = jnp.take_along_axis(batch['box_attributes'],
                                     owner[..., None], 1)  # [B, N, K]
    has = (attributes >= 0) & (covered & valid)[..., None]
    logp = jax.nn.log_softmax(outputs['grid_attributes'])
    picked = jnp.take_along_axis(logp, jnp.maximum(attributes, 0), -1) * has
    nll = -picked.sum(-1) / jnp.maximum(has.sum(-1), 1)
    losses['grid_attributes'] = (
        jnp.sum(nll), jnp.sum(has.any(-1).astype(jnp.float32)))
    return losses, metrics
