"""OpenCV's resize and affine warp, for pipelines that were built on them.

In numpy, so that OpenCV need not be installed. Pillow's bilinear resize
differs: it averages over the source pixels when it makes an image smaller
(by 6 grey levels and more), OpenCV's takes two by two whatever the scale.
"""
import numpy as np

_ONE = 2048  # OpenCV's weights are integers of 11 bits.


def resize(image, size):
  """cv2.resize(..., INTER_LINEAR), in its integer arithmetic.

  Args:
    image: uint8 [h, w, C].
    size: (H, W).

  Returns:
    uint8 [H, W, C]; of OpenCV's own pixels 0 to 0.6 % differ, by one level.
  """
  def taps(source, target):
    x = (np.arange(target) + .5) * (source / target) - .5
    x = np.clip(x, 0, source - 1)
    first = np.floor(x).astype(int)
    weight = np.rint((x - first).astype(np.float32) * _ONE).astype(np.int32)
    return first, np.minimum(first + 1, source - 1), weight
  left, right, wx = taps(image.shape[1], size[1])
  top, bottom, wy = taps(image.shape[0], size[0])
  wx, wy = wx[:, None], wy[:, None, None]
  wide = image.astype(np.int32)
  # 22 bits after both passes: the shifts keep products within 32.
  wide = (wide[:, left] * (_ONE - wx) + wide[:, right] * wx) >> 4
  high = (wide[top] * (_ONE - wy) >> 16) + (wide[bottom] * wy >> 16)
  return ((high + 2) >> 2).astype(np.uint8)


def warp(image, matrix, fill):
  """cv2.warpAffine(..., INTER_LINEAR, BORDER_CONSTANT) to the same size.

  Args:
    image: uint8 [H, W, C].
    matrix: [2, 3], (x, y, 1) of the image -> (x, y) of the result.
    fill: value of all that lies outside the image.

  Returns:
    uint8 [H, W, C].
  """
  h, w = image.shape[:2]
  back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
  y, x = np.mgrid[:h, :w]
  x, y = np.moveaxis(np.stack([x, y, np.ones_like(x)], -1) @ back.T, -1, 0)
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)),
                  constant_values=fill).astype(np.float32)
  x0, y0 = np.floor(x), np.floor(y)
  fx = (x - x0)[..., None].astype(np.float32)
  fy = (y - y0)[..., None].astype(np.float32)
  near = lambda c, n: np.clip(c.astype(int) + 1, 0, n + 1)
  rows, cols = (near(y0, h), near(y0 + 1, h)), (near(x0, w), near(x0 + 1, w))
  upper = padded[rows[0], cols[0]] * (1 - fx) + padded[rows[0], cols[1]] * fx
  lower = padded[rows[1], cols[0]] * (1 - fx) + padded[rows[1], cols[1]] * fx
  return np.rint(upper * (1 - fy) + lower * fy).astype(np.uint8)
