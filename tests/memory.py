"""Memory of the process that runs tests, and of those that tests start.

No process should need more than 3 GiB.
"""
import ctypes
import functools
import gc
import os
import pathlib
import sys
import threading

# A process that has imported jax, tensorflow and torch has 1.1 GiB. It keeps
# compiled programs up to _KEPT, as the next test may share them, and lets go
# again whenever it has grown by _GROWTH.
_KEPT, _GROWTH = 1.5, .5  # GiB
_SECONDS = .5  # between two looks at the started processes
_CACHED = type(functools.cache(len))
_left = 0.  # GiB after the last release


# --- Releasing it -----------------------------------------------------------
def release():
  """Drops compiled programs; returns what is free to the operating system."""
  global _left  # pylint: disable=global-statement
  jax = sys.modules.get('jax')
  if jax is not None:
    jax.clear_caches()
  gc.collect()
  if sys.platform == 'linux':
    ctypes.CDLL('libc.so.6').malloc_trim(0)
  _left = now()


def release_if_grown():
  """The same, if this process has grown since the last time."""
  if now() > max(_KEPT, _left + _GROWTH):
    release()


def forget(module):
  """Empties the `functools` caches of a module's functions; releases."""
  for value in vars(module).values():
    if isinstance(value, _CACHED) and value.__module__ == module.__name__:
      value.cache_clear()
  release()


# --- Measuring it -----------------------------------------------------------
def _read(field, process='self'):
  """GiB from Linux's /proc/<process>/status; 0 elsewhere, and if it ended."""
  try:
    lines = pathlib.Path(f'/proc/{process}/status').read_text().splitlines()
  except OSError:
    return 0.
  found = [int(x.split()[1]) for x in lines if x.startswith(f'{field}:')]
  return found[0] / 2**20 if found else 0.


def now():
  """Resident GiB of this process."""
  return _read('VmRSS')


def take_peak():
  """Peak GiB of this process since the last call; begins anew."""
  out = _read('VmHWM')
  try:
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  except OSError:  # Not Linux, whose peak would be 0 as well.
    pass
  return out


class Started(threading.Thread):
  """Watches the processes that this one starts, and those that they start.

  The operating system's own figure, ru_maxrss, does not serve: a new process
  begins with the peak of the one that it comes from.
  """

  def __init__(self):
    super().__init__(daemon=True)
    self._peak, self._lock, self._stop = 0., threading.Lock(), threading.Event()

  def run(self):
    known = set()
    while not self._stop.wait(_SECONDS):
      found = set(_descendants(os.getpid()))
      # Until it has begun a program of its own, a process has our memory.
      largest = max((_read('VmHWM', x) for x in found & known), default=0.)
      known = found
      with self._lock:
        self._peak = max(self._peak, largest)

  def take_peak(self):
    """Peak GiB of the largest since the last call; begins anew."""
    with self._lock:
      out, self._peak = self._peak, 0.
    return out


def _descendants(process):
  """Ids of the processes that `process` and its children have started."""
  for path in pathlib.Path(f'/proc/{process}/task').glob('*/children'):
    try:
      children = path.read_text().split()
    except OSError:  # The thread has ended.
      continue
    for child in children:
      yield child
      yield from _descendants(child)
