"""Traces a few steps of a run, for TensorBoard or Perfetto."""
import os

import jax


class Profiler:
  """Opens and closes a trace between steps; a context manager.

  A trace is taken at a step that the config sets, or whenever the file
  WORKDIR/profile_now is created, which is then deleted. Only process 0 writes
  traces, to WORKDIR/plugins/profile.

  Args:
    workdir: the run's folder.
    start: number of the step (from 0) before which a trace starts; 0 = none.
    steps: number of steps to trace.
  """

  def __init__(self, workdir, start, steps):
    self._workdir, self._start, self._steps = workdir, start, steps
    self._here = jax.process_index() == 0
    self._end = None  # step after which the open trace ends

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._close()

  def before(self, step):
    """Call before step number `step` (from 0) is started."""
    if self._here and self._end is None and 0 < self._start == step:
      self._open(step)

  def after(self, step, metrics, look_for_file=False):
    """Call when `step` steps are started.

    Args:
      step: steps started so far.
      metrics: metrics of the last one, for which a trace waits before it ends.
      look_for_file: start a trace if the file is there.
    """
    if self._end is not None and step >= self._end:
      jax.block_until_ready(metrics)
      self._close()
    request = os.path.join(self._workdir, 'profile_now')
    if (look_for_file and self._here and self._end is None
        and os.path.exists(request)):
      os.remove(request)
      self._open(step)

  def _open(self, step):
    jax.profiler.start_trace(os.fspath(self._workdir))
    self._end = step + self._steps

  def _close(self):
    if self._end is not None:
      self._end = None
      jax.profiler.stop_trace()
