"""Trains a model, or goes on with the run that WORKDIR holds.

  python -m e2e_vlp_jax.train --config configs/e2e_vlp.py:tiny --workdir W

Reads top to bottom in the order in which things happen.
"""
import json
import logging
import os
import signal
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import data as data_lib
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import distributed
from e2e_vlp_jax.training import monitor as monitor_lib
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import run
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step


def train(config, workdir, allow_changes=False):
  """One run from its config; returns the last evaluation's metrics.

  Args:
    config: of the run.
    workdir: made, or gone on with.
    allow_changes: see `run.open_workdir`.
  """
  clock = monitor_lib.Clock('init')
  # TensorFlow feeds the input pipeline only; imported here so that a broken
  # config fails before the seconds that this takes.
  stages = run.stages(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
  from e2e_vlp_jax import evaluation  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.data import pipeline as pipeline_lib  # pylint: disable=g-import-not-at-top

  # --- Data -----------------------------------------------------------------
  tokenizer, labels = data_lib.load_vocabularies(config.data)
  data = pipeline_lib.Pipeline(
      config.data, tokenizer=tokenizer, labels=labels,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True,
      rows=sharding.host_rows(mesh, config.batch_size))
  data.check_labels()
  run.open_workdir(workdir, config, allow_changes)

  # --- Model, optimizer, state ----------------------------------------------
  sizes = dict(vocab_size=tokenizer.vocab_size,
               num_classes=len(labels.classes),
               num_attributes=len(labels.attributes))
  model = models.build(config, **sizes)
  built = [objectives_lib.build(config, mesh, sharding.BATCH_AXES,
                                stage.objectives) for stage in stages]
  requests = objectives_lib.requests(
      {f'{i}/{k}': v for i, b in enumerate(built) for k, v in b.items()})
  example = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)

  def tx_of(stage):
    schedule = optim.make_schedule(stage.optim, stage.end, stage.start)
    return lambda params: optim.make_optimizer(
        config.optim, params, schedule)

  def init(stage):
    return train_step.init_state(model, tx_of(stage), example, requests,
                                 config.seed, ema=config.ema_decay > 0)
  shapes = jax.eval_shape(lambda: init(stages[0]))
  shardings = train_step.state_shardings(shapes, mesh,
                                         tuple(config.sharding_rules))
  counts = run.count_parameters(shapes.params)

  # --- Restore, or start ----------------------------------------------------
  saver = checkpoint.Checkpointer(
      workdir, {'config': run.to_dict(config),
                'tokenizer': tokenizer.to_dict(), 'labels': labels.to_dict()},
      config.checkpoint)
  target = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  state = saver.restore(target)
  if state is None:
    state = jax.jit(lambda: init(stages[0]), out_shardings=shardings)()
    if config.init_from:
      loaded, model_state, _ = checkpoint.load(config.init_from)
      params, report_ = checkpoint.merge(
          state.params, models.adapt(model, loaded, state.params))
      if not report_['loaded']:
        raise errors.UserError(f'init_from: {config.init_from!r} has no '
                               'parameter that fits this model')
      model_state, _ = checkpoint.merge(state.model_state, model_state)
      state = state.replace(params=params, model_state=model_state)
      run.report_loaded(workdir, config.init_from, report_)
  first_step = int(state.step)

  # --- Evaluation, monitoring -----------------------------------------------
  evaluators = evaluation.Evaluators(config, model, tokenizer, labels, mesh)
  monitor = monitor_lib.Monitor(workdir, config.total_steps, first_step,
                                config.tensorboard)
  profiler = monitor_lib.Profiler(workdir, config.profile.start,
                                  config.profile.steps)
  if jax.process_index() == 0:
    monitor.say(
        f'{config.model.name}: {counts["total"]:,} parameters ('
        + ', '.join(f'{k} {v:,}' for k, v in counts.items() if k != 'total')
        + f'); {data.num_examples:,} examples; '
        f'{mesh.size} {jax.devices()[0].platform} device(s)'
        + (f'; resumed at step {first_step}' if first_step else ''))
  metrics = {}

  def evaluate(state, final):
    clock.enter('evaluation')
    scores, pictures = evaluators.run(state.variables, final=final)
    step = int(state.step)
    monitor.write(step, scores)
    monitor.pictures(step, pictures)
    if jax.process_index() == 0:
      evaluation.write(workdir, step, scores, pictures)
      lines = {}
      for key, value in scores.items():
        _, name, metric = key.split('/', 2)
        lines.setdefault(name, []).append(f'{metric} {value:.3f}')
      for name, found in lines.items():
        monitor.say(f'step {step} {name}: {"  ".join(found)}')
    metrics.update(scores)
    return scores

  # --- Train ----------------------------------------------------------------
  stop = _StopSignal()
  for stage, objectives in zip(stages, built):
    step = int(state.step)
    if step >= stage.end:
      continue
    tx = tx_of(stage)(state.params)
    if step == stage.start and step > 0:
      # A stage starts with a fresh optimizer: the moments of parameters that
      # the last one did not train would be wrong for many steps.
      state = state.replace(opt_state=jax.jit(
          tx.init, out_shardings=shardings.opt_state)(state.params))
    step_fn = jax.jit(
        train_step.make_train_step(model, objectives, tx, mesh=mesh,
                                   accumulate=config.accumulate,
                                   ema_decay=config.ema_decay),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)))
    schedule = optim.make_schedule(stage.optim, stage.end, stage.start)
    batches = data.iterate(step)
    rate = _Rate(clock)
    before, bad = None, []
    while step < stage.end and not stop.requested:
      clock.enter('data')
      t, batch = next(batches)
      batch = sharding.shard_batch(mesh, batch)
      profiler.before(step)
      clock.enter('step' if rate.running else 'compile')
      state, logged = step_fn(state, batch)
      step += 1
      if not rate.running:  # The first call compiles.
        jax.block_until_ready(logged)
        rate.restart(step)
      # One step is in the making while this host looks at the one before.
      for number, found in ([(t - 1, before)] if before else []) + (
          [(t, logged)] if step == stage.end else []):
        bad = _skipped(workdir, data, number, found, bad)
      before = logged
      log_now = step % config.log_every_steps == 0 or step == stage.end
      if log_now:
        logged = jax.device_get(logged)
        scalars = {f'train/{k}': v for k, v in logged.items()}
        scalars['train/learning_rate'] = float(schedule(step - 1
                                                        - stage.start))
        speed = rate.since_restart(step)
        if speed:
          scalars['perf/images_per_s'] = config.batch_size / speed['step_s']
          scalars['perf/goodput'] = monitor.goodput(step, speed['step_s'])
          scalars |= {f'perf/{k}': v for k, v in speed.items()}
        scalars['perf/bad_records'] = len(data.bad_records)
        monitor.write(step, {**scalars, **clock.fractions()})
        monitor.advance(
            step - monitor.position, '  '.join(
                f'{k} {float(logged[k]):.2f}' for k in ('loss', *objectives))
            + (f'  {config.batch_size / speed["step_s"]:.0f} img/s'
               if speed else ''))
        rate.restart(step)
      profiler.after(step, logged, asked=log_now)
      if len(bad) >= config.max_bad_steps:
        raise errors.UserError(
            f'step {step}: {len(bad)} updates in a row had non-finite losses '
            f'or gradients; their examples are in {workdir}/nonfinite.jsonl, '
            'the checkpoints are intact; lower optim.learning_rate or look '
            'at these examples')
      stop.look(step)
      last = step == config.total_steps
      every = config.eval_every_steps
      scores = None
      if every and step % every == 0 and not last and not stop.requested:
        scores = evaluate(state, final=False)
        rate.restart(step)
      if (saver.due(step, look_at_clock=log_now) or last or stop.requested
          or config.checkpoint.best and scores):
        clock.enter('save')
        saver.save(step, state, scores)
        rate.restart(step)
      elif log_now:
        saver.check()
  profiler.close()
  clock.enter('save')
  saver.wait()
  stop.release()
  if stop.requested:
    monitor.write(int(state.step), clock.fractions())
    monitor.close()
    if jax.process_index() == 0:
      print(f'stopped at step {int(state.step)}; run the same command to go '
            'on', flush=True)
    raise SystemExit(stop.exit_code)
  evaluate(state, final=True)
  monitor.write(int(state.step), clock.fractions())
  monitor.close()
  return metrics


def _skipped(workdir, data, t, logged, bad):
  """The skipped updates in a row up to batch t; writes down a new one.

  Args:
    workdir: its nonfinite.jsonl gets a line with the batch's examples.
    data: the training Pipeline.
    t: number of the batch.
    logged: metrics of its step.
    bad: batches skipped in a row before it.
  """
  if not np.asarray(logged['skipped']):
    return []
  if jax.process_index() == 0:
    ids = [int(i) for i in data.example_ids(t) if i >= 0]
    with open(os.path.join(workdir, 'nonfinite.jsonl'), 'a') as f:
      f.write(json.dumps({
          'step': t + 1, 'example_ids': ids,
          'examples': [data.name(i) for i in ids],
          'not_finite': sorted(k for k, v in jax.device_get(logged).items()
                               if not np.isfinite(v))}) + '\n')
  return [*bad, t]


class _Rate:
  """Time a step, and how much of it is waiting for data, since a moment."""

  def __init__(self, clock):
    self._clock, self.running = clock, False

  def restart(self, step):
    self._step, self._start = step, time.perf_counter()
    self._waited, self.running = self._clock.seconds('data'), True

  def since_restart(self, step):
    """{'step_s', 'data_wait'}: seconds and share; {} if no step was done."""
    if not self.running or step == self._step:
      return {}
    seconds = time.perf_counter() - self._start
    waited = self._clock.seconds('data') - self._waited
    return {'step_s': seconds / (step - self._step),
            'data_wait': waited / seconds}


class _StopSignal:
  """SIGTERM (preemption) and Ctrl-C end the run after the current step.

  Of several processes each may get the signal at another time, or one of them
  alone; jax's preemption service, which then owns SIGTERM, names a step that
  all of them reach.
  """

  def __init__(self):
    self.requested, self.exit_code = False, 0
    self._several = jax.process_count() > 1
    numbers = [signal.SIGINT] + [signal.SIGTERM] * (not self._several)
    self._before = {number: signal.signal(number, self._handle)
                    for number in numbers}

  def look(self, step):
    """Sets `requested` if the run ends after `step`, the same on all hosts."""
    if self._several and multihost_utils.reached_preemption_sync_point(step):
      self.requested = True

  def release(self):
    """Gives the signals back to whoever called us (a notebook, say)."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if number == signal.SIGINT:
      if self.exit_code:
        signal.default_int_handler(number, frame)  # A second one is meant.
      self.exit_code = 130
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.requested = True


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required', workdir=True)
    parser.add_argument('--allow-changes', action='store_true',
                        help='go on with a run whose config was another')
    args, config = cli.parse(parser, argv)
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    np.set_printoptions(precision=4)
    run.stages(config)  # A senseless config fails before any peer is asked.
    distributed.join()
    train(config, args.workdir, args.allow_changes)


if __name__ == '__main__':
  main()
