"""Softmax attention with one meaning and three forms.

`attention` in plain XLA writes the logits and weights of all heads to memory:
for 364 tokens and 8 heads some 25 times the bytes of its inputs. A train step
therefore runs the kernels of `attention_tpu` or `attention_gpu`, which keep
them on the chip. Where the place (`place.on`) is not known, or the kernel does
not apply, the plain form runs.

Dropout of the weights draws its bits by a hash of their position, which costs a
few integer operations and is equal in all forms and on every mesh.
"""
import functools
import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from e2e_vlp_jax.ops import attention_gpu
from e2e_vlp_jax.ops import attention_tpu
from e2e_vlp_jax.ops import cheap_keys
from e2e_vlp_jax.ops import kernels
from e2e_vlp_jax.ops import place as place_lib

Array = jax.Array
kept = cheap_keys.kept
# By this name, rematerialisation (`layers.remat`) knows attention's results.
RESULT = 'attention_result'


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
              bias: Array | None = None, table: Array | None = None,
              dropout: Dropout | None = None) -> Array:
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
  place, bias = place_lib.current(), _expanded(bias)
  if place is not None and _kernel_applies(place, query, key, bias, table):
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    return _kernel(place, query.shape[3],
                   (flat(query), flat(key), flat(value)), bias, table,
                   dropout).reshape(query.shape)
  if query.shape[1] > 1:
    out = _plain(query, key, value, bias, table, dropout)
  else:  # An axis of length 1 makes XLA round some products otherwise.
    out = _plain(query[:, 0], key[:, 0], value[:, 0],
                 None if bias is None else bias[:, 0], table, dropout)[:, None]
  return checkpoint_name(out, RESULT)


def _plain(query, key, value, bias, table, dropout):
  """`attention` in XLA."""
  # In bfloat16, if the inputs are: what is written has half the bytes, and the
  # softmax is computed in float32 where it is read.
  logits = jnp.einsum('...thd,...nhd->...htn',
                      query / math.sqrt(query.shape[-1]), key)
  if table is not None:
    bias = table if bias is None else table + bias
  if bias is not None:
    logits = logits + bias
  weights = _softmax(logits, value.dtype)
  if dropout is not None:
    shape = weights.shape[1:]
    keep = jax.vmap(lambda seed: kept(
        jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape), seed,
        dropout.rate))(dropout.seeds)
    weights = jnp.where(keep, weights / (1 - dropout.rate), 0)
  return jnp.einsum('...htn,...nhd->...thd', weights, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(logits, dtype):
  """softmax in float32, as `dtype`; only the result is kept for gradients."""
  wide = jnp.promote_types(logits.dtype, jnp.float32)
  return jax.nn.softmax(logits.astype(wide)).astype(dtype)


def _softmax_fwd(logits, dtype):
  weights = _softmax(logits, dtype)
  return weights, (weights, jnp.zeros((), logits.dtype))


def _softmax_bwd(dtype, kept_, gradient):
  del dtype
  weights, like = kept_
  wide = jnp.promote_types(weights.dtype, jnp.float32)
  weights, gradient = weights.astype(wide), gradient.astype(wide)
  inner = (weights * gradient).sum(-1, keepdims=True)
  return (weights * (gradient - inner)).astype(like.dtype),


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


def _kernel_applies(place, query, key, bias, table=None):
  """Whether a kernel can compute this attention, where it would run."""
  batch = math.prod(place.mesh.shape[a] for a in place.axes)
  return (kernels.wanted('attention') and place.mesh.size == batch
          and query.shape[0] % batch == 0
          # A bias for each head may be learned; the kernels have no gradient.
          and (bias is None or bias.shape[2] < query.shape[3]
               and bias.shape[-1] == key.shape[2])
          and (attention_tpu.applies(query, key) if place.platform == 'tpu'
               else place.platform == 'gpu' and table is None
               and kernels.triton_runs() and attention_gpu.applies(query)))


def projects(shape, dtype, heads, bias):
  """Whether `projected` can compute the attention of x to itself: on TPUs.

  Args:
    shape, dtype: of x [B, W, T, C].
    heads: number of heads.
    bias: see `attention`.
  """
  place = place_lib.current()
  x = jax.ShapeDtypeStruct((*shape[:-1], heads, shape[-1] // heads), dtype)
  return (place is not None and place.platform == 'tpu'
          and _kernel_applies(place, x, x, _expanded(bias)))


def projected(x, kernel, offset, heads, bias=None, table=None):
  """Attention of x to itself; queries, keys and values are not copied apart.

  Args:
    x: [B, W, T, C].
    kernel, offset: [C, 3 C] and [3 C], weights of one projection to queries,
      keys and values.
    heads: number of heads.
    bias, table: see `attention`.

  Returns:
    [B, W, T, C].
  """
  # The barrier keeps the compiler from reordering x instead of the weights.
  kernel, offset = jax.lax.optimization_barrier(
      (attention_tpu.pack(kernel), attention_tpu.pack(offset)))
  return _kernel(place_lib.current(), heads, (x @ kernel + offset,),
                 _expanded(bias), table, None)


def _expanded(bias):
  """`bias` with five axes, or None."""
  return None if bias is None else jnp.expand_dims(
      bias, range(5 - jnp.ndim(bias)))


def _kernel(place, heads, arrays, bias, table, dropout):
  """The chip's kernel, on every chip for its own rows.

  Args:
    place: a Place.
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
    if place.platform == 'gpu':
      return attention_gpu.attention(*arrays, heads=heads, rate=rate,
                                     result=RESULT, **others)
    return attention_tpu.attention(*arrays, heads=heads, rate=rate, **others)
  # Not checked: a kernel does not say over which axes its results vary.
  run = jax.shard_map(
      run, mesh=place.mesh, out_specs=rows, check_vma=False,
      in_specs=((rows,) * len(arrays), {k: s for k, (_, s) in others.items()}))
  return checkpoint_name(
      run(arrays, {k: x for k, (x, _) in others.items()}), RESULT)
