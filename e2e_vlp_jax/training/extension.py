"""A run that goes on beyond its planned end."""
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import stages


def describe(config, before):
  """What a larger `total_steps` means for the learning rate, in one line.

  The schedule is that of a run which was planned with the new length. What
  depends on the length, 'cosine' and 'linear', therefore jumps up where the
  shorter run ended.

  Args:
    config: of the longer run.
    before: total_steps of the shorter one.
  """
  stage = stages.stages(config)[-1]
  name, total = stage.schedule.schedule, config.total_steps
  text = f'total_steps: {before} -> {total}: the run goes on'
  if before <= stage.start:
    return text + ', with the stage after its warm start'
  rate = lambda length, step: float(optim.make_schedule(
      stage.schedule, length, stage.start, stage.key)(step - stage.start))
  last, next_ = rate(before, before - 1), rate(total, before)
  if rate(before, before // 2) == rate(total, before // 2):
    how = 'does not depend on it'
  else:
    how = f'is stretched to step {total}, as if planned so from the start'
  return (f'{text}; the schedule {name!r} {how}: learning rate {next_:.3g} '
          f'after step {before}, {last:.3g} was the last one before')
