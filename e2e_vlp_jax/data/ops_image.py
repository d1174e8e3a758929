"""Image ops: decode, random scale and crop, flip, fit into the bucket.

The ops choose a window of the original, its size on the canvas and whether
it is mirrored; `render` then decodes, crops, resizes, mirrors and pads.

They read and write these keys of an example:
  height, width  of the original
  bucket         (H, W)
  window         int64 [4], (y, x, h, w) in pixels of the original
  short_side     wanted length of the window's shorter side on the canvas
  flipped        whether it is mirrored
and after `fit` or `squash`:
  target         int64 [2], (h, w) of the picture on the canvas
  resample       how the window is resized
  place          the op's function, to place a second image the same way
"""
import functools
import io
import re

import cv2
import numpy as np
from PIL import Image

from e2e_vlp_jax.data import boxes, ops_randaug
from e2e_vlp_jax.data.keys import Key
from e2e_vlp_jax.data.rng import uniform
from e2e_vlp_jax.errors import UserError, nearest


def _check_order(example, op, after=None, before=()):
  """Raises unless `after`'s key exists and none of `before`'s do.

  Args:
    example: input of the op.
    op: name of the op.
    after: (key, the op that makes it), or None.
    before: tuple of such pairs.
  """
  for key, other in before:
    if key in example:
      raise UserError(f'pp: {op} must stand before {other}')
  if after and after[0] not in example:
    raise UserError(f'pp: {after[1]} must stand before {op}')


_DECODE = ('window', 'decode')
_LATER = (('target', 'fit or squash'), ('box_mask', 'boxes'))


def decode(context):
  """Starts with the whole image, as large as fits the bucket."""
  del context
  def apply(example):
    _check_order(example, 'decode', before=(_DECODE,))
    size = (example['height'], example['width'])
    return {**example, 'window': np.array([0, 0, *size]),
            'short_side': np.inf, 'flipped': False}
  return apply


def scale_crop(context, scales=tuple(range(480, 801, 32)),
               shorts=(400, 500, 600), crop=(384, 600), canvas_side=800,
               p=.5):
  """DETR's training augmentation, for a canvas of any size.

  With probability 1-p it shows the whole image, with a shorter side sampled
  from `scales`. Otherwise it samples the shorter side from `shorts`, then a
  window whose sides are uniform in [crop[0], min(side, crop[1])], and shows the
  window with a shorter side sampled from `scales`
  (github.com/facebookresearch/detr, datasets/coco.py). The longer side is
  limited by the bucket (DETR: 1333).

  If the image has texts, the window contains all its boxes, so that no caption
  mentions an object that was cut off (like MDETR's cautious crop). An image
  with texts but no boxes is not cropped.

  Args:
    context: unused.
    scales, shorts, crop: lengths on a canvas whose shorter side is
      `canvas_side`; they are scaled to the bucket's.
    canvas_side: 800 for DETR's lengths in pixels, 1 for fractions.
    p: probability of a crop.
  """
  del context
  def apply(example):
    _check_order(example, 'scale_crop', _DECODE, _LATER)
    u = uniform(example['seed'], [7])
    size = np.array([example['height'], example['width']], float)
    out = {**example, 'short_side': (scales[int(u[0] * len(scales))]
                                     / canvas_side * min(example['bucket']))}
    if u[1] >= p or not size.all():
      return out
    zoom = shorts[int(u[2] * len(shorts))] / size.min()
    # Choose the window in DETR's resized frame, then convert it to pixels.
    low = np.minimum(crop[0], size * zoom)
    high = np.maximum(np.minimum(crop[1], size * zoom), low)
    window = np.clip(np.round((low + u[3:5] * (high - low)) / zoom), 1, size)
    least, most = np.zeros(2), size - window
    if example['texts']:
      first, last = _extent(example['objects'], size)
      window = np.maximum(window, last - first)
      least = np.maximum(last - window, 0)
      most = np.minimum(first, size - window)
    corner = least + np.floor(u[5:7] * (most - least + 1))
    return {**out, 'window': np.concatenate([corner, window]).astype(int)}
  return apply


def _extent(objects, size):
  """First and one-past-last pixel (y, x) of all boxes, or of the image."""
  corners = boxes.swap_axes(
      np.array([o['bbox'] for o in objects], float).reshape(-1, 4))
  corners = np.clip(corners[np.isfinite(corners).all(-1)], 0, 1)
  if not len(corners):
    return np.zeros(2), size
  first, last = corners[:, [1, 0]].min(0), corners[:, [3, 2]].max(0)
  return np.floor(first * size), np.ceil(last * size)


_SIDES = re.compile(r'\b(left|right)(?=(most|wards?|hand)?\b)', re.IGNORECASE)


def swap_left_right(text):
  """'left' <-> 'right' as words (also -most, -ward, -hand), case kept."""
  def other(match):
    old = match[0]
    new = 'right' if old.lower() == 'left' else 'left'
    return (new.upper() if old.isupper() else
            new.capitalize() if old[0].isupper() else new)
  return _SIDES.sub(other, text)


def flip(context, swap_words=False, p=.5):
  """Mirrors left and right with probability `p`.

  An image with texts is mirrored only with `swap_words`, which exchanges the
  words left and right in them. It also changes 'right' in the sense of
  'correct' and a statement's 'left image', so use it only if texts describe
  places within one image.
  """
  del context
  def apply(example):
    _check_order(example, 'flip', _DECODE, (*_LATER, ('text', 'text')))
    texts = example['texts']
    if (texts and not swap_words) or uniform(example['seed'], [1])[0] >= p:
      return example
    return {**example, 'flipped': not example['flipped'],
            'texts': [swap_left_right(t) for t in texts]}
  return apply


def random_crop(context, area=(.5, 1.), ratio=(3 / 4, 4 / 3)):
  """torchvision's RandomResizedCrop: a window of random size and shape.

  Its share of the image's area is uniform in `area`, the logarithm of
  width / height uniform in `ratio`'s. If the image cannot hold any of ten such
  windows, it is the largest central window of an allowed shape. Boxes outside
  the window are lost, and texts about them are no longer true.
  """
  del context
  def apply(example):
    _check_order(example, 'random_crop', _DECODE, _LATER)
    size = np.array([example['height'], example['width']])
    if not size.all():
      return example
    u = uniform(example['seed'], [10, 4])
    least, most = np.log(ratio)
    for share, shape, *corner in u:
      pixels = size.prod() * (area[0] + share * (area[1] - area[0]))
      shape = np.exp(least + shape * (most - least))
      window = np.round(np.sqrt([pixels / shape, pixels * shape])).astype(int)
      if (window > 0).all() and (window <= size).all():
        corner = np.floor(corner * (size - window + 1)).astype(int)
        break
    else:
      wide = np.clip(size[1] / size[0], *ratio)
      window = np.minimum(size, np.round([size[1] / wide, size[0] * wide]))
      window = np.maximum(window, 1).astype(int)
      corner = (size - window) // 2
    return {**example, 'window': np.concatenate([corner, window])}
  return apply


def fit(context, max_sides=None, resample='bilinear'):
  """Resizes the window to fit the bucket.

  The aspect ratio is kept; padding is at the bottom and right.

  Args:
    context: unused.
    max_sides: (longer, shorter), limits of the two sides in pixels, besides the
      bucket. SOHO: (1000, 600), with buckets of multiples of 32.
    resample: 'bilinear' (with antialiasing), 'pillow' (equal to Pillow's
      bilinear to the bit, hence to torchvision's on PIL images; slower),
      'bicubic' (Pillow's) or 'opencv' (bilinear without antialiasing).
  """
  del context
  _check_resample(resample)
  if max_sides is not None and np.shape(max_sides) != (2,):
    raise UserError(f'pp: fit(max_sides={max_sides!r}); expected (longer, '
                    'shorter)')
  def apply(example):
    _check_order(example, 'fit', _DECODE)
    size = example['window'][2:]
    target = np.zeros(2, int)
    if size.all():
      ratio = min(example['short_side'] / size.min(),
                  *(example['bucket'] / size))
      if max_sides:
        ratio = min(ratio, max(max_sides) / size.max(),
                    min(max_sides) / size.min())
      target = np.clip(np.floor(size * ratio + .5), 1,
                       example['bucket']).astype(int)
    return {**_placed(example, target, resample), 'place': apply}
  return apply


def squash(context, resample='bicubic'):
  """Stretches the window to fill the bucket, without padding.

  Args:
    context: unused.
    resample: see `fit`.
  """
  del context
  _check_resample(resample)
  def apply(example):
    _check_order(example, 'squash', _DECODE)
    there = example['window'][2:].all()
    return {**_placed(example, np.array(example['bucket']) * there, resample),
            'place': apply}
  return apply


def _check_resample(name):
  if name not in _RESAMPLE:
    raise UserError(f'pp: resample={name!r}' + nearest(name, _RESAMPLE))


def _placed(example, target, resample):
  """The example with its picture of size `target` (h, w) at the upper left.
  """
  (height, width), (h, w) = example['bucket'], target.tolist()
  mask = _quarter(height, width)[height - h:2 * height - h,
                                 width - w:2 * width - w]
  return {**example, 'target': target, 'image_mask': mask,
          'resample': resample}


@functools.lru_cache(64)
def _quarter(height, width):
  """bool [2*height, 2*width], True in the upper left quarter; read-only.

  Its views are the masks of pictures of any size in a bucket, so that a row
  need not make its own.
  """
  mask = np.zeros((2 * height, 2 * width), bool)
  mask[:height, :width] = True
  mask.flags.writeable = False
  return mask


def render(example, canvas):
  """Decodes the image and writes the planned picture into `canvas`.

  Args:
    example: has image (an encoded file) and the plan of the ops.
    canvas: zeros uint8 [H,W,3].

  Returns:
    False, with the canvas unchanged, if the image cannot be decoded or its size
    differs from the record's.
  """
  size = (example['width'], example['height'])
  try:
    image = Image.open(io.BytesIO(example['image']))
    pixels = _pixels(image, example['image']) if image.size == size else None
  except Exception:  # pylint: disable=broad-exception-caught
    # Pillow has no error class for broken files: OSError, SyntaxError,
    # struct.error, ...
    return False
  if pixels is None:
    return False
  paint(example, pixels, canvas)
  return True


_JPEG_END = b'\xff\xd9'


def _pixels(image, data):
  """Decodes an opened image: uint8 [h,w,3], or None if it is broken.

  OpenCV and Pillow decode a JPEG with the same library, to the same bits.
  OpenCV is faster, as it writes RGB where the array will be: Pillow keeps four
  bytes a pixel and copies them twice. Some versions of OpenCV fill up a
  truncated file; Pillow refuses it.

  Args:
    image: what Pillow's `open` made of `data`; only its header is read yet.
    data: the encoded file.
  """
  if (image.format == 'JPEG' and image.mode == 'RGB'
      and data.endswith(_JPEG_END)):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB
                        | cv2.IMREAD_IGNORE_ORIENTATION)
  return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def paint(example, image, canvas):
  """Writes the planned picture into `canvas`.

  Args:
    example: has the plan of the ops.
    image: the decoded image, uint8 [h,w,3].
    canvas: zeros uint8 [H,W,3].
  """
  y, x, h, w = example['window'].tolist()
  picture = canvas[:example['target'][0], :example['target'][1]]
  window = image[y:y + h, x:x + w]
  if window.shape == picture.shape:
    picture[:] = window
  else:
    _RESAMPLE[example['resample']](window, picture)
  if example['flipped']:
    picture[:] = picture[:, ::-1]
  if example.get('augment'):
    picture[:] = ops_randaug.augment(picture, example['augment'],
                                     example['augment_released'])


# tf.data's threads use all cores already.
cv2.setNumThreads(1)


def _opencv(window, picture):
  cv2.resize(window, picture.shape[1::-1], picture)


def _pillow(kind):
  def resize(window, picture):
    picture[:] = Image.fromarray(window).resize(picture.shape[1::-1], kind)
  return resize


_pillow_bilinear = _pillow(Image.Resampling.BILINEAR)


def _bilinear(window, picture):
  """Pillow's result to about one grey level, in a quarter of the time.

  Pillow's triangle filter reaches `scale` pixels to either side and has
  variance scale^2 / 6; OpenCV's reaches one pixel and has variance 1/6. A blur
  of three taps adds the rest.
  """
  scale = np.divide(window.shape[:2], picture.shape[:2])
  if scale.max() > 2:
    return _pillow_bilinear(window, picture)  # Three taps would be too few.
  if scale.max() > 1:
    side = np.maximum(scale**2 - 1, 1e-6) / 12
    sigma = np.sqrt(-.5 / np.log(side / (1 - 2 * side)))
    window = cv2.GaussianBlur(window, (3, 3), sigma[1], sigmaY=sigma[0])
  return _opencv(window, picture)


_RESAMPLE = {'bilinear': _bilinear, 'pillow': _pillow_bilinear,
             'bicubic': _pillow(Image.Resampling.BICUBIC), 'opencv': _opencv}

OPS = {'decode': decode, 'scale_crop': scale_crop, 'random_crop': random_crop,
       'flip': flip, 'fit': fit, 'squash': squash}


def draw_mask(draw):
  """One side fills the bucket, the other at least three quarters of it."""
  b, height, width = draw.shape
  rows, columns = (draw.rng.integers((3 * n + 3) // 4, n + 1, b)
                   for n in (height, width))
  tall = draw.rng.random(b) < .5
  rows, columns = np.where(tall, height, rows), np.where(tall, columns, width)
  return ((np.arange(height)[:, None] < rows[:, None, None])
          & (np.arange(width) < columns[:, None, None]))


def draw_pixels(mask):
  """Function that draws an image that is 0 outside the key `mask`."""
  return lambda draw: (draw.rng.integers(0, 256, draw.shape, np.uint8)
                       * draw.batch[mask][..., None].astype(np.uint8))


_KEYS = (
    Key('image_mask', bool, 'HW', False, 'True on the image, which lies at '
        'the upper left', draw_mask),
    Key('image', np.uint8, 'HW3', 0, 'RGB', draw_pixels('image_mask'), render),
)
KEYS = {'fit': _KEYS, 'squash': _KEYS}
