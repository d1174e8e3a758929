"""Ends a run when a metric of its evaluations no longer improves."""
import math

from e2e_vlp_jax import errors


class EarlyStop:
  """Counts the evaluations since the best one; higher is better.

  Args:
    options: `config.early_stop`: `metric`, 'eval/<name>/<metric>', and
      `patience`, the number of evaluations in a row without a better score
      after which the run ends; 0 = it never ends early.

  Attributes:
    reached: whether the run ends.

  Raises:
    UserError: a patience without a metric, or below 0.
  """

  def __init__(self, options):
    self._metric, self._patience = options.metric, options.patience
    self._best, self._best_step, self._waited = None, None, 0
    if self._patience < 0 or self._patience and not self._metric:
      raise errors.UserError(
          f'early_stop: patience {self._patience} and metric '
          f'{self._metric!r}; expected a number of evaluations and '
          "'eval/<name>/<metric>', or patience 0 for no early stop")

  @property
  def reached(self):
    return 0 < self._patience <= self._waited

  def look(self, step, scores):
    """Takes the scores of an evaluation, {'eval/<name>/<metric>': value}.

    Raises:
      UserError: the metric is not among them.
    """
    if not self._patience:
      return
    if self._metric not in scores:
      raise errors.UserError(f'early_stop.metric: no metric {self._metric!r}'
                             + errors.nearest(self._metric, scores))
    score = float(scores[self._metric])
    # NaN is not better than anything.
    if self._best is None and math.isfinite(score) or (
        self._best is not None and score > self._best):
      self._best, self._best_step, self._waited = score, int(step), 0
    else:
      self._waited += 1

  def why(self):
    """Why the run ends, in one line."""
    best = ('no finite value' if self._best is None else
            f'{self._best:.4f} at step {self._best_step}')
    return (f'early_stop: {self._metric} has not improved for {self._waited} '
            f'evaluations (patience {self._patience}); best: {best}')

  def to_dict(self):
    """The state, as a part of a checkpoint's meta; {} if it is off."""
    if not self._patience:
      return {}
    return {'early_stop': {'metric': self._metric, 'best': self._best,
                           'step': self._best_step, 'waited': self._waited}}

  def restore(self, meta):
    """Continues with the state in a checkpoint's meta, if it has one.

    Another metric begins anew; the patience is this run's own.
    """
    held = meta.get('early_stop', {})
    if held.get('metric') == self._metric:
      self._best, self._best_step = held['best'], held['step']
      self._waited = held['waited']
