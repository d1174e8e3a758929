"""Anchors: one square box at each cell of each level of a pyramid.

FIBER's fine stage and GLIP have one anchor a location: its side is a fixed
number of strides (8), its centre is that of the cell's pixels. Boxes are in
inclusive pixels, see ops/pixel_boxes.py.
"""
import numpy as np


def of_level(height, width, stride, scale=8.):
  """The anchors of one level, row by row.

  Args:
    height, width: cells of the level.
    stride: pixels of the canvas from cell to cell.
    scale: side of an anchor, in strides.

  Returns:
    [height * width, 4] float32 (x0, y0, x1, y1) in pixels of the canvas.
  """
  y, x = np.mgrid[:height, :width].reshape(2, -1) * stride + (stride - 1) / 2
  reach = (scale * stride - 1) / 2
  return np.stack([x - reach, y - reach, x + reach, y + reach],
                  -1).astype(np.float32)


def pyramid(sizes, stride, scale=8.):
  """[anchors of each level]; the stride doubles from level to level.

  Args:
    sizes: (height, width) of each level, the finest one first.
    stride: of the first level.
    scale: see `of_level`.
  """
  return [of_level(h, w, stride * 2**k, scale)
          for k, (h, w) in enumerate(sizes)]
