"""Memory of the C library, for processes that compute on a CPU.

XLA allocates the arrays of a step anew in every step. glibc takes large ones
from the operating system and returns them each time, and a page's first use can
cost as much as the arithmetic on it. Kept and used again, a step is faster at
the same peak memory; docs/pods.md has figures.
"""
import ctypes
import glob
import os
import sys

# Parameters of glibc's mallopt, and the variables that set them from outside.
_ARENAS, _MMAP, _TRIM = -8, -3, -1
_VARIABLES = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_',
              'GLIBC_TUNABLES')
_MOST = 2**31 - 1
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel*',
                 '/dev/vfio/[0-9]*')


def keep_freed_memory():
  """Lets glibc keep what is freed, if this process computes on a CPU.

  Call it in a process of our own, before its threads start: memory of a thread
  with an arena of its own is not kept. Variables that a user has set are left
  alone. Does nothing with another C library or with an accelerator, whose host
  has many threads that load data.

  Returns:
    whether it does.
  """
  if (sys.platform != 'linux' or not computes_on_cpu()
      or any(v in os.environ for v in _VARIABLES)):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:
    return False
  settings = [(_MMAP, _MOST), (_TRIM, _MOST)]
  if 'MALLOC_ARENA_MAX' not in os.environ:
    settings.append((_ARENAS, 1))
  return all([mallopt(*setting) for setting in settings])


def computes_on_cpu():
  """Whether jax will, as far as one can say without starting it."""
  asked = os.environ.get('JAX_PLATFORMS', '')
  return asked == 'cpu' or not asked and not any(map(glob.glob, _ACCELERATORS))
