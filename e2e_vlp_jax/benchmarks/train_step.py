"""Times the train step of a config, alone or in turns with a peer's."""
import tempfile
import time

import jax
import numpy as np

from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.peers import process
from e2e_vlp_jax.profiling import by_module
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.profiling import roofline
from e2e_vlp_jax.profiling import timing
from e2e_vlp_jax.benchmarks import peer as peer_lib
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import sharding

_TRACED = 2  # steps under the profiler


def measure(config, steps=20, peer=None, data=False, score=False,
            say=print, peer_timeout=peer_lib.TIMEOUT):
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
  for _ in range(peer_lib.WARM_UP):
    ours.step()
  memory = timing.peak_memory()
  if theirs:
    say(f'against {theirs.version or theirs.name}')
    for _ in range(peer_lib.WARM_UP):
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
    report['peer'] = peer_lib.report(theirs, seconds, config.batch_size)
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


def _with_data(assembly, ours, vocabularies, steps):
  """{'data_wait': share, 'data_images_per_s': n} with the config's data."""
  # Imports TensorFlow, which nothing else here needs.
  from e2e_vlp_jax.benchmarks import input_pipeline  # pylint: disable=g-import-not-at-top
  config = assembly.config
  data = input_pipeline.training_pipeline(
      config, vocabularies, sharding.host_rows(assembly.mesh,
                                               config.batch_size))
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
