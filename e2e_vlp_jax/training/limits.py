"""Limits of numbers in a config, checked before anything is computed."""
import math

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import old_names

# {key: the least value}; where 0 is allowed, it means never, none or off.
_LEAST = {
    'accumulate': 1, 'batch_size': 1, 'eval_batch_size': 1,
    'log_every_steps': 1, 'eval_every_steps': 0, 'max_bad_steps': 0,
    'model.width': 1, 'checkpoint.every_steps': 0,
    'checkpoint.every_minutes': 0, 'checkpoint.keep': 0,
    'checkpoint.keep_every': 0, 'optim.learning_rate': 0,
    'optim.warmup_steps': 0, 'warm_start.schedule.learning_rate': 0,
    'last_stage.schedule.learning_rate': 0}
_LARGEST = 2**63 - 1  # of an integer, in numpy and jax


def check(config):
  """UserError if a number is not finite, too small or too large."""
  for key, value in old_names.flatten(config.to_dict()).items():
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      continue
    least = _LEAST.get(key)
    if not math.isfinite(value):
      raise errors.UserError(f'{key}: {value}; expected a finite number')
    if least is not None and value < least:
      raise errors.UserError(f'{key}: {value}; expected at least {least}')
    if abs(value) > _LARGEST and isinstance(value, int):
      raise errors.UserError(f'{key}: {value}; expected at most {_LARGEST}')
