"""The one box that an expression means, among those of the object queries.

As in MDETR (Kamath et al., ICCV 2021), the decoder's queries read the image
with the expression. One object is meant, so the Hungarian assignment is the
query of least cost, and the class loss is a softmax over queries (our choice;
MDETR scores queries by the tokens of the expression). The weights of boxes are
DETR's.
"""
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from e2e_vlp_jax.ops import boxes as box_ops


@dataclasses.dataclass(frozen=True)
class Objective:
  """Cross-entropy over queries, L1 and GIoU of the best query of each layer.

  Expressions whose box a crop has removed do not count.

  Attributes:
    query_weight, box_weight, giou_weight: loss weights.
    cost_query: weight of the negative probability in the cost of a query; the
      boxes' terms have the weights of their losses.
    aux: also train the boxes of the layers before the last.
  """
  requests: ClassVar = {'grounded': ('boxes', 'refer')}
  query_weight: float = 1.
  box_weight: float = 5.
  giou_weight: float = 2.
  cost_query: float = 1.
  aux: bool = True

  def __call__(self, outputs, batch):
    outputs = outputs['grounded']
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    boxes = wide(outputs['pred_boxes'])[:, :, None]  # [B, P, layers, Q, 4]
    if self.aux:
      boxes = jnp.concatenate([boxes, wide(outputs['aux_boxes'])], 2)
    logp = jax.nn.log_softmax(wide(outputs['refer_logits'])[..., 0])
    true = batch['referred_box'][:, :, None, None]
    l1 = jnp.abs(boxes - true).sum(-1)
    giou = 1 - box_ops.generalized_iou(box_ops.to_xyxy(boxes),
                                       box_ops.to_xyxy(true))
    losses = self.box_weight * l1 + self.giou_weight * giou
    best = jnp.argmin(losses - self.cost_query * jnp.exp(logp)[:, :, None], -1)
    of_best = lambda x, k: jnp.take_along_axis(x, k[..., None], -1)[..., 0]
    valid = (batch['valid'] & batch['task_mask/refer']).astype(jnp.float32)
    total = jnp.sum(valid) * true.shape[1]
    mean = lambda x: (jnp.sum(x * valid[:, None]), total)
    chosen = jnp.argmax(logp, -1)
    iou, _ = box_ops.iou_and_union(
        box_ops.to_xyxy(boxes[:, :, 0]), box_ops.to_xyxy(true[:, :, 0]))
    return ({'query': mean(-self.query_weight * of_best(logp, best[:, :, 0])),
             'box': mean(self.box_weight * of_best(l1, best).sum(-1)),
             'giou': mean(self.giou_weight * of_best(giou, best).sum(-1))},
            {'refer_accuracy': mean((of_best(iou, chosen) >= .5).astype(
                jnp.float32))})
