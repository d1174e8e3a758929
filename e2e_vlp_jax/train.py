"""Trains a model, or goes on with the run that WORKDIR holds.

  python -m e2e_vlp_jax.train --config configs/e2e_vlp.py:tiny --workdir W

Reads top to bottom in the order in which things happen.
"""
import logging
import os
import signal
import time

import jax
import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import data as data_lib
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import monitor as monitor_lib
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import run
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step


def train(config, workdir):
  """One run from its config; returns the last evaluation's metrics."""
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
      host_index=jax.process_index(), host_count=jax.process_count())
  data.check_labels()
  run.open_workdir(workdir, config)

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
      keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
  target = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings)
  state = saver.restore(target)
  if state is None:
    state = jax.jit(lambda: init(stages[0]), out_shardings=shardings)()
    if config.init_from:
      loaded, model_state, _ = checkpoint.load(config.init_from)
      params, report_ = checkpoint.merge(state.params, loaded)
      if not report_['loaded']:
        raise errors.UserError(f'init_from: {config.init_from!r} has no '
                               'parameter that fits this model')
      model_state, _ = checkpoint.merge(state.model_state, model_state)
      state = state.replace(params=params, model_state=model_state)
      for kind, names in report_.items():
        print(f'init_from {config.init_from}: {kind} {len(names)}'
              + (f': {", ".join(names[:5])}' if kind != 'loaded' and names
                 else ''), flush=True)
  first_step = int(state.step)

  # --- Evaluation, monitoring -----------------------------------------------
  evaluators = evaluation.Evaluators(config, model, tokenizer, labels, mesh)
  monitor = monitor_lib.Monitor(workdir, config.total_steps, first_step,
                                config.tensorboard)
  if jax.process_index() == 0:
    monitor.say(
        f'{config.model.name}: {counts["total"]:,} parameters ('
        + ', '.join(f'{k} {v:,}' for k, v in counts.items() if k != 'total')
        + f'); {data.num_examples:,} examples; '
        f'{mesh.size} {jax.devices()[0].platform} device(s)'
        + (f'; resumed at step {first_step}' if first_step else ''))
  metrics = {}

  def evaluate(state, final):
    with monitor.timed('evaluation'):
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
        train_step.make_train_step(model, objectives, tx,
                                   accumulate=config.accumulate,
                                   ema_decay=config.ema_decay),
        donate_argnums=0, out_shardings=(shardings, None))
    schedule = optim.make_schedule(stage.optim, stage.end, stage.start)
    batches = data.iterate(step)
    clock, since, waited = None, step, 0.
    while step < stage.end:
      before = time.perf_counter()
      with monitor.timed('data'):
        _, batch = next(batches)
        batch = sharding.shard_batch(mesh, batch)
      waited += time.perf_counter() - before
      with monitor.timed('compile' if clock is None else 'step'):
        state, logged = step_fn(state, batch)
        step += 1
        if clock is None:  # The first call compiles: keep it out of the rate.
          jax.block_until_ready(logged)
          clock, since, waited = time.perf_counter(), step, 0.
      log_now = step % config.log_every_steps == 0 or step == stage.end
      if log_now:
        with monitor.timed('step'):
          logged = jax.device_get(logged)
        seconds = max(time.perf_counter() - clock, 1e-9)
        rate = (step - since) * config.batch_size / seconds
        scalars = {f'train/{k}': v for k, v in logged.items()}
        scalars['train/learning_rate'] = float(schedule(step - 1
                                                        - stage.start))
        if step > since:
          scalars['perf/images_per_s'] = rate
          scalars['perf/data_wait'] = waited / seconds
        monitor.write(step, {**scalars, **monitor.fractions()})
        monitor.advance(
            step - monitor.position, '  '.join(
                f'{k} {float(logged[k]):.2f}' for k in ('loss', *objectives))
            + f'  {rate:.0f} img/s')
        clock, since, waited = time.perf_counter(), step, 0.
        if int(state.bad_steps) >= config.max_bad_steps:
          raise errors.UserError(
              f'step {step}: {int(state.bad_steps)} updates in a row had '
              'non-finite gradients; lower optim.learning_rate or look at '
              'the data (checkpoints in the workdir are intact)')
      every = config.eval_every_steps
      at_eval = every and step % every == 0 and step < config.total_steps
      every = config.checkpoint.every_steps
      if step == config.total_steps or stop.requested or (
          every and step % every == 0):
        with monitor.timed('save'):
          saver.save(step, state)
      if stop.requested:
        saver.wait()
        monitor.close()
        print(f'stopped at step {step}; run the same command to go on',
              flush=True)
        raise SystemExit(stop.exit_code)
      if at_eval:
        evaluate(state, final=False)
        clock, since, waited = time.perf_counter(), step, 0.
  saver.wait()
  stop.release()
  evaluate(state, final=True)
  monitor.close()
  return metrics


class _StopSignal:
  """SIGTERM (preemption) and Ctrl-C end the run after the current step."""

  def __init__(self):
    self.requested, self.exit_code = False, 0
    self._before = {number: signal.signal(number, self._handle)
                    for number in (signal.SIGTERM, signal.SIGINT)}

  def release(self):
    """Gives the signals back to whoever called us (a notebook, say)."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if self.requested and number == signal.SIGINT:
      signal.default_int_handler(number, frame)  # A second Ctrl-C is meant.
    self.requested = True
    self.exit_code = 0 if number == signal.SIGTERM else 130


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required', workdir=True)
    args, config = cli.parse(parser, argv)
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    np.set_printoptions(precision=4)
    train(config, args.workdir)


if __name__ == '__main__':
  main()
