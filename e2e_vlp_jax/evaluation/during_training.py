"""Evaluates a run while it trains, and at its end."""
import jax

from e2e_vlp_jax import discovery
from e2e_vlp_jax.evaluation import evaluators


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
    self._assembly, self._tokenizer = assembly, vocabularies.tokenizer
    self._workdir = workdir
    self._evaluators = evaluators.Evaluators(
        config, assembly.model, vocabularies, assembly.mesh)
    self._evaluators.check_metric('checkpoint.best', config.checkpoint.best)

  def feeder(self, number, pipeline):
    """What adds to the batches of a stage before its steps; None: nothing.

    Args:
      number: of the stage.
      pipeline: the training Pipeline.
    """
    objective = self._assembly.feeding(number)
    if objective is None:
      return None
    kind = discovery.load('e2e_vlp_jax.evaluation', objective.feeder, 'Feeder',
                          'objectives')
    return kind(objective, self._assembly, self._tokenizer, pipeline)

  def due(self, step):
    """Whether to evaluate at `step`; the last one has the final evaluation."""
    return bool(self._every) and step % self._every == 0 and step != self._last

  def run(self, state, monitor, final):
    """{'eval/<name>/<metric>': value}; `final` evaluates more examples."""
    scores, pictures = self._evaluators.run(state.variables, final=final)
    step = int(state.step)
    monitor.evaluated(step, scores, pictures)
    if jax.process_index() == 0:
      evaluators.write(self._workdir, step, scores, pictures)
    return scores
