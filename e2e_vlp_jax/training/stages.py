"""The stages of a run: a warm start, if the config has one, and the rest."""
from typing import Any, NamedTuple

from e2e_vlp_jax import errors

# A schedule and the options that it reads besides those of every schedule.
SCHEDULES = {'constant': (), 'cosine': ('final_fraction',),
             'linear': ('final_fraction',),
             'step': ('decay_steps', 'decay_factor')}
SCHEDULE_KEYS = ('schedule', 'learning_rate', 'warmup_steps', 'warmup_init',
                 'decay_steps', 'decay_factor', 'final_fraction')


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
  """The warm start, if the config has one, and the run proper.

  `warm_start` holds steps, objectives and schedule; all other settings of the
  optimizer are those of `optim`.

  Raises:
    UserError: impossible numbers of steps, or a schedule with other keys.
  """
  total = config.total_steps
  warm = config.warm_start.steps if 'warm_start' in config else 0
  if not 0 <= warm <= total or total < 1:
    raise errors.UserError(f'total_steps: {total} and warm_start.steps: '
                           f'{warm}; expected 0 <= warm_start.steps <= '
                           'total_steps and total_steps >= 1')
  if 'warm_start' in config:
    for key in config.warm_start.schedule:
      if key not in SCHEDULE_KEYS:
        raise errors.UserError(
            f'warm_start.schedule.{key}: not part of a schedule; expected '
            f'{", ".join(SCHEDULE_KEYS)}, the rest is set in optim')
  main = Stage(warm, total, dict(config.objectives), config.optim, 'optim')
  if not warm:
    return [main]
  first = Stage(0, warm, dict(config.warm_start.objectives),
                config.warm_start.schedule, 'warm_start.schedule')
  return [first, main] if warm < total else [first]
