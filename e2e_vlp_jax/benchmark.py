"""How fast a config trains on this machine, and where the time goes.

  python -m e2e_vlp_jax.benchmark --config configs/e2e_vlp.py:detr \\
      --batch-size 2 --steps 10 --peer hf_detr

Times the train step that `train` would run, on random batches, without
TensorFlow and without data; `--data` reads the config's own. `--peer` times
somebody else's step on the same batch in turns with ours. docs/pods.md
explains the figures.
"""
import concurrent.futures
import json
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import models
from e2e_vlp_jax import peers
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.profiling import by_module
from e2e_vlp_jax.training import sharding

_WARM_UP = 2  # steps before the clock: allocators, caches, autotuning
_TRACED = 2   # steps under the profiler


def benchmark(config, steps=20, peer=None, data=False, score=False,
              say=print):
  """Times the train step of `config` on the attached devices.

  Args:
    config: of a training run; the last of its stages is timed, on one random
      batch of the largest bucket.
    steps: timed steps.
    peer: name of a peer (`peers.names`) to time in turns with ours.
    data: also train on the config's own data and see how long steps wait.
    score: also time the scoring of image-text pairs.
    say: is given a line now and then.

  Returns:
    dict, JSON-able: what `--json` writes (docs/pods.md).

  Raises:
    UserError: the mesh, the batch, the peer or the data does not fit.
  """
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  sizes = vocabularies.sizes
  bucket = synthetic.largest_bucket(config.data)
  host_batch = synthetic.synthetic_batch(
      config.data, batch_size=config.batch_size, bucket=bucket, **sizes)
  rival = peer and peers.build(peer, config, host_batch, sizes['num_classes'])
  model = models.build(config, **sizes)
  plan = assemble.Assembly(config, model, mesh, host_batch)
  chip = chips.of_device(jax.devices()[0])
  rows = sharding.host_rows(mesh, config.batch_size)
  batch = sharding.shard_batch(mesh, {k: v[rows]
                                      for k, v in host_batch.items()})

  say(f'{mesh.size} x {chip.name}: compiling')
  start = time.perf_counter()
  traced = plan.step().trace(plan.state_target(),
                             plan.batch_target(config.batch_size))
  flops = program.flops(traced.jaxpr)
  step = traced.lower().compile()
  compile_s = time.perf_counter() - start
  ours = _Ours(step, plan.init(), batch)

  for _ in range(_WARM_UP):
    ours.step()
  memory = _peak_memory()
  times, rival_times = [], []
  if rival:
    say(f'against {rival.version}')
    for _ in range(_WARM_UP):
      rival.step()
  for _ in range(steps):
    # In turns: what else the machine does slows both alike.
    times.append(_seconds(ours.step))
    if rival:
      rival_times.append(_seconds(rival.step))
  seconds = float(np.mean(times))
  peak, peak_from = _peak_flops(chip, mesh.size, config.dtype)
  out = {
      'config': config.model.name, 'device': chip.name, 'devices': mesh.size,
      'mesh': dict(mesh.shape), 'batch_size': config.batch_size,
      'accumulate': config.accumulate,
      'bucket': list(config.data.buckets[bucket]), 'dtype': config.dtype,
      'parameters': program.count_parameters(plan.shapes.params)['total'],
      'steps': steps, 'images_per_s': config.batch_size / seconds,
      'step_time_s': _percentiles(times), 'compile_s': compile_s,
      'flops_per_step': flops, 'mfu': flops / seconds / peak,
      'mfu_of': peak_from, 'peak_memory_bytes': memory,
      'parts': _parts(ours, step, plan.shapes.params, say),
      'data_wait': None, 'score_pairs_per_s': None, 'peer': None}
  if data:
    out.update(_with_data(config, plan, ours, vocabularies, steps))
  if score:
    out['score_pairs_per_s'] = _score(model, ours.state, host_batch, batch,
                                      steps)
  if rival:
    theirs = float(np.mean(rival_times))
    out['peer'] = {
        'name': rival.name, 'version': rival.version,
        'parameters': rival.parameters,
        'images_per_s': config.batch_size / theirs,
        'step_time_s': _percentiles(rival_times), 'ratio': theirs / seconds}
  return out


class _Ours:
  """Our step with the state that it goes on with."""

  def __init__(self, step, state, batch):
    self._step, self.state, self._batch = step, state, batch

  def step(self):
    """One step, finished when it returns."""
    self.state, logged = self._step(self.state, self._batch)
    jax.block_until_ready((self.state, logged))


def _seconds(function):
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def _percentiles(times):
  return {'p50': float(np.percentile(times, 50)),
          'p90': float(np.percentile(times, 90))}


def _peak_memory():
  """Bytes on the fullest device; on a CPU, of this process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  if all('peak_bytes_in_use' in s for s in stats):
    return max(s['peak_bytes_in_use'] for s in stats)
  import resource  # pylint: disable=g-import-not-at-top
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_flops(chip, count, dtype):
  """(FLOP/s of all devices, where the figure is from).

  Of a device without a data sheet here (a CPU), what its own matrix product
  reaches: all cores, whatever number of devices they pose as.
  """
  if chip.flops:
    return chip.flops * count, 'peak bfloat16 FLOP/s of the data sheet'
  n = 2048
  x = jnp.ones((n, n), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  best = min(_seconds(lambda: jax.block_until_ready(product(x, x)))
             for _ in range(5))
  return 2 * n**3 / best, f'measured: {n}x{n} matrix product in {dtype}'


def _parts(ours, step, params, say):
  """{part: share of a step}, largest first; see training/parts.py."""
  say('profiling')
  operations = by_module.of_operations(step.as_text(), set(params))
  with tempfile.TemporaryDirectory() as folder:
    def several():
      for _ in range(_TRACED):
        ours.step()
    by_module.trace(several, folder)
    found = by_module.seconds(folder, operations)
  total = sum(found.values())
  return {k: v / total for k, v in found.most_common() if total}


def _with_data(config, plan, ours, vocabularies, steps):
  """{'data_wait': share, 'data_images_per_s': n} with the config's data."""
  from e2e_vlp_jax.data import pipeline  # pylint: disable=g-import-not-at-top
  data = pipeline.Pipeline(
      config.data, vocabularies=vocabularies,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True,
      rows=sharding.host_rows(plan.mesh, config.batch_size))
  step = plan.step()  # Buckets differ: each has its own program.
  batches, compiled, waited, total = data.iterate(0), set(), 0., 0.
  done = 0
  while done < steps:
    start = time.perf_counter()
    _, batch = next(batches)
    batch = sharding.shard_batch(plan.mesh, batch)
    ready = time.perf_counter()
    ours.state, logged = step(ours.state, batch)
    jax.block_until_ready(logged)
    end = time.perf_counter()
    # The first step of a bucket compiles, and the pipeline runs ahead.
    if batch['image'].shape in compiled:
      waited += ready - start
      total += end - start
      done += 1
    compiled.add(batch['image'].shape)
  return {'data_wait': waited / total,
          'data_images_per_s': done * config.batch_size / total}


def input_speed(config, images=512, rounds=5):
  """How fast the config's pipeline makes batches, without any model.

  In turns with the plain decoding of the same files to RGB (Pillow, as many
  threads as the pipeline has), which is the least that anybody must do.

  Args:
    config: reads data, seed and batch_size.
    images: of a turn, at least.
    rounds: turns of each; the median counts.

  Returns:
    {'pipeline_images_per_s', 'decoding_images_per_s', 'share'}: the share of
    the decoding's speed that the whole pipeline reaches.

  Raises:
    UserError: no such data.
  """
  from e2e_vlp_jax.data import pipeline  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.data import photographs  # pylint: disable=g-import-not-at-top
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  data = pipeline.Pipeline(
      config.data, vocabularies=vocabularies,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True)
  threads = config.data.get('threads', 0) or os.cpu_count()
  batches = -(-images // config.batch_size)
  speeds = {'pipeline': [], 'decoding': []}
  for turn in range(rounds):
    start = turn * (batches + 1)
    running = data.iterate(start)
    next(running)  # Starts the threads.
    ids = []

    def take():
      for _ in range(batches):
        ids.extend(next(running)[1]['example_id'].tolist())  # pylint: disable=cell-var-from-loop
    speeds['pipeline'].append(batches * config.batch_size / _seconds(take))
    running.close()
    files = [data.record(i)['image'] for i in ids]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      speeds['decoding'].append(len(files) / _seconds(
          lambda: list(pool.map(photographs.decode_image, files))))  # pylint: disable=cell-var-from-loop
  made, decoded = (float(np.median(speeds[k])) for k in speeds)
  return {'pipeline_images_per_s': made, 'decoding_images_per_s': decoded,
          'share': made / decoded}


def _score(model, state, host_batch, batch, steps):
  """Image-text pairs a second that the ITM head scores, or None."""
  if 'itm' not in model.views.get('joint', ()):
    return None
  variables = state.variables
  score = jax.jit(lambda v, b: model.apply(v, b, {'joint': ('itm',)})
                  ['joint']['itm_logits'])
  jax.block_until_ready(score(variables, batch))
  times = [_seconds(lambda: jax.block_until_ready(score(variables, batch)))
           for _ in range(steps)]
  return host_batch['text'][..., 0].size / float(np.mean(times))


# --- For people -------------------------------------------------------------
def table(report):
  """The report as aligned lines."""
  r = report
  ms = lambda t: f'{t["p50"] * 1e3:.1f} ms (90 %: {t["p90"] * 1e3:.1f} ms)'
  rows = [
      ('model', f'{r["config"]}, {r["parameters"]:,} parameters, '
                f'{r["dtype"]}'),
      ('devices', f'{r["devices"]} x {r["device"]}'),
      ('batch', f'{r["batch_size"]} of {r["bucket"][0]}x{r["bucket"][1]}'),
      ('speed', f'{r["images_per_s"]:.2f} images/s; a step '
                f'{ms(r["step_time_s"])}'),
      ('FLOPs', f'{r["flops_per_step"]:.3e} a step; MFU {r["mfu"]:.1%} '
                f'({r["mfu_of"]})'),
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
    p = r['peer']
    rows += [('peer', f'{p["name"]} ({p["version"]}): '
                      f'{p["images_per_s"]:.2f} images/s; a step '
                      f'{ms(p["step_time_s"])}'),
             ('ratio', f'{p["ratio"]:.2f} of the peer\'s images/s')]
  return '\n'.join(f'{name:12} {text}' for name, text in rows)


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='instead of config.batch_size')
    parser.add_argument('--peer', metavar='NAME',
                        help='in turns with: ' + ', '.join(peers.names()))
    parser.add_argument('--data', action='store_true',
                        help="also on the config's own data")
    parser.add_argument('--input', action='store_true',
                        help='the input pipeline alone, against plain '
                             'decoding of the same files')
    parser.add_argument('--score', action='store_true',
                        help='also the scoring of image-text pairs')
    parser.add_argument('--json', metavar='OUT', help='write the figures')
    args, config = cli.parse(parser, argv)
    if args.steps < 1:
      raise errors.UserError(f'--steps: {args.steps}; expected 1 or more')
    if args.batch_size is not None:
      config.batch_size = args.batch_size
    if args.json:
      files.check_writable('--json', args.json)
    if args.peer:  # Leave it some of the GPU; read when jax first looks.
      os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    if args.input:
      report = input_speed(config)
      print(f'pipeline {report["pipeline_images_per_s"]:.1f} images/s, plain '
            f'decoding {report["decoding_images_per_s"]:.1f}: a share of '
            f'{report["share"]:.2f}')
    else:
      report = benchmark(config, args.steps, args.peer, args.data, args.score)
      print(table(report))
    if args.json:
      with open(args.json, 'w') as f:
        json.dump(report, f, indent=1)


if __name__ == '__main__':
  main()
