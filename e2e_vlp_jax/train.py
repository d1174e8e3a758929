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
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.training import distributed
from e2e_vlp_jax.training import monitor as monitor_lib
from e2e_vlp_jax.training import run
from e2e_vlp_jax.training import sharding


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
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
  from e2e_vlp_jax.evaluation import evaluators as evaluators_lib  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.data import pipeline as pipeline_lib  # pylint: disable=g-import-not-at-top

  # --- Data -----------------------------------------------------------------
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  data = pipeline_lib.Pipeline(
      config.data, vocabularies=vocabularies,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True,
      rows=sharding.host_rows(mesh, config.batch_size))
  data.check_labels()
  run.open_workdir(workdir, config, allow_changes)

  # --- Model, optimizer, state ----------------------------------------------
  model = models.build(config, **vocabularies.sizes)
  example = synthetic.synthetic_batch(config.data, batch_size=1,
                                      **vocabularies.sizes)
  assembly = assemble.Assembly(config, model, mesh, example)
  counts = run.count_parameters(assembly.shapes.params)

  # --- Restore, or start ----------------------------------------------------
  saver = checkpoint.Checkpointer(
      workdir, {'config': run.to_dict(config), **vocabularies.to_dict()},
      config.checkpoint)
  state = saver.restore(assembly.state_target())
  if state is None:
    state = assembly.init()
    if config.init_from:
      state, report_ = checkpoint.start_from(
          config.init_from, state,
          lambda loaded: models.adapt(model, loaded, state.params))
      run.report_loaded(workdir, config.init_from, report_)
  first_step = int(state.step)

  # --- Evaluation, monitoring -----------------------------------------------
  evaluators = evaluators_lib.Evaluators(config, model, vocabularies, mesh)
  evaluators.check_metric('checkpoint.best', config.checkpoint.best)
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
      evaluators_lib.write(workdir, step, scores, pictures)
      lines = {}
      for key, value in scores.items():
        _, name, metric = key.split('/', 2)
        lines.setdefault(name, []).append(f'{metric} {value:.3f}')
      for name, found in lines.items():
        monitor.say(f'step {step} {name}: {"  ".join(found)}')
    metrics.update(scores)
    return scores

  # --- Train ----------------------------------------------------------------
  with monitor:
    stop = _StopSignal()
    for number, stage in enumerate(assembly.stages):
      step = int(state.step)
      if step >= stage.end:
        continue
      if step == stage.start and step > 0:
        # A stage starts with a fresh optimizer: the moments of parameters that
        # the last one did not train would be wrong for many steps.
        state = state.replace(opt_state=jax.jit(
            assembly.optimizer(stage).init,
            out_shardings=assembly.shardings.opt_state)(state.params))
      step_fn = assembly.step(number)
      schedule = assembly.schedule(stage)
      batches = data.iterate(step)
      rate, flops = _Rate(clock, mesh), {}
      before, bad = None, []
      while step < stage.end and not stop.requested:
        clock.enter('data')
        t, batch = next(batches)
        batch = sharding.shard_batch(mesh, batch)
        profiler.before(step)
        bucket = batch['image'].shape
        fresh = bucket not in flops
        clock.enter('compile' if fresh else 'step')
        if fresh:
          flops[bucket] = program.flops(step_fn.trace(state, batch).jaxpr)
        state, logged = step_fn(state, batch)
        step += 1
        rate.add(flops[bucket])
        if fresh:  # The first call of a shape compiles: not part of the rate.
          jax.block_until_ready(logged)
          rate.restart()
        # One step is in the making while this host looks at the one before.
        for i, found in ([(t - 1, before)] if before else []) + (
            [(t, logged)] if step == stage.end else []):
          bad = _skipped(workdir, data, i, found, bad)
        before = logged
        log_now = step % config.log_every_steps == 0 or step == stage.end
        if log_now:
          logged = jax.device_get(logged)
          scalars = {f'train/{k}': v for k, v in logged.items()}
          scalars['train/learning_rate'] = float(schedule(step - 1
                                                          - stage.start))
          speed = rate.since_restart()
          if speed:
            speed['images_per_s'] = config.batch_size / speed['step_s']
            speed['goodput'] = monitor.goodput(step, speed['step_s'])
            scalars |= {f'perf/{k}': v for k, v in speed.items()}
          scalars['perf/bad_records'] = len(data.bad_records)
          monitor.write(step, {**scalars, **clock.fractions()})
          monitor.advance(
              step - monitor.position, '  '.join(
                  f'{k} {float(logged[k]):.2f}'
                  for k in ('loss', *assembly.objectives[number]))
              + (f'  {speed["images_per_s"]:.0f} img/s' if speed else ''))
          rate.restart()
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
          rate.restart()
        if (saver.due(step, look_at_clock=log_now) or last or stop.requested
            or config.checkpoint.best and scores):
          clock.enter('save')
          rate.blocked = -clock.seconds('save')
          saver.save(step, state, scores)
          rate.blocked += clock.seconds('save')
          rate.restart()
        elif log_now:
          saver.check()
    profiler.close()
    clock.enter('save')
    saver.wait()
    stop.release()
    if stop.requested:
      monitor.write(int(state.step), clock.fractions())
      if jax.process_index() == 0:
        print(f'stopped at step {int(state.step)}; run the same command to go '
              'on', flush=True)
      raise SystemExit(stop.exit_code)
    evaluate(state, final=True)
    monitor.write(int(state.step), clock.fractions())
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
  """What a step costs, since the last restart.

  Attributes:
    blocked: seconds for which the last save held up the training.
  """

  def __init__(self, clock, mesh):
    self._clock, self.blocked = clock, 0.
    chip = chips.of_device(jax.local_devices()[0])
    self._peak = mesh.size * chip.flops if chip and chip.flops else None
    self.restart()

  def restart(self):
    self._steps, self._flops, self._start = 0, 0, time.perf_counter()
    self._waited = self._clock.seconds('data')

  def add(self, flops):
    """One more step of so many FLOPs."""
    self._steps += 1
    self._flops += flops

  def since_restart(self):
    """{'step_s', 'data_wait', 'tflops_per_s', 'mfu', 'save_blocked_s'}.

    Seconds a step, the share of them waiting for data, and the FLOPs of the
    model as counted by `program.flops`, also as a share of the chips' bfloat16
    peak where that is known. {} without a step.
    """
    if not self._steps:
      return {}
    seconds = time.perf_counter() - self._start
    waited = self._clock.seconds('data') - self._waited
    out = {'step_s': seconds / self._steps, 'data_wait': waited / seconds,
           'tflops_per_s': self._flops / seconds / 1e12,
           'save_blocked_s': self.blocked}
    if self._peak:
      out['mfu'] = self._flops / seconds / self._peak
    return out


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
