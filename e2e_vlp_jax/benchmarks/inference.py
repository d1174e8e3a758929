"""Times the inference of a task in turns with a peer's."""
import jax
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import peers
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import predictor
from e2e_vlp_jax.peers import process
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.profiling import timing
from e2e_vlp_jax.tasks import base as tasks
from e2e_vlp_jax.benchmarks import peer as peer_lib


def measure(config, peer, steps=20, peer_timeout=peer_lib.TIMEOUT, say=print):
  """Times the inference of the task that a peer does, in turns with it.

  Ours goes from a batch on the host to the task's arrays on the host, through
  one compiled program, with random weights.

  Args:
    config: config of a run that trains for the task.
    peer: name of a peer with a `task`.
    steps: timed steps.
    peer_timeout: see `train_step`.
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
  for _ in range(peer_lib.WARM_UP + steps):
    times.append(timing.seconds(step))
    theirs.step()
  times = times[peer_lib.WARM_UP:]
  seconds = float(np.mean(times))
  return {
      'config': config.model.name, 'task': task.name, 'device': chip.name,
      'batch_size': config.batch_size, 'dtype': config.dtype,
      'bucket': list(config.data.buckets[bucket]),
      'parameters': program.count_parameters(variables['params'])['total'],
      'steps': steps, 'images_per_s': config.batch_size / seconds,
      'step_time_s': timing.percentiles(times),
      'compile_s': max(0., first - seconds),
      'peer': peer_lib.report(theirs, seconds, config.batch_size)}
