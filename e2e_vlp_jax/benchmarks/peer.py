"""A peer's turns with ours, as part of a report."""
import numpy as np

from e2e_vlp_jax.profiling import timing

WARM_UP = 2     # steps before the clock: allocators, caches, autotuning
TIMEOUT = 180.  # seconds that an answer of a peer may take


def report(peer, our_seconds, batch_size):
  """The part 'peer' of a report; ends its process.

  Args:
    peer: a `peers.process.Process` after all of its steps.
    our_seconds: mean seconds of our step.
    batch_size: batch size of both.
  """
  details = peer.details()
  peer.close()
  known = {'name': peer.name, 'version': peer.version,
           'parameters': peer.parameters, 'build_s': peer.build_s,
           'timed_out': False, 'failed': None, **details}
  if peer.failure:
    return known | peer.failure
  first, times = peer.times[0], peer.times[WARM_UP:]
  seconds = float(np.mean(times))
  return known | {
      'images_per_s': batch_size / seconds,
      'step_time_s': timing.percentiles(times),
      'compile_s': max(0., first - float(np.median(times))),
      'ratio': seconds / our_seconds}
