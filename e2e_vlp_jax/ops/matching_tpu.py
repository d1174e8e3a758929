"""Assignment on a TPU as a Pallas (Mosaic) kernel; see ops/matching.py.

XLA's loop starts some twenty small programs for every step of a search. Here
one program runs all steps of eight problems, one in each sublane of a vector:
every quantity of a problem is a row of lanes, one lane for each query, and all
of them stay in registers. A step reads one row of costs in each problem. Rows
of different numbers cannot be loaded as one vector, so it selects them from all
rows, which are in the chip's memory: one comparison and one selection a row.

Everything is float32, as Mosaic has no sum of integers over lanes; numbers of
rows and queries are exact in it.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_SUBLANES, _LANES = 8, 128
_AT_ONCE = 8  # rows that a turn of the selecting loop looks at
_FREE = -1.
# Costs of eight problems; twice this are in the chip's memory, which holds
# 16 MB by default.
_MAX_COSTS = 6 * 2**20


def applies(m, q):
  """Whether the costs of eight problems [M, Q] fit into the chip's memory."""
  return 4 * _SUBLANES * m * (-q // _LANES * -_LANES) <= _MAX_COSTS


def solve(cost, count, interpret=False):
  """The kernel's equivalent of `matching._solve_batch`.

  Args:
    cost: [B, M, Q] float32, finite.
    count: [B] int32, number of real rows; the others are not read.
    interpret: run without a TPU, for tests.

  Returns:
    [B, Q] int32: the row assigned to each column, or -1.
  """
  b, m, q = cost.shape
  rows, width = -b // _SUBLANES * -_SUBLANES, -q // _LANES * -_LANES
  m = -m // _AT_ONCE * -_AT_ONCE
  cost = jnp.pad(cost, ((0, rows - b), (0, m - cost.shape[1]), (0, width - q)),
                 constant_values=jnp.inf)
  count = jnp.pad(count.astype(jnp.float32), (0, rows - b))
  owner = pl.pallas_call(
      _kernel, grid=(rows // _SUBLANES,),
      in_specs=[pl.BlockSpec((m, _SUBLANES, width), lambda i: (0, i, 0)),
                pl.BlockSpec((_SUBLANES, _LANES), lambda i: (i, 0))],
      out_specs=pl.BlockSpec((_SUBLANES, width), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((rows, width), jnp.float32),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel',)),
      interpret=interpret, name='matching')(
          cost.swapaxes(0, 1), jnp.broadcast_to(count[:, None],
                                                (rows, _LANES)))
  return owner[:b, :q].astype(jnp.int32)


def _kernel(cost_ref, count_ref, owner_ref):
  """Eight problems; names as in `matching._solve_batch`.

  Refs: costs [M, 8, Q], numbers of targets [8, 128], owners [8, Q]. What is one
  number in each problem is [8, 1].
  """
  shape = owner_ref.shape
  column = jax.lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)
  count = count_ref[:, :1]
  chunks = jnp.max((count + _AT_ONCE - 1) / _AT_ONCE).astype(jnp.int32)
  total = lambda x: jnp.sum(x, 1, keepdims=True)
  at = lambda x, j: total(jnp.where(column == j, x, 0.))

  def read(row):
    """[8, Q]: row `row` [8, 1] of each problem's costs."""
    row = jnp.broadcast_to(row, shape)  # Once, as it is a permutation.

    def pick(k, found):
      for i in range(_AT_ONCE):
        n = k * _AT_ONCE + i
        found = jnp.where(row == n.astype(jnp.float32), cost_ref[n], found)
      return found
    return jax.lax.fori_loop(0, chunks, pick,
                             jnp.full(shape, jnp.inf, jnp.float32))

  def search(carry):
    """One step of Dijkstra's algorithm in each problem."""
    target, row, base, distance, before, seen, dual, owner, owner_dual = carry
    length = base + read(row) - dual
    shorter = (length < distance) & (seen == 0.)
    distance = jnp.where(shorter, length, distance)
    before = jnp.where(shorter, row, before)
    unseen = jnp.where(seen == 0., distance, jnp.inf)
    low = jnp.min(unseen, 1, keepdims=True)
    nearest = jnp.min(jnp.where(unseen == low, column, float(shape[1] - 1)), 1,
                      keepdims=True)
    row = at(owner, nearest)
    found = jnp.where((target < count) & (row == _FREE), 1., 0.)
    seen = jnp.where(column == nearest, 1., seen)
    base = low - at(owner_dual, nearest)
    carry = (target, row, base, distance, before, seen, dual, owner,
             owner_dual)
    return jax.lax.cond(
        jnp.max(found) > 0., functools.partial(finish, found, nearest, low),
        lambda *c: c, *carry)

  def finish(found, end, low, *carry):
    """Where a search `found` a free column: flips its path, starts the next."""
    target, row, base, distance, before, seen, dual, owner, owner_dual = carry

    def flip(carry):
      going, end, owner, owner_dual = carry
      row = at(before, end)
      first = row == target
      there = owner == row
      left = jnp.where(first, end, total(jnp.where(there, column, 0.)))
      value = jnp.where(first, low, total(jnp.where(there, owner_dual, 0.)))
      here = (going > 0.) & (column == end)
      return (jnp.where(first, 0., going), left, jnp.where(here, row, owner),
              jnp.where(here, value, owner_dual))

    gain = jnp.where((seen > 0.) & (found > 0.), low - distance, 0.)
    _, _, owner, owner_dual = jax.lax.while_loop(
        lambda c: jnp.max(c[0]) > 0., flip,
        (found, end, owner, owner_dual + gain))
    target = target + found
    done = found > 0.
    return (target, jnp.where(done, target, row), jnp.where(done, 0., base),
            jnp.where(done, jnp.inf, distance), before,
            jnp.where(done, 0., seen), dual - gain, owner, owner_dual)

  zeros = jnp.zeros(shape, jnp.float32)
  start = jnp.zeros((shape[0], 1), jnp.float32)
  none = jnp.full(shape, _FREE, jnp.float32)
  *_, owner, _ = jax.lax.while_loop(
      lambda c: jnp.max(count - c[0]) > 0., search,
      (start, start, start, jnp.full(shape, jnp.inf, jnp.float32), none, zeros,
       zeros, none, zeros))
  owner_ref[:] = owner
