"""The stages of a run: a warm start, the run proper, and a last stage.

The first and the last are there if the config has them.
"""
from typing import Any, NamedTuple

from e2e_vlp_jax import errors

# A schedule and the options that it reads besides those of every schedule.
SCHEDULES = {'constant': (), 'cosine': ('final_fraction',),
             'linear': ('final_fraction',),
             'step': ('decay_steps', 'decay_factor')}
SCHEDULE_KEYS = ('schedule', 'learning_rate', 'warmup_steps', 'warmup_init',
                 'decay_steps', 'decay_factor', 'final_fraction')


_EXTRA = ('warm_start', 'last_stage')


def unread(schedule):
  """The options of other schedules, which `schedule` does not read."""
  return {key for keys in SCHEDULES.values() for key in keys}.difference(
      SCHEDULES.get(schedule, ()))


class Stage(NamedTuple):
  """Steps start..end with their own objectives and learning rate.

  Attributes:
    start, end: number of steps done before and after the stage.
    objectives: {name: weight}.
    schedule: options of `optim.make_schedule`, at least those of SCHEDULE_KEYS
      that its schedule reads.
    key: config key of the schedule.
  """
  start: int
  end: int
  objectives: dict
  schedule: Any
  key: str


def stages(config):
  """The warm start, the run proper and the last stage, those that have steps.

  `warm_start` and `last_stage` hold steps, objectives and schedule; all other
  settings of the optimizer are those of `optim`. `total_steps` is the sum.

  Raises:
    UserError: impossible numbers of steps, or a schedule with other keys.
  """
  total = config.total_steps
  warm, last = (_steps(config, name) for name in _EXTRA)
  if not 0 <= warm + last <= total or min(warm, last) < 0 or total < 1:
    given = ' and '.join(
        [f'total_steps: {total}'] + [f'{name}.steps: {config[name].steps}'
                                     for name in _EXTRA if name in config])
    least = ' + '.join(f'{name}.steps' for name in _EXTRA if name in config)
    raise errors.UserError(f'{given}; expected 0 <= {least or 0} <= '
                           'total_steps and total_steps >= 1')
  found = [Stage(warm, total - last, dict(config.objectives), config.optim,
                 'optim')]
  for name, start, end in ((_EXTRA[0], 0, warm),
                           (_EXTRA[1], total - last, total)):
    if start < end:
      found.append(Stage(start, end, dict(config[name].objectives),
                         config[name].schedule, f'{name}.schedule'))
  return sorted((s for s in found if s.start < s.end), key=lambda s: s.start)


def _steps(config, name):
  """Steps of the warm start or of the last stage, whose keys are checked."""
  if name not in config:
    return 0
  for key in config[name].schedule:
    if key not in SCHEDULE_KEYS:
      raise errors.UserError(
          f'{name}.schedule.{key}: not part of a schedule; expected '
          f'{", ".join(SCHEDULE_KEYS)}, the rest is set in optim')
  return config[name].steps
