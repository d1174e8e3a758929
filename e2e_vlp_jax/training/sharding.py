"""Meshes, and how arrays are sharded over them.

'data' replicates parameters, 'fsdp' splits parameters and optimizer state,
'tensor' splits single matrices by rule. Batches are split over data and fsdp
together. The axes are of type Auto, because much of Linen does not work with
jax.make_mesh's newer default (Explicit).
"""
import re

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from e2e_vlp_jax import errors

AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')
# A smaller parameter is replicated, because gathering it costs more than
# splitting it saves. All such parameters are 2 % of E2E-VLP `r50`.
FSDP_MIN_BYTES = 2**16


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
  return Mesh(arrange(sizes, devices), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes, devices):
  """Devices in the shape (data, fsdp, tensor), neighbours side by side.

  With several TPU slices the outer part of 'data' runs over the slices, so
  that only the sum of the gradients crosses the slow network (DCN). To jax,
  GPUs that share an NVLink are a slice, too: as a rule the GPUs of a node.
  Their 'fsdp' and 'tensor' may span nodes, whose network is fast.

  Raises:
    UserError: 'fsdp' or 'tensor' would span several TPU slices.
  """
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  data, *inner = sizes
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices,
                                         allow_split_physical_axes=True)
  if data % slices == 0:
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices,
        allow_split_physical_axes=True)
  if devices[0].platform == 'tpu':
    raise errors.UserError(f'mesh.data: {data} does not divide over {slices} '
                           'slices; fsdp and tensor stay within a slice')
  order = lambda d: (d.slice_index, d.process_index, d.id)
  ordered = np.empty(len(devices), object)
  ordered[:] = sorted(devices, key=order)
  return ordered.reshape(sizes)


def check_batch_size(batch_size, mesh, accumulate=1, key='batch_size'):
  """UserError unless a batch divides over the batch axes and micro-steps."""
  shards = mesh.shape['data'] * mesh.shape['fsdp'] * accumulate
  if batch_size % shards or batch_size <= 0:
    fit = max(shards, batch_size // shards * shards)
    raise errors.UserError(
        f'{key}: {batch_size} does not divide by {shards} (devices on '
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
        return NamedSharding(mesh, _checked(P(*value), x.shape, mesh, name))
    return NamedSharding(mesh, fsdp_spec(x, mesh.shape['fsdp']))
  out = jax.tree_util.tree_map_with_path(spec, params)
  for i, (pattern, _) in enumerate(rules):
    if i not in used:
      raise errors.UserError(f'sharding_rules: {pattern!r} matches no '
                             'parameter')
  return out


def _checked(spec, shape, mesh, name):
  """`spec`, or a UserError if an array of `shape` cannot be split that way."""
  for size, axes in zip(shape, spec):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    for axis in axes:
      if axis not in AXES:
        raise errors.UserError(f'sharding_rules: no axis {axis!r}'
                               + errors.nearest(axis, AXES))
    parts = int(np.prod([mesh.shape[a] for a in axes]))
    if size % parts:
      raise errors.UserError(
          f'sharding_rules: {name!r} of shape {shape} cannot be split by '
          f'{tuple(spec)}: {size} does not divide by {parts}')
  if len(spec) > len(shape):
    raise errors.UserError(f'sharding_rules: {name!r} of shape {shape} has '
                           f'fewer dimensions than {tuple(spec)}')
  return spec


def fsdp_spec(x, parts):
  """Splits the largest divisible dimension of `x` in `parts`, if worth it."""
  if parts == 1 or x.size * 4 < FSDP_MIN_BYTES:
    return P()
  divisible = [d for d in range(x.ndim) if x.shape[d] % parts == 0]
  if not divisible:
    return P()
  best = max(divisible, key=lambda d: x.shape[d])
  return P(*('fsdp' if d == best else None for d in range(x.ndim)))


def state_shardings(state, mesh, rules=()):
  """NamedShardings of a TrainState's tree (arrays or ShapeDtypeStructs).

  Optimizer state and averages are split like the parameter that they belong
  to; everything else is replicated.

  Args:
    state: TrainState.
    mesh, rules: see `parameter_specs`.
  """
  def by_path(tree):
    return {tuple(map(str, path)): x
            for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
  specs = parameter_specs(state.params, mesh, rules)
  spec_of, parameter_of = by_path(specs), by_path(state.params)

  def find(path, x):
    # The path of an optimizer's leaf ends in that of its parameter.
    names = tuple(map(str, path))
    for i in range(len(names)):
      parameter = parameter_of.get(names[i:])
      if parameter is not None and parameter.shape == x.shape:
        return spec_of[names[i:]]
    return replicated(mesh)
  return jax.tree_util.tree_map_with_path(find, state).replace(
      params=specs, ema_params=None if state.ema_params is None else specs)


def path_name(path):
  """jax key path -> 'encoder/layer0/ffn/in/kernel'."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(
      k, 'idx', k)))) for k in path)


def replicated(mesh):
  return NamedSharding(mesh, P())


def batch_sharding(mesh):
  return NamedSharding(mesh, P(BATCH_AXES))


def gather_parameters(params, shardings):
  """Inside jit: undoes the 'fsdp' split of parameters where they are used.

  Without it, the compiler may gather the activations of all devices at each
  part of a matrix instead of gathering the matrix, and does so in the backward
  pass. The gradients are all-reduced whole, and the sharding of the optimizer's
  state then slices them. XLA turns this all-reduce and slice into a
  reduce-scatter where the machine has one.

  Args:
    params: tree of arrays.
    shardings: their NamedShardings, from `parameter_specs`.
  """
  def one(x, sharding):
    names = [tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ())
                   if a != 'fsdp') or None for axes in sharding.spec]
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(sharding.mesh, P(*names)))
  return jax.tree.map(one, params, shardings)


def constrain_batch(mesh, tree, axis=0):
  """Inside jit: splits dimension `axis` of every array over the batch axes.

  The mesh is an argument because constraints by logical axis names silently
  do nothing where no mesh is set.
  """
  sharding = NamedSharding(mesh, P(*(None,) * axis, BATCH_AXES))
  return jax.tree.map(
      lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def host_rows(mesh, batch_size):
  """Numbers of the batch's rows that this host's devices hold, ascending.

  Hosts share rows if 'tensor' spans several hosts.
  """
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  starts = {rows.indices(batch_size)[:2] for rows, in held.values()}
  return np.concatenate([np.arange(*s) for s in sorted(starts)])


def shard_batch(mesh, batch):
  """Host arrays -> global arrays [B, ...] split over the batch axes.

  Args:
    mesh: from `make_mesh`.
    batch: dict of numpy arrays of this host's rows, as `host_rows` orders
      them. 64-bit integers become 32-bit ones.
  """
  sharding = batch_sharding(mesh)
  batch = {k: v.astype(np.int32) if v.dtype == np.int64 else v
           for k, v in batch.items()}
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  blocks = mesh.shape['data'] * mesh.shape['fsdp']
  held = len(host_rows(mesh, blocks))

  def one(x):
    size = len(x) // held * blocks
    rows = host_rows(mesh, size)

    def part(index):
      start, stop, _ = index[0].indices(size)
      first = np.searchsorted(rows, start)
      return x[first:first + stop - start]
    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)
  return {k: one(v) for k, v in batch.items()}


def to_host(tree):
  """Device arrays -> full numpy arrays on every host."""
  def one(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
  return jax.tree.map(one, tree)
