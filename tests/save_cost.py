"""Measures what a save costs: a state of random arrays, no training.

  python -m tests.save_cost [--gib 1] [--saves 3]
      [--workdir DIR|gs://BUCKET/NAME]

Prints for how long each save would block the training, and when all of it is
written; after SIGTERM a run needs both. The state is parameters and Adam's two
averages in float32, split over the devices of this machine as fsdp does it.
"""
import argparse
import functools
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_collections

from e2e_vlp_jax.training import checkpointer
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step

META = {'config': {'data': {}, 'model': {}}, 'tokenizer': {'kind': 'wordpiece'},
        'labels': {'classes': []}}
ARRAYS = 64  # in each of the three parts


def state_of(gib):
  """A TrainState of so many GiB."""
  mesh = sharding.make_mesh(dict(data=1, fsdp=-1, tensor=1))
  rows = int(gib * 2**30 / 4 / 3 / ARRAYS / 1024) // mesh.size * mesh.size

  @functools.partial(jax.jit, out_shardings=jax.NamedSharding(
      mesh, jax.P('fsdp')))
  def tree(key):
    return {f'w{i}': jax.random.normal(k, (rows, 1024))
            for i, k in enumerate(jax.random.split(key, ARRAYS))}
  params, mu, nu = map(tree, jax.random.split(jax.random.key(0), 3))
  return jax.block_until_ready(train_step.TrainState(
      step=jnp.int32(0), params=params, model_state={}, opt_state=(mu, nu),
      rng=jax.random.key(0), ema_params=None, bad_steps=jnp.int32(0)))


def measure(workdir, gib, saves):
  """[(seconds blocked, seconds until it is written)], one for each save."""
  state, found = state_of(gib), []
  options = ml_collections.ConfigDict(dict(
      every_steps=1, every_minutes=0., keep=1, keep_every=0, best=''))
  with checkpointer.Checkpointer(workdir, META, options) as saver:
    for step in range(1, saves + 1):
      start = time.perf_counter()
      saver.save(step, state)
      blocked = time.perf_counter() - start
      saver.wait()
      found.append((blocked, time.perf_counter() - start))
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gib', type=float, default=1.)
  parser.add_argument('--saves', type=int, default=3)
  parser.add_argument('--workdir', help='default: a temporary folder')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    found = measure(args.workdir or f'{folder}/w', args.gib, args.saves)
  where = f'{jax.local_device_count()} x {jax.devices()[0].device_kind}'
  for blocked, written in found:
    print(f'{args.gib:g} GiB, {where}: blocked {blocked:.2f} s, written after '
          f'{written:.1f} s')


if __name__ == '__main__':
  main()
