"""Random numbers and permutations as pure functions of integer keys.

numpy's and TensorFlow's random streams may change with a version, but a run
that is resumed after an update must continue with the same batches.
"""
import math

import numpy as np

_U = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1
# Made once: for small arrays, making them costs as much as using them.
_S30, _S27, _S31, _S11 = _U(30), _U(27), _U(31), _U(11)
_M1, _M2 = _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)
_STEPS = np.arange(1, 4097, dtype=_U) * _U(_GOLDEN)


def _mix(x):
  """The finaliser of splitmix64 (Steele et al. 2014); uint64 arrays."""
  x = (x ^ (x >> _S30)) * _M1
  x = (x ^ (x >> _S27)) * _M2
  return x ^ (x >> _S31)


def fold(*numbers):
  """One 64-bit key from several ints: a chain of `_mix`."""
  k = 0
  for n in numbers:
    k = (k + _GOLDEN + n) & _ALL
    k = ((k ^ (k >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    k = ((k ^ (k >> 27)) * 0x94D049BB133111EB) & _ALL
    k ^= k >> 31
  return k


def uniform(key, shape):
  """float64 in [0, 1): the first numbers of splitmix64 with state `key`."""
  count = math.prod(shape)
  steps = (_STEPS[:count] if count <= len(_STEPS) else
           np.arange(1, count + 1, dtype=_U) * _U(_GOLDEN))
  return ((_mix(steps + _U(key)) >> _S11) * 2.**-53).reshape(shape)


def permute(index, n, key):
  """Element `index` of the permutation `key` of range(n).

  A Feistel network with cycle-walking: random access to a permutation, in
  memory that does not grow with n.

  Args:
    index: int array, in [0, n).
    n: int.
    key: int, see `fold`.

  Returns:
    int64 array like `index`.
  """
  half = max(1, (int(n - 1).bit_length() + 1) // 2)
  low, half = _U((1 << half) - 1), _U(half)
  rounds = np.array([fold(key, r) for r in range(8)], _U)
  x = np.asarray(index).astype(_U)
  todo = np.ones(x.shape, bool)
  while todo.any():
    left, right = x[todo] >> half, x[todo] & low
    for k in rounds:
      left, right = right, left ^ (_mix(right + k) & low)
    x[todo] = (left << half) | right
    todo = x >= _U(n)
  return x.astype(np.int64)
