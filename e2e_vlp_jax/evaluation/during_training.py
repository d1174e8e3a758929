"""Evaluates a run while it trains, and at its end."""
import jax

from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.training import stop_signal


class Evaluation:
  """Runs the config's evaluators; writes and shows their scores.

  Args:
    config: of the run.
    workdir: its folder, which gets samples and the report.
    assembly: a `training.assemble.Assembly`.
    vocabularies: the run's `Vocabularies`.

  Raises:
    UserError: an evaluator or its data do not fit, or `checkpoint.best` names
      no metric of theirs.
  """

  def __init__(self, config, workdir, assembly, vocabularies):
    self._every, self._last = config.eval_every_steps, config.total_steps
    self._workdir = workdir
    self._evaluators = evaluators.Evaluators(
        config, assembly.model, vocabularies, assembly.mesh)
    self._evaluators.check_metric('checkpoint.best', config.checkpoint.best)

  def due(self, step):
    """Whether to evaluate at `step`; the last one has the final evaluation."""
    return bool(self._every) and step % self._every == 0 and step != self._last

  def run(self, state, monitor, final, stop=None):
    """Evaluates `state`; `final` evaluates more examples.

    Args:
      state: TrainState.
      monitor: shows and writes the scores.
      final: whether this is the evaluation at the end.
      stop: a StopSignal, at which the evaluation is broken off.

    Returns:
      {'eval/<name>/<metric>': value}, or None if it was broken off.
    """
    step = int(state.step)
    try:
      scores, pictures = self._evaluators.run(
          state.variables, final=final,
          between=stop.break_off if stop else lambda: None)
    except stop_signal.Stopped:
      monitor.say(f'step {step}: told to stop, evaluation broken off')
      return None
    monitor.evaluated(step, scores, pictures)
    if jax.process_index() == 0:
      evaluators.write(self._workdir, step, scores, pictures)
    return scores
