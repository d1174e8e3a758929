"""Output of a run: progress bar, metrics.jsonl, TensorBoard."""
import contextlib
import json
import math
import os
import time

import jax
import tqdm

from e2e_vlp_jax.training import event_files


class Monitor:
  """Shows and writes the metrics of one run; a context manager.

  Only process 0 does; the others write nothing.

  Args:
    workdir: the run's folder.
    total_steps: length of the bar.
    first_step: step at which this process, and its bar, starts.
    tensorboard: also write event files.
  """

  def __init__(self, workdir, total_steps, first_step=0, tensorboard=True):
    self._first = jax.process_index() == 0
    self._path = os.path.join(workdir, 'metrics.jsonl')
    self._events = (event_files.EventFiles(workdir)
                    if self._first and tensorboard else None)
    self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, unit='step',
        disable=not self._first, dynamic_ncols=True, smoothing=.05)
    self._began = _first_time(self._path) or time.time()

  def __enter__(self):
    return self

  def __exit__(self, kind, *unused):
    """Closes bar and writer without masking an exception in flight."""
    self._bar.close()
    if self._events is not None:
      with contextlib.suppress(*[Exception] if kind else []):
        self._events.close()

  def write(self, step, metrics):
    """Appends {'step', 'time', **metrics}; writes the TensorBoard scalars.

    Numbers that are not finite are null in the file, as JSON has none.
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
      e.filename = self._path  # Errors of `write` do not name the file.
      raise
    if self._events is not None:
      self._events.scalars(int(step), metrics)

  def log(self, step, objectives, metrics, performance):
    """Writes the metrics of a step; shows the main ones beside the bar.

    Args:
      step: steps done.
      objectives: names of the trained objectives.
      metrics: {name: scalar} of the step.
      performance: {'perf/<name>': scalar}, of `MeteredStep.speed` and others.
    """
    shown = [f'{k} {float(metrics[k]):.2f}' for k in ('loss', *objectives)]
    if 'perf/step_s' in performance:
      performance = {**performance, 'perf/goodput': self._goodput(
          step, performance['perf/step_s'])}
      shown.append(f'{performance["perf/images_per_s"]:.0f} img/s')
    self.write(step, {**{f'train/{k}': v for k, v in metrics.items()},
                      **performance})
    self._bar.set_postfix_str('  '.join(shown), refresh=False)
    self._bar.update(step - self._bar.n)

  def evaluated(self, step, scores, pictures):
    """Writes and shows an evaluation.

    Args:
      step: steps done.
      scores: {'eval/<evaluator>/<metric>': value}.
      pictures: {name: PIL image}, for TensorBoard.
    """
    self.write(step, scores)
    if self._events is not None:
      self._events.images(int(step), pictures)
    lines = {}
    for key, value in scores.items():
      _, name, metric = key.split('/', 2)
      lines.setdefault(name, []).append(f'{metric} {value:.3f}')
    for name, found in lines.items():
      self.say(f'step {step} {name}: {"  ".join(found)}')

  def say(self, text):
    """Prints a line above the bar, unless it is empty."""
    if self._first and text:
      self._bar.write(text)

  def _goodput(self, steps, step_seconds):
    """Share of the run's total time that its steps alone would have taken.

    The total counts from the first line of metrics.jsonl and includes every
    interruption: lost steps, restarts, compilation, evaluation, waiting.

    Args:
      steps: number of steps so far.
      step_seconds: time of one undisturbed step.
    """
    return min(1., steps * step_seconds / max(time.time() - self._began, 1e-9))


def _first_time(path):
  """Unix time of the first line of a metrics file, or None."""
  try:
    with open(path) as f:
      return json.loads(f.readline()).get('time')
  except (OSError, ValueError):
    return None
