"""Converts between the two orders of a box's coordinates.

Code uses (x0, y0, x1, y1). Stored records use TFDS's order, (ymin, xmin, ymax,
xmax). Both are relative to the image's size, in [0, 1].
"""
import numpy as np


def swap_axes(boxes):
  """(ymin, xmin, ymax, xmax) -> (x0, y0, x1, y1), and back; [..., 4]."""
  return np.asarray(boxes)[..., [1, 0, 3, 2]]
