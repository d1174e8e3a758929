"""Memory of batches: reused, but never while somebody can see it."""
import numpy as np

from e2e_vlp_jax.data import buffers

SHAPE = (64, 100, 400)


def test_memory_is_reused_after_its_last_view():
  made = buffers.Buffers()
  first = made.zeros(SHAPE, np.float32)
  first[:] = 1
  address, view = first.ctypes.data, first[3, 5:]
  del first
  second = made.zeros(SHAPE, np.float32)
  assert second.ctypes.data != address and not second.any()
  assert (view == 1).all()
  del view
  third = made.zeros(SHAPE, np.float32)
  assert third.ctypes.data == address and not third.any()


def test_a_larger_array_gets_memory_of_its_own():
  made = buffers.Buffers()
  made.zeros(SHAPE, np.uint8)[:] = 1
  assert not made.zeros(SHAPE, np.int64).any()
  assert not made.zeros(SHAPE, np.uint8).any()


def test_arrays_are_aligned_and_typed():
  made = buffers.Buffers()
  for shape, dtype in (((3,), bool), ((5, 7), np.int64), ((), np.int32),
                       (SHAPE, np.float32)):
    found = made.zeros(shape, dtype)
    assert found.shape == shape and found.dtype == dtype
    assert found.ctypes.data % 64 == 0 and not found.any()
