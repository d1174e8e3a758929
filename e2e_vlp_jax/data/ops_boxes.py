"""Objects of a record -> padded boxes, class ids and attribute ids."""
import tensorflow as tf

from e2e_vlp_jax.errors import UserError


def _table(ids):
  """dict of str -> int as string -> int32 table, -1 where unknown."""
  ids = ids or {'': -1}  # a table may not be empty
  return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(
      tf.constant(list(ids)), tf.constant(list(ids.values()))), -1)


def boxes(context, drop_unknown=False):
  """The boxes that are seen through the window that `fit` shows.

  Boxes are clipped to the window; those of no area there, crowds and NaNs
  are dropped. Of more than M the largest M stay, in the record's order.

  Reads boxes float32 [O,4] (ymin, xmin, ymax, xmax), labels string [O],
  attributes string [O,A] ('' padding), is_crowd bool [O], has_boxes,
  has_attributes bool; window, size, flipped.
  Makes boxes [M,4] (cx, cy, w, h of the unpadded image), box_labels [M],
  box_attributes [M,K] (-1 padding), box_mask [M], task_mask/detection,
  task_mask/attributes, unknown_label and unknown_attribute (string: the
  first name that the label space lacks, '' if none).

  Args:
    context: M, K and the label space.
    drop_unknown: drop objects and attributes whose name the label space
      lacks, instead of stopping the run.
  """
  labels = context.labels
  class_table = _table({n: labels.class_id(n) for n in (
      *labels.classes, *labels.class_aliases)})
  attribute_table = _table({n: labels.attribute_id(n) for n in (
      *labels.attributes, *labels.attribute_aliases)})
  m, k = context.max_boxes, context.max_attributes

  def first_unknown(names, ids):
    if drop_unknown:
      return tf.constant('')
    unknown = tf.boolean_mask(names, (ids < 0) & (names != ''))
    return tf.concat([unknown, ['']], 0)[0]

  def apply(example):
    if 'window' not in example:
      raise UserError('pp: decode must stand before boxes')
    size = tf.cast(tf.tile(example['size'], [2]), tf.float32)
    window = tf.cast(example['window'], tf.float32)
    corners = tf.clip_by_value(
        (example['boxes'] * size - tf.tile(window[:2], [2]))
        / tf.tile(window[2:], [2]), 0., 1.)
    y0, x0, y1, x1 = tf.unstack(corners, axis=-1)
    x0, x1 = tf.cond(example['flipped'], lambda: (1 - x1, 1 - x0),
                     lambda: (x0, x1))
    ids = class_table.lookup(example['labels'])
    area = (y1 - y0) * (x1 - x0)
    # A NaN fails every comparison.
    keep = ((y1 > y0) & (x1 > x0) & (area > 0) & (ids >= 0)
            & ~example['is_crowd'])
    area = tf.where(keep, area, -1.)
    count = tf.minimum(tf.reduce_sum(tf.cast(keep, tf.int32)), m)
    order = tf.sort(tf.math.top_k(area, count).indices)
    pad = m - count

    # Known attributes move to the front, in their order.
    names = tf.gather(example['attributes'], order)
    attributes = attribute_table.lookup(names)
    attributes = tf.gather(
        attributes, tf.argsort(tf.cast(attributes < 0, tf.int32), -1,
                               stable=True), batch_dims=1)[:, :k]
    attributes = tf.pad(
        attributes, [[0, pad], [0, k - tf.shape(attributes)[1]]],
        constant_values=-1)

    chosen = tf.gather(tf.stack([(x0 + x1) / 2, (y0 + y1) / 2,
                                 x1 - x0, y1 - y0], -1), order)
    return {
        **example,
        'boxes': tf.ensure_shape(tf.pad(chosen, [[0, pad], [0, 0]]), [m, 4]),
        'box_labels': tf.ensure_shape(
            tf.pad(tf.gather(ids, order), [[0, pad]]), [m]),
        'box_attributes': tf.ensure_shape(attributes, [m, k]),
        'box_mask': tf.range(m) < count,
        'task_mask/detection': example['has_boxes'],
        'task_mask/attributes': (example['has_boxes']
                                 & example['has_attributes']),
        'unknown_label': first_unknown(example['labels'], ids),
        'unknown_attribute': first_unknown(names,
                                           attribute_table.lookup(names)),
    }
  return apply


OPS = {'boxes': boxes}
