"""Softmax attention with one meaning and two forms.

`attention` in plain XLA writes the logits and weights of all heads to memory:
for 364 tokens and 8 heads some 25 times the bytes of its inputs. On a TPU, a
train step therefore runs the kernel of `attention_tpu`, which keeps them on the
chip. A kernel runs on one chip's rows, so it needs to know how the batch is
split: `sharded` says it, and outside of it, or where the kernel does not apply,
the plain form runs.

Dropout of the weights draws its bits by a hash of their position, which costs a
few integer operations and is equal in both forms and on every mesh.
"""
import contextlib
import contextvars
import math
from typing import Any, NamedTuple, Optional, Tuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from e2e_vlp_jax.ops import attention_tpu
from e2e_vlp_jax.ops import cheap_keys

Array = jax.Array
kept = attention_tpu.kept
# By this name, rematerialisation (`layers.remat`) knows attention's results.
RESULT = 'attention_result'
_PLACE = contextvars.ContextVar('attention_place', default=None)


class _Place(NamedTuple):
  mesh: Any
  axes: Tuple[str, ...]


@contextlib.contextmanager
def sharded(mesh, axes):
  """Within it, leading axes of attention's inputs are split over a mesh.

  Args:
    mesh: the mesh of the step that is being traced.
    axes: names of the mesh's axes over which batches are split.
  """
  token = _PLACE.set(_Place(mesh, tuple(axes)))
  try:
    yield
  finally:
    _PLACE.reset(token)


class Dropout(NamedTuple):
  """Dropout of attention weights.

  Attributes:
    rate: probability of dropping a weight.
    seeds: [B] int32, one for each row of the batch.
  """
  rate: float
  seeds: Array


def draw_dropout(key, rate, rows):
  """A `Dropout` for a batch of `rows` rows, from a random key."""
  a, b = cheap_keys.words(key)
  seeds = cheap_keys.mix(
      a + jnp.arange(rows, dtype=jnp.uint32) * jnp.uint32(0x9e3779b9)) ^ b
  return Dropout(rate, jax.lax.bitcast_convert_type(seeds, jnp.int32))


def attention(query: Array, key: Array, value: Array,
              bias: Optional[Array] = None, table: Optional[Array] = None,
              dropout: Optional[Dropout] = None) -> Array:
  """Softmax attention; the softmax runs in float32.

  Args:
    query: [B, W, T, H, D]; W independent windows of each row, or 1.
    key, value: [B, W, N, H, D].
    bias: added to the logits; broadcasts to [B, W, H, T, N].
    table: [H, T, N], added to the logits too; for learned positions.
    dropout: of the weights, or None.

  Returns:
    [B, W, T, H, D].
  """
  place, bias = _PLACE.get(), _expanded(bias)
  if place is not None and _kernel_applies(place, query, key, bias):
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    return _kernel(place, query.shape[3],
                   (flat(query), flat(key), flat(value)), bias, table,
                   dropout).reshape(query.shape)
  return checkpoint_name(_plain(query, key, value, bias, table, dropout),
                         RESULT)


def _plain(query, key, value, bias, table, dropout):
  """`attention` in XLA."""
  logits = jnp.einsum(
      '...thd,...nhd->...htn', query / math.sqrt(query.shape[-1]), key,
      preferred_element_type=jnp.promote_types(query.dtype, jnp.float32))
  if table is not None:
    bias = table if bias is None else table + bias
  if bias is not None:
    logits = logits + bias
  weights = jax.nn.softmax(logits).astype(value.dtype)
  if dropout is not None:
    shape = weights.shape[1:]
    keep = jax.vmap(lambda seed: kept(
        jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape), seed,
        dropout.rate))(dropout.seeds)
    weights = jnp.where(keep, weights / (1 - dropout.rate), 0)
  return jnp.einsum('...htn,...nhd->...thd', weights, value)


def _kernel_applies(place, query, key, bias):
  """Whether the kernel can compute this attention, where it would run."""
  device = place.mesh.devices.flat[0]
  batch = math.prod(place.mesh.shape[a] for a in place.axes)
  return (device.platform == 'tpu' and place.mesh.size == batch
          and query.shape[0] % batch == 0
          # A bias for each head may be learned; the kernel has no gradient.
          and (bias is None or bias.shape[2] < query.shape[3]
               and bias.shape[-1] == key.shape[2])
          and attention_tpu.applies(query, key))


def self_attention(project, shape, heads, bias=None, table=None):
  """Attention of tokens to themselves, by one projection for all three inputs.

  Args:
    project: function (order) -> queries, keys and values, side by side
      [B, W, T, 3 C], made with weights whose last axis `order` has permuted.
    shape: ShapeDtypeStruct [B, W, T, C] of the result.
    heads: number of heads.
    bias, table: see `attention`.

  Returns:
    [B, W, T, C].
  """
  split = lambda y: y.reshape(*y.shape[:-1], heads, y.shape[-1] // heads)
  one = jax.eval_shape(split, shape)
  place, bias = _PLACE.get(), _expanded(bias)
  if place is not None and _kernel_applies(place, one, one, bias):
    # The barrier keeps the compiler from reordering tokens instead of weights.
    packed = project(lambda weights: jax.lax.optimization_barrier(
        attention_tpu.pack(weights)))
    return _kernel(place, heads, (packed,), bias, table, None)
  parts = jnp.split(project(lambda weights: weights), 3, -1)
  return attention(*map(split, parts), bias, table).reshape(shape.shape)


def _expanded(bias):
  """`bias` with five axes, or None."""
  return None if bias is None else jnp.expand_dims(
      bias, range(5 - jnp.ndim(bias)))


def _kernel(place, heads, arrays, bias, table, dropout):
  """The kernel, on every chip for its own rows.

  Args:
    place: _Place.
    heads: number of heads.
    arrays: query, key and value [B, W, T or N, C], or packed.
    bias, table, dropout: see `attention`.
  """
  # Every axis is named, as the gradient would be summed over the others.
  rows, rate = P(place.mesh.axis_names), dropout.rate if dropout else 0.
  others = {}
  if table is not None:
    others['table'] = table, P()
  if bias is not None:  # [1 or B, 1 or W, 1 or T, N]
    others['bias'] = bias[:, :, 0], P() if len(bias) == 1 else rows
  if dropout is not None:
    others['seeds'] = dropout.seeds, rows

  def run(arrays, others):
    return attention_tpu.attention(*arrays, heads=heads, rate=rate, **others)
  # Not checked: a kernel does not say over which axes its results vary.
  run = jax.shard_map(
      run, mesh=place.mesh, out_specs=rows, check_vma=False,
      in_specs=((rows,) * len(arrays), {k: s for k, (_, s) in others.items()}))
  return checkpoint_name(
      run(arrays, {k: x for k, (x, _) in others.items()}), RESULT)
