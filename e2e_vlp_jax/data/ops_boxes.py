"""Objects of a record -> padded boxes, class ids and attribute ids."""
import numpy as np

from e2e_vlp_jax.data import ops_randaug
from e2e_vlp_jax.errors import UserError


def boxes(context, drop_unknown=False):
  """The boxes that are seen through the window that `fit` shows.

  Boxes are clipped to the window; those of no area there, crowds and NaNs
  are dropped. Of more than M the largest M stay, in the record's order; of
  more than K attributes the first K.

  Reads objects, has_boxes, has_attributes; window, flipped. Makes boxes
  float32 [M,4] (cx, cy, w, h of the unpadded picture), box_labels int32 [M],
  box_attributes int32 [M,K] (-1 padding), box_mask bool [M],
  task_mask/detection, task_mask/attributes.

  Args:
    context: M, K and the label space.
    drop_unknown: drop objects and attributes whose name the label space
      lacks. Without it they raise a UserError.
  """
  m, k = context.max_boxes, context.max_attributes

  def ids(look_up, names):
    found = []
    for name in names:
      try:
        found.append(look_up(name))
      except UserError:
        if not drop_unknown:
          raise
        found.append(-1)
    return found

  def apply(example):
    if 'window' not in example:
      raise UserError('pp: decode must stand before boxes')
    if 'augment' in example:
      raise UserError(ops_randaug.NO_BOXES)
    objects = [o for o in example['objects'] if not o['is_crowd']]
    corners = np.array([o['bbox'] for o in objects], float).reshape(-1, 4)
    size = (example['height'], example['width'])
    y, x, h, w = example['window']
    corners = np.clip((corners * [*size, *size] - [y, x, y, x])
                      / np.maximum([h, w, h, w], 1), 0, 1)
    if example['flipped']:
      corners = corners[:, [0, 3, 2, 1]]
      corners[:, [1, 3]] = 1 - corners[:, [1, 3]]
    y0, x0, y1, x1 = corners.T
    labels = np.array(ids(context.labels.class_id,
                          [o['label'] for o in objects]), int)
    area = (y1 - y0) * (x1 - x0)
    # A NaN fails every comparison.
    keep = np.flatnonzero((y1 > y0) & (x1 > x0) & (area > 0) & (labels >= 0))
    if len(keep) > m:
      keep = np.sort(keep[np.argsort(-area[keep], kind='stable')[:m]])
    n = len(keep)

    out = np.zeros((m, 4), np.float32)
    out[:n] = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0],
                       -1)[keep]
    box_labels = np.zeros(m, np.int32)
    box_labels[:n] = labels[keep]
    attributes = np.full((m, k), -1, np.int32)
    for row, number in enumerate(keep):
      known = [a for a in ids(context.labels.attribute_id,
                              objects[number]['attributes']) if a >= 0][:k]
      attributes[row, :len(known)] = known
    has_boxes = example['has_boxes']
    return {
        **example, 'boxes': out, 'box_labels': box_labels,
        'box_attributes': attributes, 'box_mask': np.arange(m) < n,
        'task_mask/detection': has_boxes,
        'task_mask/attributes': has_boxes and example['has_attributes'],
    }
  return apply


OPS = {'boxes': boxes}
