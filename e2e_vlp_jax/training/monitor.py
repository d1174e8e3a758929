"""What a person and a script see of a run: bar, metrics.jsonl, TensorBoard.

clu is used here and nowhere else, and only when a writer is made: it needs
TensorFlow, which machines that only compute may lack.
"""
import collections
import json
import logging
import os
import time

import jax
import numpy as np
import tqdm


class Monitor:
  """Writes metrics of one run; on process 0 only.

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
    self._seconds = collections.Counter()
    self._start = time.perf_counter()

  def write(self, step, metrics):
    """Appends {'step': step, **metrics} and the TensorBoard scalars."""
    if not self._first:
      return
    metrics = {k: float(v) for k, v in metrics.items()}
    with open(self._path, 'a') as f:
      f.write(json.dumps({'step': int(step), **metrics}) + '\n')
    if self._writer is not None:
      self._writer.write_scalars(int(step), metrics)

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

  def timed(self, what):
    """Context manager that adds to the time spent on `what`."""
    return _Timed(self._seconds, what)

  def fractions(self):
    """{'perf/time/<what>': share of the wall time so far}."""
    wall = time.perf_counter() - self._start
    return {f'perf/time/{k}': v / wall for k, v in self._seconds.items()}

  def close(self):
    self._bar.close()
    if self._writer is not None:
      self._writer.flush()
      self._writer.close()


class _Timed:

  def __init__(self, seconds, what):
    self._seconds, self._what = seconds, what

  def __enter__(self):
    self._start = time.perf_counter()

  def __exit__(self, *unused):
    self._seconds[self._what] += time.perf_counter() - self._start
