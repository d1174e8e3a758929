"""Image ops: decode, random scale and crop, flip, fit into the bucket.

Pixels are touched once: `scale_crop` and `flip` only choose a window of the
original image, a size and a mirror; `fit` cuts, resizes, mirrors and pads.

An example holds here: image (encoded bytes; uint8 [h,w,3] from `decode` on),
size int32 [2] (h, w), bucket int32 [2], window int32 [4] (y, x, h, w) in
pixels of the original, short_side float32 (wanted shorter side of the
window on the canvas), flipped bool, texts string [N], boxes float32 [O,4]
(ymin, xmin, ymax, xmax in [0,1]).
"""
import numpy as np
import tensorflow as tf

from e2e_vlp_jax.errors import UserError


def uniform(example, shape):
  """float32 in [0,1): the draws of the op that calls, once each."""
  return tf.random.stateless_uniform(shape, example['seed'], alg='philox')


def require_before(example, op, key, other):
  """`op` must stand before the op that makes `key`."""
  if key in example:
    raise UserError(f'pp: {op} must stand before {other}')


def _decode_or_none(data, size):
  try:
    return tf.io.decode_image(data, channels=3,
                              expand_animations=False).numpy(), True
  except tf.errors.InvalidArgumentError:
    return np.zeros((*np.maximum(size, 1), 3), np.uint8), False


def decode(context):
  """JPEG or PNG -> uint8 [h,w,3]; ok=False and zeros if it cannot be read.

  A broken file must not end a run of days, and tf.data cannot replace an
  element whose map fails; hence the detour by Python, which costs 30 us.
  """
  del context
  def apply(example):
    image, ok = tf.numpy_function(
        _decode_or_none, [example['image'], example['size']],
        (tf.uint8, tf.bool), stateful=False)
    image = tf.ensure_shape(image, [None, None, 3])
    ok = tf.ensure_shape(ok, [])
    size = tf.shape(image)[:2]
    return {**example, 'image': image, 'size': size, 'ok': ok,
            'window': tf.concat([[0, 0], size], 0),
            'short_side': tf.constant(np.inf, tf.float32),
            'flipped': tf.constant(False)}
  return apply


def scale_crop(context, scales=tuple(range(480, 801, 32)),
               shorts=(400, 500, 600), crop=(384, 600), of=800, p=.5):
  """DETR's training augmentation, for a canvas of any size.

  With probability 1-p the whole image, its shorter side drawn from `scales`.
  Otherwise the shorter side is drawn from `shorts`, then a window whose
  sides are uniform in [crop[0], min(side, crop[1])], which is then shown
  with its shorter side drawn from `scales` (github.com/facebookresearch/
  detr, datasets/coco.py). The longer side is limited by the bucket (DETR:
  1333 pixels).

  An image with texts gets a window that holds all its boxes, so that no
  caption tells of a thing that was cut off (as MDETR's cautious crop), and
  no crop at all where it has texts but no boxes to go by.

  Args:
    context: unused.
    scales, shorts, crop: lengths of which `of` is the bucket's shorter side:
      DETR's pixels with of=800, fractions with of=1.
    of: see there.
    p: probability of a crop.
  """
  del context
  def apply(example):
    require_before(example, 'scale_crop', 'image_mask', 'fit')
    u = uniform(example, [7])
    pick = lambda values, k: tf.gather(tf.constant(values, tf.float32),
                                       tf.cast(u[k] * len(values), tf.int32))
    size = tf.cast(example['size'], tf.float32)
    # The frame that DETR crops from, then the window back in pixels.
    zoom = pick(shorts, 0) / tf.reduce_min(size)
    low = tf.minimum(float(crop[0]), size * zoom)
    high = tf.clip_by_value(size * zoom, low, float(crop[1]))
    window = tf.clip_by_value(
        tf.round((low + u[1:3] * (high - low)) / zoom), 1., size)
    first, last = _must_show(example, size)
    window = tf.maximum(window, last - first)
    least = tf.maximum(0., last - window)
    most = tf.minimum(first, size - window)
    corner = least + tf.floor(u[3:5] * (most - least + 1))
    whole = u[5] >= p
    window = tf.where(whole, size, window)
    corner = tf.where(whole, 0., corner)
    canvas = tf.cast(tf.reduce_min(example['bucket']), tf.float32)
    return {**example,
            'window': tf.cast(tf.concat([corner, window], 0), tf.int32),
            'short_side': pick(scales, 6) / of * canvas}
  return apply


def _must_show(example, size):
  """First and one-past-last pixel [2] that a window has to hold."""
  boxes = example['boxes']
  good = tf.reduce_all(tf.math.is_finite(boxes), -1)
  boxes = tf.clip_by_value(tf.boolean_mask(boxes, good), 0., 1.)
  has_text = tf.size(example['texts']) > 0
  has_boxes = tf.shape(boxes)[0] > 0
  first = tf.floor(tf.reduce_min(boxes[:, :2], 0) * size)
  last = tf.math.ceil(tf.reduce_max(boxes[:, 2:], 0) * size)
  first = tf.where(has_boxes, first, 0.)
  last = tf.maximum(tf.where(has_boxes, last, size), first)
  # Without texts any window will do: it need hold no more than nothing.
  return (tf.where(has_text, first, size), tf.where(has_text, last, 0.))


# RE2 patterns; 'left-hand' has a word boundary at its hyphen.
_ENDINGS = r'(most|wards?|hand)?\b'
_WORDS = (('left', 'right'), ('Left', 'Right'), ('LEFT', 'RIGHT'))


def swap_left_right(texts):
  """'left' <-> 'right' as words (also -most, -ward, -wards), case kept."""
  for left, right in _WORDS:
    texts = tf.strings.regex_replace(texts, rf'\b{left}{_ENDINGS}', '\x01\\1')
    texts = tf.strings.regex_replace(texts, rf'\b{right}{_ENDINGS}',
                                     rf'{left}\1')
    texts = tf.strings.regex_replace(texts, '\x01', right)
  return texts


def flip(context, swap_words=False, p=.5):
  """Mirrors left and right with probability `p`.

  An image with texts is mirrored only under `swap_words`, which exchanges
  the words left and right in them. (It does not know that 'right' may mean
  'correct': leave it off where texts were not written about places.)
  """
  del context
  def apply(example):
    require_before(example, 'flip', 'image_mask', 'fit')
    require_before(example, 'flip', 'text', 'text')
    texts = example['texts']
    flipped = uniform(example, []) < p
    if swap_words:
      texts = tf.cond(flipped, lambda: swap_left_right(texts), lambda: texts)
    else:
      flipped &= tf.size(texts) == 0
    return {**example, 'texts': texts, 'flipped': flipped}
  return apply


def fit(context):
  """The window resized into the bucket, zero padding at bottom and right.

  The aspect ratio is kept. Bilinear with antialiasing, as PIL. Makes
  image uint8 [H,W,3] and image_mask bool [H,W] (True on the picture).
  """
  del context
  def apply(example):
    if 'window' not in example:
      raise UserError('pp: decode must stand before fit')
    bucket, window = example['bucket'], example['window']
    y, x, h, w = tf.unstack(window)
    image = example['image'][y:y + h, x:x + w]
    size = tf.cast(window[2:], tf.float32)
    ratio = tf.minimum(example['short_side'] / tf.reduce_min(size),
                       tf.reduce_min(tf.cast(bucket, tf.float32) / size))
    target = tf.clip_by_value(tf.cast(tf.round(size * ratio), tf.int32), 1,
                              bucket)

    def resized():
      out = tf.image.resize(image, target, antialias=True)
      return tf.cast(tf.clip_by_value(tf.round(out), 0., 255.), tf.uint8)

    image = tf.cond(tf.reduce_all(target == window[2:]), lambda: image,
                    resized)
    image = tf.cond(example['flipped'], lambda: image[:, ::-1],
                    lambda: image)
    gap = bucket - target
    mask = ((tf.range(bucket[0]) < target[0])[:, None]
            & (tf.range(bucket[1]) < target[1]))
    return {**example, 'image_mask': mask,
            'image': tf.pad(image, [[0, gap[0]], [0, gap[1]], [0, 0]])}
  return apply


OPS = {'decode': decode, 'scale_crop': scale_crop, 'flip': flip, 'fit': fit}
