"""Optimal assignment of predictions to targets, on the device.

Shortest augmenting paths (Jonker and Volgenant, 1987; the algorithm behind
scipy's linear_sum_assignment). Targets are assigned one after the other. For
each, a Dijkstra search over the queries runs until it reaches a free query, and
the queries along the path are reassigned. Padded targets are skipped, so the
work grows with the number of real ones.

The state of a problem is a few vectors over its queries: the dual of each
query, the target that it is assigned to and that target's dual. The search adds
three more. Each step is therefore elementwise, except that it reads one row of
costs. This suits a batch of problems on a CPU (`_solve_batch`), eight problems
in the vectors of a TPU (ops/matching_tpu.py), and one problem in the registers
of one warp on a GPU (`_solve_kernel`).
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from e2e_vlp_jax import errors
from e2e_vlp_jax.ops import kernels
from e2e_vlp_jax.ops import matching_tpu

_FREE = -1


@functools.partial(jax.jit, static_argnames=('mesh', 'axes'))
def hungarian(cost, mask, mesh=None, axes=()):
  """Minimum-cost matching of targets to queries for a batch of problems.

  Args:
    cost: [B, Q, M] float, Q >= M.
    mask: [B, M] True where the target is real.
    mesh: if given, the batch is sharded over its axes `axes`.
    axes: names of mesh axes.

  Raises:
    UserError: more targets than queries.

  Returns:
    index [B, M] int32: the query assigned to each target (padded targets get
    distinct leftover queries), and bad [B] int32: the number of costs of real
    targets that were not finite. Callers report it; a run with bad > 0 has
    diverged.
  """
  if cost.shape[1] < cost.shape[2]:
    raise errors.UserError(
        f'data.max_boxes: {cost.shape[2]} boxes for {cost.shape[1]} queries; '
        'expected model.num_queries >= data.max_boxes')
  cost = jax.lax.stop_gradient(cost).astype(jnp.float32)
  if mesh is None or not axes:
    return _assign(cost, mask)
  # Under GSPMD the loop would communicate in every iteration.
  spec = P(axes)
  return jax.shard_map(_assign, mesh=mesh, in_specs=(spec, spec),
                       out_specs=(spec, spec), check_vma=False)(cost, mask)


def _assign(cost, mask):
  """`hungarian` on one device."""
  b, q, m = cost.shape
  if not m:
    return jnp.zeros((b, 0), jnp.int32), jnp.zeros(b, jnp.int32)
  finite = jnp.isfinite(cost)
  real = mask[:, None]
  # Replace a cost that is not finite by one just large enough that its pair is
  # chosen only if there is no other choice. A larger value would cost
  # precision: the sums below have 24 bits.
  span = jnp.max(jnp.where(finite & real, jnp.abs(cost), 0.), (1, 2),
                 keepdims=True)
  cost = jnp.where(finite, cost, (2 * span + 1) * m)
  bad = jnp.sum(~finite & real, (1, 2)).astype(jnp.int32)

  # One row per target, the real ones first.
  count = mask.sum(1).astype(jnp.int32)
  place = jnp.where(mask, _rank(mask), count[:, None] + _rank(~mask))
  rows = jnp.take_along_axis(cost.swapaxes(1, 2),
                             _inverse(place, m)[..., None], 1)
  kernel = kernels.wanted('matching')
  owner = jax.lax.platform_dependent(
      rows, count, default=_solve_batch,
      cuda=_solve_on_gpu if kernel and kernels.triton_runs() else _solve_batch,
      tpu=(matching_tpu.solve if kernel and matching_tpu.applies(m, q)
           else _solve_batch))  # [B, Q]

  # Queries in the order of the targets that own them, free ones last.
  free = owner == _FREE
  query = _inverse(jnp.where(free, count[:, None] + _rank(free), owner), m)
  return jnp.take_along_axis(query, place, 1), bad


# Not by sorting: on an H100, sorts took three times as long as the kernel.
def _rank(chosen):
  """Number of the chosen before each element: bool [B, N] -> int32 [B, N]."""
  n = chosen.shape[1]
  return (chosen[:, None] & jnp.tri(n, k=-1, dtype=bool)).sum(
      -1, dtype=jnp.int32)


def _inverse(place, size):
  """Which element has place 0, ..., size - 1: int32 [B, N] -> [B, size]."""
  here = place[:, None] == jnp.arange(size)[:, None]
  return jnp.where(here, jnp.arange(place.shape[1]), 0).sum(
      -1, dtype=jnp.int32)


def _solve_batch(cost, count):
  """Solves all problems together; each iteration is one step of every search.

  Args:
    cost: [B, M, Q] finite.
    count: [B] number of real rows; the others are not read.

  Returns:
    [B, Q] int32: the row assigned to each column, or -1.
  """
  b, m, q = cost.shape
  column = jnp.arange(q)[None]
  at = lambda x, j: jnp.take_along_axis(x, j[:, None], 1)[:, 0]

  def search(carry):
    """One step of Dijkstra's algorithm in each problem."""
    target, row, base, distance, before, seen, dual, owner, owner_dual = carry
    # `base`: length of the path so far minus the dual of its last row.
    reduced = jnp.take_along_axis(
        cost, jnp.minimum(row, m - 1)[:, None, None], 1)[:, 0]
    length = base[:, None] + reduced - dual
    shorter = (length < distance) & ~seen
    distance = jnp.where(shorter, length, distance)
    before = jnp.where(shorter, row[:, None], before)
    unseen = jnp.where(seen, jnp.inf, distance)
    low = unseen.min(1)
    # Two plain reductions: XLA's CPU argmin is several times slower.
    nearest = jnp.where(unseen == low[:, None], column, q - 1).min(1)
    row = at(owner, nearest)
    found = (target < count) & (row == _FREE)
    seen = seen | (column == nearest[:, None])
    base = low - at(owner_dual, nearest)
    carry = (target, row, base, distance, before, seen, dual, owner,
             owner_dual)
    return jax.lax.cond(
        found.any(), lambda c: finish(found, nearest, low, c), lambda c: c,
        carry)

  def finish(found, end, low, carry):
    """Where a search `found` a free column: flips its path, starts the next.
    """
    target, row, base, distance, before, seen, dual, owner, owner_dual = carry
    done = found[:, None]
    gain = jnp.where(seen & done, low[:, None] - distance, 0.)
    _, _, owner, owner_dual = jax.lax.while_loop(
        lambda c: c[0].any(), functools.partial(flip, before, target, low),
        (found, end, owner, owner_dual + gain))
    target = target + found
    return (target, jnp.where(found, target, row), jnp.where(found, 0., base),
            jnp.where(done, jnp.inf, distance), before, seen & ~done,
            dual - gain, owner, owner_dual)

  def flip(before, target, low, carry):
    """Assigns a column of the path to the row it was reached from."""
    going, end, owner, owner_dual = carry
    row = at(before, end)
    first = row == target
    # The column that the row gives up; the target itself has none yet.
    there = owner == row[:, None]
    left = jnp.where(first, end, jnp.where(there, column, 0).sum(1))
    value = jnp.where(first, low, jnp.where(there, owner_dual, 0.).sum(1))
    here = going[:, None] & (column == end[:, None])
    return (going & ~first, left, jnp.where(here, row[:, None], owner),
            jnp.where(here, value[:, None], owner_dual))

  zeros = jnp.zeros((b, q), cost.dtype)
  none = jnp.full((b, q), _FREE, jnp.int32)
  start = jnp.zeros(b, jnp.int32)
  *_, owner, _ = jax.lax.while_loop(
      lambda c: jnp.any(c[0] < count), search,
      (start, start, jnp.zeros(b, cost.dtype),
       jnp.full((b, q), jnp.inf, cost.dtype), none, zeros > 0, zeros, none,
       zeros))
  return owner


def _solve_on_gpu(cost, count, interpret=False):
  """`_solve_batch` as one Triton kernel with a warp per problem.

  XLA's loop launches several kernels for each step of a search: tens of
  thousands in all, each of which lasts microseconds.
  """
  # Imported here because machines without a GPU may lack Triton.
  from jax.experimental import pallas as pl  # pylint: disable=g-import-not-at-top
  from jax.experimental.pallas import triton as plt  # pylint: disable=g-import-not-at-top
  b, m, q = cost.shape
  width = pl.next_power_of_2(q)  # Triton needs a power of 2
  cost = jnp.pad(cost, ((0, 0), (0, 0), (0, width - q)),
                 constant_values=jnp.inf)
  owner = pl.pallas_call(
      _solve_kernel, grid=(b,),
      in_specs=[pl.BlockSpec((None, m, width), lambda i: (i, 0, 0)),
                pl.BlockSpec((1,), lambda i: (i,))],
      out_specs=pl.BlockSpec((None, width), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((b, width), jnp.int32),
      compiler_params=plt.CompilerParams(num_warps=1), interpret=interpret,
      name='matching')(cost, count)
  return owner[:, :q]


def _solve_kernel(cost_ref, count_ref, owner_ref):
  """One problem; names as in `_solve_batch`. Refs: [M, Q], [1], [Q].

  Triton's compiler crashes on a while loop some of whose results are not used
  (its pass TritonGPURemoveLayoutConversions takes the numbers of what the loop
  carries for those of its results). So all of them are.
  """
  width = owner_ref.shape[0]
  column = jax.lax.iota(jnp.int32, width)
  # Registers cannot be indexed, so read element j as a masked sum.
  at = lambda x, j: jnp.sum(jnp.where(column == j, x, jnp.zeros_like(x)))

  def insert(target, carry):
    dual, owner, owner_dual, end = carry

    def search(carry):
      distance, before, seen, row, base, _ = carry
      length = base + cost_ref[row, :] - dual
      shorter = (length < distance) & (seen == 0)
      distance = jnp.where(shorter, length, distance)
      before = jnp.where(shorter, row, before)
      open_distance = jnp.where(seen == 0, distance, jnp.inf)
      nearest = jnp.argmin(open_distance, 0).astype(jnp.int32)
      row = at(owner, nearest)
      seen = jnp.where((row != _FREE) & (column == nearest), 1, seen)
      base = jnp.min(open_distance) - at(owner_dual, nearest)
      return distance, before, seen, row, base, nearest

    def flip(carry):
      owner, owner_dual, end = carry
      row = at(before, end)
      first = row == target
      here = owner == row
      left = jnp.where(first, _FREE, jnp.sum(jnp.where(here, column, 0)))
      value = jnp.where(first, low, jnp.sum(jnp.where(here, owner_dual, 0.)))
      owner = jnp.where(column == end, row, owner)
      owner_dual = jnp.where(column == end, value, owner_dual)
      return owner, owner_dual, left

    # A free column has no dual, so `base` ends as the length of the path.
    distance, before, seen, free, low, nearest = jax.lax.while_loop(
        lambda c: c[3] != _FREE, search,
        (jnp.full((width,), jnp.inf, jnp.float32),
         jnp.full((width,), _FREE, jnp.int32),
         jnp.zeros((width,), jnp.int32), target, 0., end))
    gain = jnp.where(seen == 1, low - distance, 0.)
    owner, owner_dual, end = jax.lax.while_loop(
        lambda c: c[2] != free, flip, (owner, owner_dual + gain, nearest))
    return dual - gain, owner, owner_dual, end

  zeros = jnp.zeros((width,), jnp.float32)
  _, owner, *_ = jax.lax.fori_loop(
      0, count_ref[0], insert,
      (zeros, jnp.full((width,), _FREE, jnp.int32), zeros, jnp.int32(_FREE)))
  owner_ref[:] = owner
