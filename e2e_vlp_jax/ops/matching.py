"""Optimal assignment of predictions to targets, on the device.

optax's Hungarian algorithm is exact and jittable. Two things are added: a
non-finite cost is replaced and counted (optax would return the identity
without a word), and on a mesh the loop runs inside shard_map (under GSPMD its
while loop would exchange data in every iteration).
"""
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from e2e_vlp_jax import errors


def _assign(cost, mask):
  """One problem: cost [Q, M], mask [M] -> query of each target [M]."""
  # Padded targets cost the same everywhere, so they take what is left over
  # and cannot change the real targets' optimum.
  finite = jnp.isfinite(cost)
  # A pair without a finite cost costs more than all that it could save
  # elsewhere, so it is taken only where nothing else is left. Not more than
  # that: the sums below have 24 bits.
  span = jnp.max(jnp.where(finite & mask[None, :], jnp.abs(cost), 0.))
  cost = jnp.where(finite, cost, (2 * span + 1) * cost.shape[1])
  cost = jnp.where(mask[None, :], cost, 0.)
  rows, cols = optax.assignment.hungarian_algorithm(cost)
  index = jnp.zeros(cost.shape[1], jnp.int32).at[cols].set(
      rows.astype(jnp.int32))
  bad = jnp.sum(~finite & mask[None, :])
  return index, bad.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('mesh', 'axes'))
def hungarian(cost, mask, mesh=None, axes=()):
  """Minimum-cost matching of targets to queries, a batch of problems.

  Args:
    cost: [B, Q, M] float, Q >= M.
    mask: [B, M] True where the target is real.
    mesh: if given, the batch is sharded over its axes `axes`.
    axes: names of mesh axes.

  Raises:
    UserError: more targets than queries.

  Returns:
    index [B, M] int32: the query assigned to each target (padded targets get
    distinct leftover queries), and bad [B] int32: how many costs of real
    targets were not finite. Callers report it; a run with bad > 0 has
    diverged.
  """
  if cost.shape[1] < cost.shape[2]:
    raise errors.UserError(
        f'data.max_boxes: {cost.shape[2]} boxes for {cost.shape[1]} queries; '
        'expected model.num_queries >= data.max_boxes')
  cost = jax.lax.stop_gradient(cost).astype(jnp.float32)
  solve = jax.vmap(_assign)
  if mesh is None or not axes:
    return solve(cost, mask)
  spec = P(axes)
  return jax.shard_map(solve, mesh=mesh, in_specs=(spec, spec),
                       out_specs=(spec, spec), check_vma=False)(cost, mask)
