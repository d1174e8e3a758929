"""Memory for batches, used again when nobody holds an array of it any more.

New memory of tens of megabytes comes from the kernel, which clears it page by
page: at batch 64 and 512x512 that took a tenth of the pipeline's time.
"""
import collections
import math
import weakref

import numpy as np

_LARGE = 1 << 20  # bytes; smaller arrays are not worth the bookkeeping
_ALIGNED = 64  # TensorFlow uses arrays at such addresses without a copy
_KEPT = 4  # free blocks


class Buffers:
  """Makes arrays of one key of the batches."""

  def __init__(self):
    self._free = collections.deque(maxlen=_KEPT)

  def zeros(self, shape, dtype):
    """An aligned array of zeros; its memory is reused after its last view."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _LARGE:
      return _aligned(np.zeros(size + _ALIGNED, np.uint8), shape, dtype)
    block = self._block(size)
    # Views of `lent` keep it alive, because it does not own its memory: it dies
    # with the last of them.
    lent = np.frombuffer(memoryview(block), np.uint8)
    weakref.finalize(lent, self._free.append, block).atexit = False
    return _aligned(lent, shape, dtype)

  def _block(self, size):
    """A block that holds at least `size` bytes after alignment, zeros."""
    try:
      block = self._free.popleft()
    except IndexError:
      block = ()
    if len(block) < size + _ALIGNED:
      return np.zeros(size + _ALIGNED, np.uint8)
    block[:size + _ALIGNED] = 0
    return block


def _aligned(flat, shape, dtype):
  """The part of uint8 `flat` that begins at an aligned address."""
  start = -flat.ctypes.data % _ALIGNED
  size = math.prod(shape) * np.dtype(dtype).itemsize
  return flat[start:start + size].view(dtype).reshape(shape)
