"""Evaluates a run while it trains, and at its end."""
import jax

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import class_counts
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.evaluation import label_pictures
from e2e_vlp_jax.evaluation import report
from e2e_vlp_jax.training import early_stop
from e2e_vlp_jax.training import stop_signal


_LABELS = 8  # pictures of labels


class Evaluation:
  """Runs the config's evaluators; writes and shows their scores.

  Args:
    config: of the run.
    workdir: its folder, which gets samples and the report.
    assembly: a `training.assemble.Assembly`.
    vocabularies: the run's `Vocabularies`.
    held: meta of the checkpoint that is resumed; {} without.

  Attributes:
    early_stop: an `EarlyStop`, which looks at every evaluation but the last.

  Raises:
    UserError: an evaluator or its data do not fit, or `checkpoint.best` or
      `early_stop.metric` names no metric of theirs.
  """

  def __init__(self, config, workdir, assembly, vocabularies, held):
    self._every, self._last = config.eval_every_steps, config.total_steps
    self._workdir, self._config, self._assembly = workdir, config, assembly
    self._labels = vocabularies.labels
    self._tokenizer = vocabularies.tokenizer
    self._evaluators = evaluators.Evaluators(
        config, assembly.model, vocabularies, assembly.mesh)
    self._evaluators.check_metric('checkpoint.best', config.checkpoint.best)
    self.early_stop = early_stop.EarlyStop(config.early_stop)
    self.early_stop.restore(held)
    if config.early_stop.patience:
      self._evaluators.check_metric('early_stop.metric',
                                    config.early_stop.metric)
      if not self._every:
        raise errors.UserError('early_stop.patience: '
                               f'{config.early_stop.patience}, but '
                               'eval_every_steps is 0; expected evaluations '
                               'during training')

  def show_labels(self, data):
    """Draws boxes of the first batch; names classes that have none at all.

    Before the first step, so that an hour is not spent on wrong labels.

    Args:
      data: the training Pipeline.
    """
    config = self._config
    ops = dict(pp.bind(config.data.pp_train))
    if jax.process_index() or not {'boxes', 'grounding'} & set(ops):
      return
    line = class_counts.without_boxes(config.data, self._labels)
    if line:
      print(line, flush=True)
    count = min(_LABELS, config.samples.count)
    if count and label_pictures.write(self._workdir, data.batch(0),
                                      self._labels, self._tokenizer, count):
      report.write_report(self._workdir)
      print('labels of the first batch are drawn in '
            f'{self._workdir}/{label_pictures.FOLDER}', flush=True)

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

  def run(self, state, monitor, final, stop):
    """Evaluates `state`; `final` evaluates more examples.

    Args:
      state: TrainState.
      monitor: shows and writes the scores.
      final: whether this is the evaluation at the end.
      stop: a StopSignal, at which the evaluation is broken off.

    Returns:
      {'eval/<name>/<metric>': value}, or None if it was broken off.
    """
    details = {}
    step = int(state.step)
    try:
      scores, pictures = self._evaluators.run(
          state.variables, final=final, details=details,
          between=stop.break_off, left_out=monitor.say)
    except stop_signal.Stopped:
      monitor.say(f'step {step}: told to stop, evaluation broken off')
      return None
    monitor.evaluated(step, scores, pictures)
    if jax.process_index() == 0:
      evaluators.write(self._workdir, step, scores, pictures, details)
    if not final:
      self.early_stop.look(step, scores)
    if self.early_stop.reached:
      monitor.say(f'step {step}: {self.early_stop.why()}')
    return scores
