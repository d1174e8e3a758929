"""Set prediction of objects: class, attributes and box (DETR + attributes).

Carion et al., ECCV 2020 for matching and losses; E2E-VLP adds the attribute
term. Attribute targets are spread evenly over an object's attributes; for a
single attribute this is the paper's negative log-likelihood. Objects without
attribute labels (COCO) are left out of that term.

Crowds (COCO's `iscrowd`, one box around many objects) are not targets. DETR
drops them when it reads its training data, so a query that finds a member of a
crowd is trained towards "no object"; this is also our default. If the batch has
`crowd_boxes` and `crowd_mask` (pp `boxes(crowds=C)`), an unmatched query that
lies on a crowd is left out of the class loss, as COCO's evaluation ignores its
detection.
"""
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from e2e_vlp_jax.ops import boxes as box_ops
from e2e_vlp_jax.ops import matching

# A query belongs to a crowd if at least this share of its box lies on it.
# COCO's evaluation uses its IoU thresholds, of which this is the lowest.
_ON_CROWD = .5


@dataclasses.dataclass(frozen=True)
class Objective:
  """Hungarian matching on the device, then the losses of matched queries.

  Attributes:
    class_weight, box_weight, giou_weight, attribute_weight: loss weights.
    no_object: weight of the no-object class in the cross-entropy.
    cost_class, cost_box, cost_giou: weights of the matching cost. The class
      cost is the negative probability; attributes are not part of the cost.
    aux: repeat matching and losses after every decoder layer, summed.
    mesh, batch_axes: set by the training code, for matching per shard.
  """
  requests: ClassVar = {'image_only': ('detection',)}
  class_weight: float = 1.
  box_weight: float = 5.
  giou_weight: float = 2.
  attribute_weight: float = 1.
  no_object: float = .1
  cost_class: float = 1.
  cost_box: float = 5.
  cost_giou: float = 2.
  aux: bool = True
  mesh: Any = None
  batch_axes: tuple[str, ...] = ()

  def __call__(self, outputs, batch):
    outputs = outputs['image_only']
    layers = [outputs] + (list(outputs['aux_outputs']) if self.aux else [])
    # One stack of all layers' problems: a single batched assignment.
    stacked = {k: jnp.stack([layer[k].astype(jnp.float32)
                             for layer in layers], 1)
               for k in layers[0] if k.startswith('pred_')}  # [B, layers, ...]
    mask = batch['box_mask'] & batch['task_mask/detection'][:, None]
    cost = self.cost(stacked, batch)
    index, bad = self._match(cost, mask)
    losses, metrics = self._losses(stacked, index, mask, batch)
    metrics['matching_nonfinite'] = (jnp.sum(bad).astype(jnp.float32), 1.)
    return losses, metrics

  def cost(self, outputs, batch):
    """Matching cost [B, layers, Q, M] of outputs [B, layers, Q, ...]."""
    prob = jax.nn.softmax(outputs['pred_logits'])
    labels = batch['box_labels'][:, None, None, :]
    cost_class = -jnp.take_along_axis(
        prob, jnp.broadcast_to(labels, prob.shape[:3] + labels.shape[-1:]),
        -1)
    pred = outputs['pred_boxes'][:, :, :, None]  # [B, layers, Q, 1, 4]
    true = batch['boxes'][:, None, None]  # [B, 1, 1, M, 4]
    cost_box = jnp.abs(pred - true).sum(-1)
    cost_giou = -box_ops.generalized_iou(box_ops.to_xyxy(pred),
                                         box_ops.to_xyxy(true))
    return (self.cost_class * cost_class + self.cost_box * cost_box
            + self.cost_giou * cost_giou)

  def _match(self, cost, mask):
    """cost [B, layers, Q, M] -> index [B, layers, M], bad [B, layers]."""
    b, n, q, m = cost.shape
    index, bad = matching.hungarian(
        cost.reshape(b * n, q, m), jnp.repeat(mask, n, axis=0),
        self.mesh, self.batch_axes)
    return index.reshape(b, n, m), bad.reshape(b, n)

  def _losses(self, outputs, index, mask, batch):
    b, n, q, k = outputs['pred_logits'].shape
    m = mask.shape[-1]
    valid = jnp.broadcast_to(mask[:, None], (b, n, m))
    true_labels = jnp.broadcast_to(batch['box_labels'][:, None], (b, n, m))
    # Class targets of all queries: no-object except where matched. Padded
    # targets get an index out of range, so that the scatter drops them.
    slot = jnp.where(valid, index, q)
    rows = jnp.arange(b)[:, None, None], jnp.arange(n)[None, :, None]
    target = jnp.full((b, n, q), k - 1).at[rows + (slot,)].set(
        true_labels, mode='drop')
    logp = jax.nn.log_softmax(outputs['pred_logits'])
    nll = -jnp.take_along_axis(logp, target[..., None], -1)[..., 0]
    weight = jnp.where(target == k - 1, self.no_object, 1.)
    weight = weight * batch['task_mask/detection'][:, None, None]
    if 'crowd_boxes' in batch:
      # The sum of weights below still counts these queries, so that it
      # depends on the batch alone.
      weight = weight * ~(_on_crowd(outputs['pred_boxes'], batch)
                          & (target == k - 1))

    def matched(x):  # [B, layers, Q, D] -> [B, layers, M, D]
      return jnp.take_along_axis(x, index[..., None], 2)
    pred = matched(outputs['pred_boxes'])
    true = jnp.broadcast_to(batch['boxes'][:, None], pred.shape)
    l1 = jnp.abs(pred - true).sum(-1)
    giou = 1 - box_ops.generalized_iou(box_ops.to_xyxy(pred),
                                       box_ops.to_xyxy(true))
    count = jnp.sum(mask.astype(jnp.float32))
    # The weighted mean of a layer's class loss: the weights' sum is the same
    # for every layer, so layers can share one denominator. Written without
    # the matching, it is known before the model runs (accumulation).
    objects = mask.sum(-1)
    weights = jnp.sum(batch['task_mask/detection']
                      * (objects + self.no_object * (q - objects)))
    losses = {
        'class': (self.class_weight * jnp.sum(nll * weight), weights),
        'box': (self.box_weight * jnp.sum(l1 * valid), count),
        'giou': (self.giou_weight * jnp.sum(giou * valid), count),
    }
    right = (jnp.argmax(matched(outputs['pred_logits'])[:, 0, :, :-1], -1)
             == batch['box_labels'])
    metrics = {'class_accuracy': (jnp.sum((right & mask).astype(jnp.float32)),
                                  jnp.sum(mask.astype(jnp.float32)))}
    if 'pred_attributes' in outputs and self.attribute_weight:
      attributes = batch['box_attributes']  # [B, M, K], -1 = none
      has = (attributes >= 0) & (
          mask & batch['task_mask/attributes'][:, None])[..., None]
      logp = jax.nn.log_softmax(matched(outputs['pred_attributes']))
      ids = jnp.broadcast_to(jnp.maximum(attributes, 0)[:, None],
                             (b, n) + attributes.shape[1:])
      picked = jnp.take_along_axis(logp, ids, -1) * has[:, None]
      per_object = has.sum(-1)
      nll = -picked.sum(-1) / jnp.maximum(per_object, 1)[:, None]
      labelled = jnp.sum((per_object > 0).astype(jnp.float32))
      losses['attributes'] = (self.attribute_weight * jnp.sum(nll),
                              labelled)
    return losses, metrics


def _on_crowd(boxes, batch):
  """[B, layers, Q, 4] cxcywh -> [B, layers, Q] whether a box lies on a crowd.

  As in COCO's evaluation, the overlap is divided by the box's own area.
  """
  boxes = box_ops.to_xyxy(boxes)
  crowds = box_ops.to_xyxy(batch['crowd_boxes'])[:, None, None]
  shared = box_ops.intersection(boxes[:, :, :, None], crowds)
  share = shared / jnp.maximum(box_ops.area(boxes), 1e-9)[..., None]
  return ((share >= _ON_CROWD) & batch['crowd_mask'][:, None, None]).any(-1)
