"""Measures how fast a config trains on this machine and where time goes.

  python -m e2e_vlp_jax.benchmark --config configs/e2e_vlp.py:detr \\
      --batch-size 2 --steps 10 --peer hf_detr

Times the train step that `train` would run, on one random batch, without
TensorFlow and without data; `--data` also reads the config's own data. `--peer`
also times another library's step on the same batch, in turns with ours, and
`--score` the scoring of image-text pairs. A peer that does not train is timed
in turns with our inference. `--input` measures the input pipeline instead.
docs/pods.md explains the figures.
"""
import concurrent.futures
import json
import os
import tempfile
import time

import jax
import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import models
from e2e_vlp_jax import peers
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import predictor
from e2e_vlp_jax.peers import process
from e2e_vlp_jax.profiling import by_module
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.profiling import roofline
from e2e_vlp_jax.profiling import timing
from e2e_vlp_jax.tasks import base as tasks
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import compiler
from e2e_vlp_jax.training import sharding

_WARM_UP = 2  # steps before the clock: allocators, caches, autotuning
_TRACED = 2   # steps under the profiler
PEER_TIMEOUT = 180.  # seconds that an answer of a peer may take


# --- The train step ---------------------------------------------------------
def benchmark(config, steps=20, peer=None, data=False, score=False,
              say=print, peer_timeout=PEER_TIMEOUT):
  """Times the train step of `config` on the attached devices.

  Args:
    config: config of a training run; its last stage is timed, on one random
      batch of the largest bucket.
    steps: timed steps.
    peer: name of a peer (`peers.names`) to time in turns with ours.
    data: also train on the config's own data and measure how long steps wait.
    score: also time the scoring of image-text pairs.
    say: called with lines about the progress.
    peer_timeout: seconds that any answer of the peer may take; then it is
      given up, and the report says so.

  Returns:
    JSON-able dict, the content of `--json` (docs/pods.md).

  Raises:
    UserError: the mesh, the batch, the peer or the data does not fit.
  """
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  sizes = vocabularies.sizes
  bucket = synthetic.largest_bucket(config.data)
  batch = synthetic.synthetic_batch(
      config.data, batch_size=config.batch_size, bucket=bucket, **sizes)
  theirs = peer and process.Process(peer, config, batch, sizes, peer_timeout)
  assembly = assemble.Assembly(config, models.build(config, **sizes), mesh,
                               batch)
  chip = chips.of_device(jax.devices()[0])

  say(f'{mesh.size} x {chip.name}: compiling')
  ours = _OurStep(assembly, batch)
  for _ in range(_WARM_UP):
    ours.step()
  memory = timing.peak_memory()
  if theirs:
    say(f'against {theirs.version or theirs.name}')
    for _ in range(_WARM_UP):
      theirs.step()
  times = []
  with timing.compilations() as compiled:
    for _ in range(steps):
      # In turns, so that other work on the machine slows both equally.
      times.append(timing.seconds(ours.step))
      if theirs:
        theirs.step()

  seconds = float(np.mean(times))
  ahead = timing.seconds(lambda: ours.run(steps)) / steps
  peak, peak_from = timing.peak_flops(chip, mesh.size, config.dtype)
  bound = ours.roofline(chip)
  say('profiling')
  parts, operations = ours.parts()
  report = {
      'config': config.model.name, 'device': chip.name, 'devices': mesh.size,
      'mesh': dict(mesh.shape), 'batch_size': config.batch_size,
      'accumulate': config.accumulate,
      'bucket': list(config.data.buckets[bucket]), 'dtype': config.dtype,
      'parameters': program.count_parameters(assembly.shapes.params)['total'],
      'steps': steps, 'images_per_s': config.batch_size / seconds,
      'step_time_s': timing.percentiles(times),
      'ahead_images_per_s': config.batch_size / ahead,
      'compile_s': ours.compile_s, 'flops_per_step': ours.flops,
      'mfu': ours.flops / seconds / peak,
      'mfu_of': peak_from, 'roofline': {
          **bound, 'share': bound['step_time_s'] and (
              bound['step_time_s'] / seconds)},
      'recompilations': len(compiled), 'operations_per_step': operations,
      'peak_memory_bytes': memory, 'parts': parts, 'data_wait': None,
      'score_pairs_per_s': None, 'peer': None}
  if data:
    report |= _with_data(assembly, ours, vocabularies, steps)
  if score:
    report['score_pairs_per_s'] = _scoring(assembly.model, ours, steps)
  if theirs:
    report['peer'] = _peer(theirs, seconds, config.batch_size)
  return report


class _OurStep:
  """The compiled train step, its current state, and one batch.

  Attributes:
    state: TrainState, after the steps so far.
    batch: the batch, on the devices.
    flops: FLOPs of a step.
    compile_s: seconds of tracing and compiling.
  """

  def __init__(self, assembly, batch):
    mesh, size = assembly.mesh, len(batch['image'])
    rows = sharding.host_rows(mesh, size)
    self.batch = sharding.shard_batch(mesh, {
        k: v[rows] for k, v in assembly.fed(batch).items()})
    start = time.perf_counter()
    traced = assembly.trace(size)
    self.flops = program.flops(traced.jaxpr)
    self._devices = mesh.size
    self._compiled = traced.lower().compile()
    self.compile_s = time.perf_counter() - start
    self.state = assembly.init()

  def step(self):
    """Runs one step and waits until it is finished."""
    self.run(1)

  def run(self, steps):
    """Runs steps one after the other, as `train` does, and waits at the end."""
    for _ in range(steps):
      self.state, metrics = self._compiled(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))

  def roofline(self, chip):
    """The least time that a step can take; see profiling/roofline.py."""
    hlo = self._compiled.as_text()
    return roofline.bound(
        chip, self.flops / self._devices, program.memory_traffic(hlo),
        sum(c.traffic for c in program.collectives(hlo)))

  def parts(self):
    """What a profiler sees of a step; see profiling/by_module.py.

    Returns:
      {part: share of a step}, largest first, and the operations of a step.
    """
    operations = by_module.of_operations(self._compiled.as_text(),
                                         set(self.state.params))

    def several_steps():
      for _ in range(_TRACED):
        self.step()
    with tempfile.TemporaryDirectory() as folder:
      by_module.trace(several_steps, folder)
      seconds, count = by_module.measured(folder, operations)
    total = sum(seconds.values())
    return ({k: v / total for k, v in seconds.most_common() if total},
            count // _TRACED)


def _peer(peer, our_seconds, batch_size):
  """The report's 'peer'; ends its process.

  Args:
    peer: a `peers.process.Process` after all of its steps.
    our_seconds: mean seconds of our step.
    batch_size: batch size of both.
  """
  details = peer.details()
  peer.close()
  report = {'name': peer.name, 'version': peer.version,
            'parameters': peer.parameters, 'build_s': peer.build_s,
            'timed_out': False, 'failed': None, **details}
  if peer.failure:
    return report | peer.failure
  first, times = peer.times[0], peer.times[_WARM_UP:]
  seconds = float(np.mean(times))
  return report | {
      'images_per_s': batch_size / seconds,
      'step_time_s': timing.percentiles(times),
      'compile_s': max(0., first - float(np.median(times))),
      'ratio': seconds / our_seconds}


def _with_data(assembly, ours, vocabularies, steps):
  """{'data_wait': share, 'data_images_per_s': n} with the config's data."""
  config = assembly.config
  data = _pipeline(config, vocabularies,
                   sharding.host_rows(assembly.mesh, config.batch_size))
  step = assembly.step()  # Compiles one program for each bucket.
  buckets, waited, total, done = set(), 0., 0., 0
  batches = data.iterate(0)
  while done < steps:
    start = time.perf_counter()
    _, batch = next(batches)
    batch = sharding.shard_batch(assembly.mesh, batch)
    ready = time.perf_counter()
    ours.state, metrics = step(ours.state, batch)
    jax.block_until_ready(metrics)
    end = time.perf_counter()
    # The first step of a bucket compiles, while the pipeline prefetches.
    if batch['image'].shape in buckets:
      waited += ready - start
      total += end - start
      done += 1
    buckets.add(batch['image'].shape)
  return {'data_wait': waited / total,
          'data_images_per_s': done * config.batch_size / total}


# --- Inference, against a peer ----------------------------------------------
def inference(config, peer, steps=20, peer_timeout=PEER_TIMEOUT, say=print):
  """Times the inference of the task that a peer does, in turns with it.

  Ours goes from a batch on the host to the task's arrays on the host, through
  one compiled program, with random weights.

  Args:
    config: config of a run that trains for the task.
    peer: name of a peer with a `task`.
    steps: timed steps.
    peer_timeout: see `benchmark`.
    say: called with lines about the progress.

  Returns:
    JSON-able dict, the content of `--json` (docs/pods.md).

  Raises:
    UserError: the model cannot do the task, or the peer does not fit.
  """
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  sizes = vocabularies.sizes
  bucket = synthetic.largest_bucket(config.data)
  batch = synthetic.synthetic_batch(
      config.data, batch_size=config.batch_size, bucket=bucket, **sizes)
  model = models.build(config, **sizes)
  ours = predictor.Predictor(model, config, vocabularies)
  task = tasks.load(peers.load(peer).task)
  lacking = task.lacks(model)
  if lacking:
    raise errors.UserError(
        f'--peer {peer}: the model of --config has no {" or ".join(lacking)} '
        f'head; use --config configs/finetune.py:{task.name},system='
        f'{config.model.name},size=SIZE')
  theirs = process.Process(peer, config, batch, sizes, peer_timeout)
  chip = chips.of_device(jax.devices()[0])
  say(f'{chip.name}: compiling')
  variables = jax.jit(lambda key, b: model.init(key, b, task.requests))(
      jax.random.key(config.seed), batch)

  def step():
    ours.run(variables, batch, task)
  first = timing.seconds(step)
  say(f'against {theirs.version or theirs.name}')
  times = []
  for _ in range(_WARM_UP + steps):
    times.append(timing.seconds(step))
    theirs.step()
  times = times[_WARM_UP:]
  seconds = float(np.mean(times))
  return {
      'config': config.model.name, 'task': task.name, 'device': chip.name,
      'batch_size': config.batch_size, 'dtype': config.dtype,
      'bucket': list(config.data.buckets[bucket]),
      'parameters': program.count_parameters(variables['params'])['total'],
      'steps': steps, 'images_per_s': config.batch_size / seconds,
      'step_time_s': timing.percentiles(times),
      'compile_s': max(0., first - seconds),
      'peer': _peer(theirs, seconds, config.batch_size)}


def inference_table(report):
  """The report of `inference` as aligned lines."""
  r = report
  rows = [
      ('model', f'{r["config"]}, {r["parameters"]:,} parameters for '
                f'{r["task"]!r}, {r["dtype"]}'),
      ('device', r['device']),
      ('batch', f'{r["batch_size"]} of {r["bucket"][0]}x{r["bucket"][1]}'),
      ('speed', f'{r["images_per_s"]:.2f} images/s; a step '
                f'{_milliseconds(r["step_time_s"])}'),
      ('compiled in', f'{r["compile_s"]:.0f} s'), *_peer_rows(r['peer'])]
  return '\n'.join(f'{name:12} {text}' for name, text in rows)


# --- Scoring ----------------------------------------------------------------
def _scoring(model, ours, steps):
  """Image-text pairs per second of the ITM head; None without that head."""
  if not model.offers('joint', 'itm'):
    return None
  score = jax.jit(lambda v, b: model.apply(v, b, {'joint': ('itm',)})
                  ['joint']['itm_logits'])

  def once():
    jax.block_until_ready(score(ours.state.variables, ours.batch))
  once()  # Compiles.
  times = [timing.seconds(once) for _ in range(steps)]
  return ours.batch['text'][..., 0].size / float(np.mean(times))


# --- The input pipeline -----------------------------------------------------
def input_speed(config, images=512, rounds=5):
  """Measures how fast the config's pipeline makes batches, without a model.

  For comparison it decodes the same files to RGB, in turns (Pillow, as many
  threads as the pipeline). That is the least that any pipeline must do.

  Args:
    config: reads data, seed and batch_size.
    images: minimum number of images in a turn.
    rounds: number of turns of each; the median counts.

  Returns:
    {'pipeline_images_per_s', 'decoding_images_per_s', 'share'}; `share` is the
    first divided by the second.

  Raises:
    UserError: no such data.
  """
  data = _pipeline(config, vocabularies_lib.Vocabularies.load(config.data))
  threads = config.data.get('threads', 0) or os.cpu_count()
  count = -(-images // config.batch_size)  # batches in a turn
  speeds = {'pipeline': [], 'decoding': []}
  for turn in range(rounds):
    ids, seconds = _make_batches(data, turn * (count + 1), count)
    speeds['pipeline'].append(len(ids) / seconds)
    seconds = _decode([data.record(i)['image'] for i in ids], threads)
    speeds['decoding'].append(len(ids) / seconds)
  made, decoded = (float(np.median(speeds[k])) for k in speeds)
  return {'pipeline_images_per_s': made, 'decoding_images_per_s': decoded,
          'share': made / decoded}


def _make_batches(data, start, count):
  """(ids of the examples, seconds) of `count` batches of a pipeline."""
  batches = data.iterate(start)
  next(batches)  # Starts the threads.
  ids = []

  def take():
    for _ in range(count):
      ids.extend(next(batches)[1]['example_id'].tolist())
  seconds = timing.seconds(take)
  batches.close()
  return ids, seconds


def _decode(images, threads):
  """Seconds to decode encoded images to RGB."""
  from e2e_vlp_jax.data import photographs  # pylint: disable=g-import-not-at-top
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return timing.seconds(
        lambda: list(pool.map(photographs.decode_image, images)))


def _pipeline(config, vocabularies, rows=None):
  """The training Pipeline of a config."""
  from e2e_vlp_jax.data import pipeline  # pylint: disable=g-import-not-at-top
  return pipeline.Pipeline(
      config.data, vocabularies=vocabularies,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True, rows=rows)


# --- For people -------------------------------------------------------------
def table(report):
  """The report as aligned lines."""
  r = report
  ms = _milliseconds
  rows = [
      ('model', f'{r["config"]}, {r["parameters"]:,} parameters, '
                f'{r["dtype"]}'),
      ('devices', f'{r["devices"]} x {r["device"]}'),
      ('batch', f'{r["batch_size"]} of {r["bucket"][0]}x{r["bucket"][1]}'),
      ('speed', f'{r["images_per_s"]:.2f} images/s; a step '
                f'{ms(r["step_time_s"])}; without waiting for each step '
                f'{r["ahead_images_per_s"]:.2f} images/s'),
      ('FLOPs', f'{r["flops_per_step"]:.3e} a step; MFU {r["mfu"]:.1%} '
                f'({r["mfu_of"]})'),
      ('roofline', _roofline_row(r['roofline'])),
      ('kernels', f'{r["operations_per_step"]:,} operations a step; '
                  f'{r["recompilations"]} recompilations'),
      ('peak memory', f'{r["peak_memory_bytes"] / chips.GIB:.2f} GiB'),
      ('compiled in', f'{r["compile_s"]:.0f} s'),
      ('parts', ', '.join(f'{k} {v:.1%}' for k, v in r['parts'].items()))]
  if r['data_wait'] is not None:
    rows.append(('with data', f'{r["data_images_per_s"]:.2f} images/s; '
                              f'{r["data_wait"]:.1%} of it waiting for data'))
  if r['score_pairs_per_s'] is not None:
    rows.append(('scoring', f'{r["score_pairs_per_s"]:.2f} image-text '
                            'pairs/s'))
  if r['peer']:
    rows += _peer_rows(r['peer'])
  return '\n'.join(f'{name:12} {text}' for name, text in rows)


def _roofline_row(roof):
  if roof['step_time_s'] is None:
    return f'unknown: {roof["reason"]}'
  return (f'{roof["share"]:.1%} of it: at least '
          f'{roof["step_time_s"] * 1e3:.1f} ms a step, bound by '
          f'{roof["bound"]}')


def _milliseconds(t):
  """A report's percentiles of seconds as text."""
  return f'{t["p50"] * 1e3:.1f} ms (90 %: {t["p90"] * 1e3:.1f} ms)'


def _peer_rows(p):
  """The rows of a report's 'peer'."""
  name = f'{p["name"]} ({p["version"]})' if p['version'] else p['name']
  if p['timed_out']:
    return [('peer', f'{name}: no answer in {p["waited_s"]:g} s during '
                     f'{p["during"]}; a longer --peer-timeout waits longer')]
  if p['failed']:
    return [('peer', f'{name}: {p["failed"]} (during {p["during"]})')]
  compiled = f'compiled in {p["compile_s"]:.0f} s'
  if 'graph_breaks' in p:
    compiled += (f', {p["graphs"]} graphs, {p["graph_breaks"]} graph breaks')
  return [('peer', f'{name}, {p["parameters"]:,} parameters: '
                   f'{p["images_per_s"]:.2f} images/s; a step '
                   f'{_milliseconds(p["step_time_s"])}; {compiled}'),
          ('ratio', f'{p["ratio"]:.2f} of the peer\'s images/s')]


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='instead of config.batch_size')
    parser.add_argument('--peer', metavar='NAME',
                        help='in turns with: ' + ', '.join(peers.names()))
    parser.add_argument('--peer-timeout', type=float, default=PEER_TIMEOUT,
                        metavar='S', help='give the peer up if it does not '
                                          'answer in S seconds')
    parser.add_argument('--data', action='store_true',
                        help="also on the config's own data")
    parser.add_argument('--input', action='store_true',
                        help='the input pipeline alone, against plain '
                             'decoding of the same files')
    parser.add_argument('--score', action='store_true',
                        help='also the scoring of image-text pairs')
    parser.add_argument('--deterministic', action='store_true',
                        help='on a GPU: the same bits in every run')
    parser.add_argument('--json', metavar='OUT', help='write the figures')
    args, config = cli.parse(parser, argv)
    if args.steps < 1:
      raise errors.UserError(f'--steps: {args.steps}; expected 1 or more')
    if not args.peer_timeout > 0:
      raise errors.UserError(f'--peer-timeout: {args.peer_timeout:g}; expected '
                             'seconds, more than 0')
    if args.batch_size is not None:
      config.batch_size = args.batch_size
    if args.json:
      files.check_writable('--json', args.json)
    if args.peer and (args.data or args.score) and (
        peers.load(args.peer).task):
      raise errors.UserError(
          f'--peer {args.peer}: times the inference of the task '
          f'{peers.load(args.peer).task!r}, hence without --data and --score')
    if args.peer:  # Leave it GPU memory; jax reads this at first use.
      os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    compiler.set_flags(args.deterministic)
    compiler.use_cache()
    if args.input:
      report = input_speed(config)
      print(f'pipeline {report["pipeline_images_per_s"]:.1f} images/s, plain '
            f'decoding {report["decoding_images_per_s"]:.1f}: ratio '
            f'{report["share"]:.2f}')
    elif args.peer and peers.load(args.peer).task:
      report = inference(config, args.peer, args.steps, args.peer_timeout)
      print(inference_table(report))
    else:
      report = benchmark(config, args.steps, args.peer, args.data, args.score,
                         peer_timeout=args.peer_timeout)
      print(table(report))
    if args.json:
      with open(args.json, 'w') as f:
        json.dump(report, f, indent=1)


if __name__ == '__main__':
  main()
