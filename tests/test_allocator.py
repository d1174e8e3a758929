"""glibc keeps freed memory where a process computes on a CPU."""
import ctypes
import os
import subprocess
import sys

import pytest

from e2e_vlp_jax.training import allocator

GLIBC = sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'mallopt')
# Touches 10 blocks of 64 MiB, one after the other, in a new thread, after one
# that does not count; prints how many pages the system had to provide.
PROGRAM = '''
import ctypes, resource, sys, threading
from e2e_vlp_jax.training import allocator
libc, faults = ctypes.CDLL(None), []
libc.malloc.restype = ctypes.c_void_p
print(allocator.keep_freed_memory())
def work():
  for i in range(11):
    block = ctypes.c_void_p(libc.malloc(64 << 20))
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1] - faults[0])
'''


def run(**variables):
  """(whether memory is kept, pages) of PROGRAM with these variables."""
  env = {k: v for k, v in os.environ.items()
         if not k.startswith(('MALLOC_', 'GLIBC_'))}
  out = subprocess.run([sys.executable, '-c', PROGRAM], check=True, text=True,
                       env={**env, 'JAX_PLATFORMS': 'cpu', **variables},
                       capture_output=True).stdout.split()
  return out[0] == 'True', int(out[1])


def test_freed_memory_is_used_again():
  kept, pages = run()
  assert kept == GLIBC and (pages < 1000 or not GLIBC), pages
  kept, pages = run(GLIBC_TUNABLES='glibc.malloc.mmap_threshold=131072')
  assert not kept and (pages > 1000 or not GLIBC), pages


def test_arenas_of_the_user_stay(monkeypatch):
  calls = record(monkeypatch)
  monkeypatch.setenv('MALLOC_ARENA_MAX', '2')
  assert allocator.keep_freed_memory()
  assert [number for number, _ in calls] == [-3, -1]


@pytest.mark.parametrize('variable, value', [
    ('MALLOC_TRIM_THRESHOLD_', '1000'), ('JAX_PLATFORMS', 'cuda,cpu')])
def test_where_nothing_is_set(monkeypatch, variable, value):
  calls = record(monkeypatch)
  assert allocator.keep_freed_memory() and calls
  calls.clear()
  monkeypatch.setenv(variable, value)
  assert not allocator.keep_freed_memory() and not calls


def record(monkeypatch):
  """The calls of mallopt from now on, which do nothing."""
  calls = []

  class Library:
    def mallopt(self, *setting):
      calls.append(setting)
      return 1
  for name in ('MALLOC_ARENA_MAX', 'MALLOC_MMAP_THRESHOLD_',
               'MALLOC_TRIM_THRESHOLD_', 'GLIBC_TUNABLES'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr(allocator.sys, 'platform', 'linux')
  monkeypatch.setattr(allocator.ctypes, 'CDLL', lambda _: Library())
  return calls


def test_an_accelerator_is_left_alone(monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(allocator.glob, 'glob', lambda pattern: (
      [pattern] if 'nvidia' in pattern else []))
  assert not allocator.computes_on_cpu()
  monkeypatch.setattr(allocator.glob, 'glob', lambda pattern: [])
  assert allocator.computes_on_cpu()
