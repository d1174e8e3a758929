"""Measures time and memory, and the peak speed of a machine."""
import contextlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np


def seconds(function):
  """Seconds that one call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


@contextlib.contextmanager
def compilations():
  """Yields a list that grows by one item with each program compiled."""
  found = []

  def listen(event, duration, **unused):
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(duration)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def percentiles(times):
  """{'p50', 'p90'} of a list of numbers."""
  return {'p50': float(np.percentile(times, 50)),
          'p90': float(np.percentile(times, 90))}


def peak_memory():
  """Peak bytes on the fullest device; on a CPU, of this process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  if all('peak_bytes_in_use' in s for s in stats):
    return max(s['peak_bytes_in_use'] for s in stats)
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(chip, count, dtype):
  """(FLOP/s of `count` devices, where the figure is from).

  For a device without a data sheet in `chips` (a CPU), it measures a matrix
  product on all cores, however many devices they are split into.
  """
  if chip.flops:
    return chip.flops * count, 'peak bfloat16 FLOP/s of the data sheet'
  n = 2048
  x = jnp.ones((n, n), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  best = min(seconds(lambda: jax.block_until_ready(product(x, x)))
             for _ in range(5))
  return 2 * n**3 / best, f'measured: {n}x{n} matrix product in {dtype}'
