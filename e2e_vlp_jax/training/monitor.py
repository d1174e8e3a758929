"""What a person and a script see of a run: bar, metrics.jsonl, TensorBoard.

clu is used here and nowhere else, and only when a writer is made: it needs
TensorFlow, which machines that only compute may lack.
"""
import collections
import json
import logging
import math
import os
import time

import jax
import numpy as np
import tqdm


class Clock:
  """Where the wall time goes: at any moment it counts for one thing.

  The run says what it does next ('init', 'data', 'compile', 'step', 'save',
  'evaluation'); so the parts always add up to the whole.
  """

  def __init__(self, what):
    self.start = time.perf_counter()
    self._seconds = collections.Counter()
    self._what, self._since = what, self.start

  def enter(self, what):
    """From now on time counts for `what`. Returns what it was before."""
    now, before = time.perf_counter(), self._what
    self._seconds[before] += now - self._since
    self._what, self._since = what, now
    return before

  def seconds(self, what):
    """Spent on `what` so far."""
    self.enter(self._what)
    return self._seconds[what]

  def fractions(self):
    """{'perf/time/<what>': share of the wall time so far}."""
    self.enter(self._what)
    wall = sum(self._seconds.values())
    return {f'perf/time/{k}': v / wall for k, v in self._seconds.items()}


class Monitor:
  """Writes the metrics of one run; on process 0 only.

  Args:
    workdir: the run's folder.
    total_steps: for the bar.
    first_step: where this process starts (a resumed run's bar does too).
    tensorboard: also write event files.
    quiet: no bar.
  """

  def __init__(self, workdir, total_steps, first_step=0, tensorboard=True,
               quiet=False):
    self._first = jax.process_index() == 0
    self._path = os.path.join(workdir, 'metrics.jsonl')
    self._writer = None
    if self._first and tensorboard:
      try:
        from clu import metric_writers  # pylint: disable=g-import-not-at-top
        self._writer = metric_writers.SummaryWriter(workdir)
      except ImportError as e:
        logging.warning('no TensorBoard events: %s', e)
    self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, unit='step',
        disable=quiet or not self._first, dynamic_ncols=True, smoothing=.05)
    self._began = _first_time(self._path) or time.time()

  def write(self, step, metrics):
    """Appends {'step', 'time', **metrics}, and the TensorBoard scalars.

    What is not finite is null in the file: JSON has no such numbers.
    """
    if not self._first:
      return
    metrics = {k: float(v) for k, v in metrics.items()}
    line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    text = json.dumps({'step': int(step), 'time': round(time.time(), 3),
                       **line}) + '\n'
    try:
      with open(self._path, 'a') as f:
        f.write(text)
    except OSError as e:
      e.filename = self._path  # A failing write does not say where.
      raise
    if self._writer is not None:
      self._writer.write_scalars(int(step), metrics)

  def goodput(self, steps, step_seconds):
    """Share of the run's whole life that its `steps` had to take.

    From the first line of metrics.jsonl on, over every interruption: work
    that was lost and done again, restarts, compilation, evaluation, waiting.

    Args:
      steps: done so far.
      step_seconds: that one takes, undisturbed.
    """
    return min(1., steps * step_seconds / max(time.time() - self._began, 1e-9))

  def pictures(self, step, images):
    """Writes {name: PIL image} to TensorBoard."""
    if self._writer is None:
      return
    for name, image in images.items():
      self._writer.write_images(int(step), {name: np.asarray(image)[None]})

  def advance(self, steps, text=''):
    """Moves the bar and shows `text` behind it."""
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(steps)

  @property
  def position(self):
    """Steps shown so far."""
    return self._bar.n

  def say(self, text):
    """A line above the bar."""
    if self._first:
      self._bar.write(text)

  def __enter__(self):
    return self

  def __exit__(self, kind, *unused):
    """Ends the bar's line: an error has its own. Flushes, unless there is one.
    """
    self._bar.close()
    if self._writer is not None and kind is None:
      self._writer.flush()
      self._writer.close()


def _first_time(path):
  """Unix time of the first line of a metrics file, or None."""
  try:
    with open(path) as f:
      return json.loads(f.readline()).get('time')
  except (OSError, ValueError):
    return None


class Profiler:
  """A trace of a few steps, for TensorBoard or Perfetto.

  Taken at a step of the config, or whenever somebody makes the file
  WORKDIR/profile_now (looked for when metrics are written; it is deleted).
  Traces lie in WORKDIR/plugins/profile.

  Args:
    workdir: the run's folder.
    start: step before which the trace starts; 0 = only on demand.
    steps: how many are traced.
  """

  def __init__(self, workdir, start, steps):
    self._workdir, self._start, self._steps = workdir, start, steps
    self._stop = None

  def before(self, step):
    """Call before step number `step` (from 0) is started."""
    if self._stop is None and self._start and step == self._start:
      self._open(step)

  def after(self, step, value, asked=False):
    """Call when `step` steps are started; `value` is the last one's result.

    Args:
      step: steps started so far.
      value: waited for before a trace ends.
      asked: look for the file.
    """
    if self._stop is not None and step >= self._stop:
      jax.block_until_ready(value)
      self.close()
    wish = os.path.join(self._workdir, 'profile_now')
    if asked and self._stop is None and os.path.exists(wish):
      os.remove(wish)
      self._open(step)

  def _open(self, step):
    if jax.process_index() == 0:
      jax.profiler.start_trace(self._workdir)
      self._stop = step + self._steps

  def close(self):
    """Ends a trace that is open."""
    if self._stop is not None:
      jax.profiler.stop_trace()
      self._stop = None
