"""Meshes and where arrays live on them.

Axes: 'data' replicates parameters, 'fsdp' splits parameters and optimizer
state, 'tensor' splits single matrices by rule. Batches are split over data
and fsdp together. Axes are Auto: jax.make_mesh's newer default (Explicit)
rejects much of Linen.
"""
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from e2e_vlp_jax import errors

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')
# Below this many bytes a parameter is replicated: gathering it costs more
# than it saves.
FSDP_MIN_BYTES = 4 * 2**20


def make_mesh(shape, devices=None):
  """A mesh from {'data': n, 'fsdp': n, 'tensor': n}; one may be -1 = rest.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [int(shape[a]) for a in AXES]
  fixed = int(np.prod([s for s in sizes if s != -1]))
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise errors.UserError(f'mesh: {dict(zip(AXES, sizes))}: sizes are '
                           'positive, at most one is -1 (the rest)')
  if -1 in sizes and len(devices) % fixed == 0:
    sizes[sizes.index(-1)] = len(devices) // fixed
  if int(np.prod(sizes)) != len(devices) or -1 in sizes:
    raise errors.UserError(
        f'mesh: {dict(zip(AXES, sizes))} does not fit {len(devices)} '
        f'devices; the product of the axes must be {len(devices)}')
  return Mesh(np.asarray(devices).reshape(sizes), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def check_batch_size(batch_size, mesh, accumulate=1):
  """UserError unless a batch divides over the batch axes and micro-steps."""
  shards = mesh.shape['data'] * mesh.shape['fsdp'] * accumulate
  if batch_size % shards or batch_size <= 0:
    fit = max(shards, batch_size // shards * shards)
    raise errors.UserError(
        f'batch_size: {batch_size} does not divide by {shards} (devices on '
        f'the data and fsdp axes x accumulation); try {fit}')


def parameter_specs(params, mesh, rules=()):
  """PartitionSpecs of a parameter tree (also of trees shaped like it).

  Args:
    params: tree of arrays or ShapeDtypeStructs.
    mesh: from `make_mesh`.
    rules: ((regex of path, spec as a tuple), ...), first match wins; a rule
      that matches nothing is an error. Otherwise the largest dimension that
      divides over 'fsdp' is split, if the array has FSDP_MIN_BYTES.

  Returns:
    tree of NamedSharding.
  """
  used = set()

  def spec(path, x):
    name = path_name(path)
    for i, (pattern, value) in enumerate(rules):
      if re.fullmatch(pattern, name):
        used.add(i)
        return NamedSharding(mesh, P(*value))
    return NamedSharding(mesh, fsdp_spec(x, mesh.shape['fsdp']))
  out = jax.tree_util.tree_map_with_path(spec, params)
  for i, (pattern, _) in enumerate(rules):
    if i not in used:
      raise errors.UserError(f'sharding_rules: {pattern!r} matches no '
                             'parameter')
  return out


def fsdp_spec(x, parts):
  """Splits the largest divisible dimension of `x` in `parts`, if worth it."""
  if parts == 1 or x.size * 4 < FSDP_MIN_BYTES:
    return P()
  divisible = [d for d in range(x.ndim) if x.shape[d] % parts == 0]
  if not divisible:
    return P()
  best = max(divisible, key=lambda d: x.shape[d])
  return P(*('fsdp' if d == best else None for d in range(x.ndim)))


def path_name(path):
  """jax key path -> 'encoder/layer0/ffn/in/kernel'."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(
      k, 'idx', k)))) for k in path)


def replicated(mesh):
  return NamedSharding(mesh, P())


def batch_sharding(mesh):
  return NamedSharding(mesh, P(BATCH_AXES))


def shard_batch(mesh, batch):
  """Host arrays [B_local, ...] -> global arrays split over the batch axes."""
  sharding = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v)
          for k, v in batch.items()}


def to_host(tree):
  """Device arrays -> full numpy arrays on every host."""
  def one(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
  return jax.tree.map(one, tree)
