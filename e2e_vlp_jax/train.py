"""Trains a model, or continues the run in WORKDIR.

  python -m e2e_vlp_jax.train --config configs/e2e_vlp.py:tiny --workdir W
"""
import contextlib
import logging

import jax

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.training import allocator
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import checkpointer
from e2e_vlp_jax.training import compiler
from e2e_vlp_jax.training import distributed
from e2e_vlp_jax.training import limits
from e2e_vlp_jax.training import monitor as monitor_lib
from e2e_vlp_jax.training import nonfinite
from e2e_vlp_jax.training import profiler as profiler_lib
from e2e_vlp_jax.training import progress
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import stages
from e2e_vlp_jax.training import stop_signal
from e2e_vlp_jax.training import workdir as workdir_lib


def train(config, workdir, allow_changes=False):
  """Trains to the config's last step; returns the final evaluation's scores.

  Args:
    config: of the run.
    workdir: folder or gs://BUCKET/NAME; an interrupted run in it is continued.
    allow_changes: see `workdir_lib.open_workdir`.

  Raises:
    UserError: a part does not fit, WORKDIR is in use, or no update is finite.
    SystemExit: a signal stopped the run; its state is saved.
  """
  clock = progress.Clock('init')
  with contextlib.ExitStack() as stack:
    vocabularies, data, assembly, workdir = _prepare(config, workdir,
                                                     allow_changes, stack)
    mesh = assembly.mesh
    saver, state, evaluation = _start(config, workdir, assembly, vocabularies,
                                      data, stack)
    monitor = stack.enter_context(monitor_lib.Monitor(
        workdir, config.total_steps, int(state.step), config.tensorboard))
    monitor.say(assembly.describe(data, int(state.step)))
    early_stop = evaluation.early_stop
    skipped = nonfinite.NonFinite(workdir, data, config.max_bad_steps,
                                  int(state.bad_steps))

    stop = stack.enter_context(stop_signal.StopSignal())
    with profiler_lib.Profiler(workdir, **config.profile) as profiler:
      for number, stage in enumerate(assembly.stages):
        if (int(state.step) >= stage.end or stop.requested
            or early_stop.reached):
          continue
        state = assembly.begin_stage(number, state)
        run_step = progress.MeteredStep(assembly.step(number), clock, mesh,
                                        evaluation.feeder(number, data))
        for t, batch in clock.waiting('data', data.iterate(int(state.step))):
          profiler.before(t)
          state, metrics = run_step(state, sharding.shard_batch(mesh, batch))
          step = t + 1
          stage_ends = step == stage.end
          log = stage_ends or step % config.log_every_steps == 0
          if log:
            metrics = {**jax.device_get(metrics),
                       'learning_rate': assembly.learning_rate(number, t)}
            monitor.log(step, assembly.objectives[number], metrics, {
                'perf/bad_records': len(data.bad_records),
                **run_step.speed(), **clock.fractions()})
            run_step.restart()
          profiler.after(step, metrics, look_for_file=log)
          stop.look()
          scores = None
          if evaluation.due(step) and not stop.requested:
            with run_step.interrupted('evaluation'):
              scores = evaluation.run(state, monitor, final=False, stop=stop)
          ends = stop.requested or early_stop.reached
          skipped.look(t, metrics, wait=stage_ends or ends)
          if (saver.due(step, scores, look_at_clock=log) or ends
              or step == config.total_steps):
            with run_step.interrupted('save'):
              saver.save(step, state, scores, **early_stop.to_dict())
          elif log:
            saver.check()
          if stage_ends or ends:
            break
      clock.enter('save')
      saver.wait()

    return _end(state, saver, evaluation, monitor, clock, stop)


def _prepare(config, workdir, allow_changes, stack):
  """Builds all that can reveal a wrong config, before anything is computed.

  WORKDIR is kept for this run until `stack`, an ExitStack, is left.

  Returns:
    Vocabularies, the training Pipeline of this host's rows, the Assembly, and
    WORKDIR as `workdir_lib.only_run` gives it.
  """
  limits.check(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
  # TensorFlow takes seconds to import: a wrong mesh or batch size fails first.
  from e2e_vlp_jax.data import pipeline  # pylint: disable=g-import-not-at-top
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  data = pipeline.Pipeline(
      config.data, vocabularies=vocabularies,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True,
      rows=sharding.host_rows(mesh, config.batch_size))
  data.check_labels()
  workdir = stack.enter_context(workdir_lib.only_run(workdir))
  workdir_lib.open_workdir(workdir, config, allow_changes)
  sizes = vocabularies.sizes
  return vocabularies, data, assemble.Assembly(
      config, models.build(config, **sizes), mesh,
      synthetic.synthetic_batch(config.data, batch_size=1, **sizes)), workdir


def _start(config, workdir, assembly, vocabularies, data, stack):
  """Restores the newest checkpoint, or starts and draws labels.

  Returns:
    the Checkpointer, which `stack` closes, the TrainState, and the run's
    `during_training.Evaluation`.
  """
  saver = stack.enter_context(checkpointer.Checkpointer(
      workdir, {'config': workdir_lib.to_dict(config),
                **vocabularies.to_dict()}, config.checkpoint))
  state = saver.restore(assembly.state_target())
  if state is None:
    state = assembly.init()
    if config.init_from:
      state, report = checkpoint.start_from(
          config.init_from, state, lambda loaded: models.adapt(
              assembly.model, loaded, state.params))
      workdir_lib.report_loaded(workdir, config.init_from, report)
  # It imports TensorFlow.
  from e2e_vlp_jax.evaluation import during_training  # pylint: disable=g-import-not-at-top
  evaluation = during_training.Evaluation(config, workdir, assembly,
                                          vocabularies, saver.held)
  if not int(state.step):
    evaluation.show_labels(data)
  return saver, state, evaluation


def _end(state, saver, evaluation, monitor, clock, stop):
  """Evaluates the last step, which is saved; returns the scores.

  Raises:
    SystemExit: a signal stopped the training, or does so meanwhile.
  """
  scores = None
  if not stop.requested:
    clock.enter('evaluation')
    scores = evaluation.run(state, monitor, final=True, stop=stop)
  if scores is not None:
    monitor.say(saver.describe_best())
  monitor.write(int(state.step), clock.fractions())
  if scores is None:
    monitor.say(f'stopped at step {int(state.step)}; run the same command to '
                'continue')
    raise SystemExit(stop.exit_code)
  return scores


def main(argv=None):
  with errors.exit_on_user_error(distributed.leave):
    parser = cli.parser(__doc__, config='required', workdir=True)
    parser.add_argument('--allow-changes', action='store_true',
                        help='continue a run whose config has changed')
    parser.add_argument('--deterministic', action='store_true',
                        help='on a GPU: the same bits in every run, slower')
    parser.add_argument('--check', action='store_true',
                        help='only check the arguments, as launchers do')
    args, config = cli.parse(parser, argv)
    logging.basicConfig(level=logging.WARNING)
    limits.check(config)  # A wrong config fails before the processes join.
    stages.stages(config)
    if not args.check:
      compiler.set_flags(args.deterministic)
      distributed.join()
      compiler.use_cache()
      train(config, args.workdir, args.allow_changes)


if __name__ == '__main__':
  allocator.keep_freed_memory()
  main()
