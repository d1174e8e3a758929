"""Measures where the wall time goes and how fast the steps are.

`Clock` attributes the time of the whole process; `MeteredStep` runs the
steps and measures their rate without compilation, evaluation and saves.
"""
import collections
import contextlib
import time

import jax

from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program


class Clock:
  """Attributes wall time to exactly one phase at a time.

  The phases are 'init', 'data', 'compile', 'step', 'evaluation' and 'save';
  their times always add up to the whole.

  Args:
    phase: the first one.
  """

  def __init__(self, phase):
    self._seconds = collections.Counter()
    self._phase, self._since = phase, time.perf_counter()

  def enter(self, phase):
    """Ends the current phase and starts `phase`."""
    now = time.perf_counter()
    self._seconds[self._phase] += now - self._since
    self._phase, self._since = phase, now

  def waiting(self, phase, iterable):
    """Yields the items of `iterable`; the wait for each counts for `phase`."""
    iterator = iter(iterable)
    while True:
      self.enter(phase)
      try:
        item = next(iterator)
      except StopIteration:
        return
      yield item

  def seconds(self, phase):
    """Seconds spent in `phase` so far."""
    self.enter(self._phase)
    return self._seconds[phase]

  def fractions(self):
    """{'perf/time/<phase>': share of the wall time so far}."""
    self.enter(self._phase)
    wall = sum(self._seconds.values())
    return {f'perf/time/{k}': v / wall for k, v in self._seconds.items()}


class MeteredStep:
  """A train step that measures its own rate.

  The first step of a bucket compiles, so it is timed separately and left out.

  Args:
    step: jitted function (state, batch) -> (state, metrics).
    clock: Clock of the run.
    mesh: the devices that share the work.
    feed: function (state, batch) -> batch, called before each step; None = no
      such function. Its time is part of the step's.
  """

  def __init__(self, step, clock, mesh, feed=None):
    self._step, self._clock = step, clock
    self._feed = feed or (lambda state, batch: batch)
    self._flops_of = {}  # by the shape of a bucket's images
    self._blocked = collections.Counter()
    chip = chips.of_device(jax.local_devices()[0])
    self._peak = mesh.size * chip.flops if chip.flops else None
    self.restart()

  def __call__(self, state, batch):
    """Starts one step; see `training.train_step.make_train_step`."""
    bucket = batch['image'].shape
    first = bucket not in self._flops_of
    self._clock.enter('compile' if first else 'step')
    batch = self._feed(state, batch)
    if first:
      self._flops_of[bucket] = program.flops(
          self._step.trace(state, batch).jaxpr)
    state, metrics = self._step(state, batch)
    self._steps += 1
    self._images += bucket[0]
    self._flops += self._flops_of[bucket]
    if first:
      jax.block_until_ready(metrics)
      self.restart()
    return state, metrics

  def restart(self):
    """Begins a new measurement."""
    self._steps, self._images, self._flops = 0, 0, 0.
    self._start = time.perf_counter()
    self._waited = self._clock.seconds('data')

  @contextlib.contextmanager
  def interrupted(self, phase):
    """Context in which time counts for `phase`, not for the steps' rate."""
    before = self._clock.seconds(phase)
    self._clock.enter(phase)
    yield
    self._blocked[phase] = self._clock.seconds(phase) - before
    self.restart()

  def speed(self):
    """{'perf/<name>': value} since the last restart, {} without a step.

    Names:
      images_per_s: of the whole batch.
      step_s: seconds per step.
      data_wait: share of the time spent waiting for data.
      tflops_per_s: FLOPs of the model as `program.flops` counts them.
      save_blocked_s: seconds for which the last save blocked the training.
      mfu: FLOPs as a share of the chips' bfloat16 peak, where it is known.
    """
    if not self._steps:
      return {}
    seconds = time.perf_counter() - self._start
    waited = self._clock.seconds('data') - self._waited
    out = {'images_per_s': self._images / seconds,
           'step_s': seconds / self._steps,
           'data_wait': waited / seconds,
           'tflops_per_s': self._flops / seconds / 1e12,
           'save_blocked_s': self._blocked['save']}
    if self._peak:
      out['mfu'] = self._flops / seconds / self._peak
    return {f'perf/{k}': v for k, v in out.items()}
