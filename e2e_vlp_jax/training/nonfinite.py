"""Watches for updates that were skipped because they were not finite."""
import json
import os

import jax
import numpy as np

from e2e_vlp_jax import errors


class NonFinite:
  """Logs skipped updates and ends a run that has too many.

  Args:
    workdir: its nonfinite.jsonl gets a line for each skipped update, with
      the batch's examples.
    data: the training Pipeline.
    limit: skipped updates in a row that end the run.
    in_a_row: skipped updates directly before, in the run that is resumed.
  """

  def __init__(self, workdir, data, limit, in_a_row=0):
    self._path = os.path.join(workdir, 'nonfinite.jsonl')
    self._data, self._limit = data, limit
    # A run that goes on gets one more try: its learning rate may be lower now.
    self._in_a_row, self._unseen = min(in_a_row, limit - 1), None

  def look(self, t, metrics, wait=False):
    """Inspects the metrics of the previous step while this one runs.

    The device therefore never waits for the host.

    Args:
      t: number of the batch.
      metrics: of its step.
      wait: inspect this step's metrics too.

    Raises:
      UserError: `limit` updates in a row were skipped.
    """
    if self._unseen:
      self._inspect(*self._unseen)
    self._unseen = None if wait else (t, metrics)
    if wait:
      self._inspect(t, metrics)
    if self._in_a_row >= self._limit:
      raise errors.UserError(
          f'step {t + 1}: {self._in_a_row} updates in a row had non-finite '
          f'losses or gradients; their examples are in {self._path}, the '
          'checkpoints are intact; lower optim.learning_rate or look at these '
          'examples')

  def _inspect(self, t, metrics):
    if not np.asarray(metrics['skipped']):
      self._in_a_row = 0
      return
    self._in_a_row += 1
    if jax.process_index():
      return
    ids = [int(i) for i in self._data.example_ids(t) if i >= 0]
    not_finite = sorted(k for k, v in jax.device_get(metrics).items()
                        if not np.isfinite(v))
    with open(self._path, 'a', encoding='utf-8') as f:
      f.write(json.dumps({
          'step': t + 1, 'example_ids': ids,
          'examples': [self._data.name(i) for i in ids],
          'not_finite': not_finite}) + '\n')
