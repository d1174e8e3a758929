"""Attention of one GPU as Pallas kernels through Triton; see `attention`.

After Dao et al. (FlashAttention-2, 2023): a program computes one block of
queries of one head and reads the keys block by block, so that no logits reach
the memory. The forward kernel also gives the logarithm of each row's sum, by
which the two backward kernels compute the weights again: one for the gradients
of the queries, one for those of keys and values. Each value is summed by one
program in one order, so that results repeat to the bit.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.experimental import pallas as pl

from e2e_vlp_jax.ops import cheap_keys

_BLOCK = 64  # queries, and keys, of a block
_WIDTHS = (16, 32, 64)
# Bytes of a token of one head. Twice as many take 140 kB of shared memory, and
# some GPUs that run Triton have 99.
_MAX_TOKEN = 128
_LOW = -1e30  # below every logit; finite, because inf - inf is NaN
_WARPS, _STAGES = 4, 3  # the fastest of 4 or 8 and 2 or 3 on an H100


def applies(query):
  """Whether the kernels can compute attention of queries [B, W, T, H, D]."""
  return (query.dtype in (jnp.bfloat16, jnp.float32) and query.shape[2] > 1
          and query.shape[-1] in _WIDTHS
          and query.shape[-1] * query.dtype.itemsize <= _MAX_TOKEN)


def attention(query, key, value, *, heads, rate=0., bias=None, seeds=None,
              result='', interpret=False):
  """Softmax attention.

  Args:
    query: [B, W, T, C], C = heads * D.
    key, value: [B, W, N, C].
    heads: number of heads, side by side in C.
    rate: probability of dropping a weight.
    bias: [1 or B, 1 or W, 1 or T, N] added to the logits of all heads; gets
      no gradient.
    seeds: [B] int32, for dropout.
    result: by this name, rematerialisation knows what to keep.
    interpret: run without a GPU, for tests.

  Returns:
    [B, W, T, C].
  """
  static = heads, rate if seeds is not None else 0., result, interpret
  others = {'bias': bias, 'seeds': seeds}
  return _attention(static, query, key, value,
                    {k: x for k, x in others.items() if x is not None})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query, key, value, others):
  return _attention_fwd(static, query, key, value, others)[0]


def _attention_fwd(static, query, key, value, others):
  heads, _, result, _ = static
  b, w, t, _ = query.shape
  found = _call(
      _forward, static, query.shape[2],
      {'query': query, 'key': key, 'value': value, **others},
      {'out': query, 'log_sum': jax.ShapeDtypeStruct((b, w, heads, t),
                                                     jnp.float32)}, 2)
  out, log_sum = (checkpoint_name(found[k], result)
                  for k in ('out', 'log_sum'))
  return out, (query, key, value, others, out, log_sum)


def _attention_bwd(static, kept, gradient):
  query, key, value, others, out, log_sum = kept
  # sum over keys of weight * its gradient, which is the same with dropout
  inner = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).reshape(
      *out.shape[:-1], static[0], -1).sum(-1).swapaxes(-1, -2)
  inputs = {'query': query, 'key': key, 'value': value, 'gradient': gradient,
            'log_sum': log_sum, 'inner': inner, **others}
  of_queries = _call(_backward_of_queries, static, query.shape[2], inputs,
                     {'query': query}, 3)
  of_keys = _call(_backward_of_keys, static, key.shape[2], inputs,
                  {'key': key, 'value': value}, 4)
  return (of_queries['query'], of_keys['key'], of_keys['value'],
          {k: None for k in others})


_attention.defvjp(_attention_fwd, _attention_bwd)


def _spec(name, x, width, windows):
  """Which block of x a program sees: all tokens of one head."""
  a, b = int(x.shape[0] > 1), int(x.ndim > 1 and x.shape[1] > 1)
  if name == 'seeds':
    return pl.BlockSpec((1,), lambda i, h, k: (i // windows * a,))
  if name == 'bias':
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, k: (
        i // windows * a, i % windows * b, 0, 0))
  if name in ('log_sum', 'inner'):
    return pl.BlockSpec((None, None, None, x.shape[3]), lambda i, h, k: (
        i // windows, i % windows, h, 0))
  return pl.BlockSpec((None, None, x.shape[2], width), lambda i, h, k: (
      i // windows, i % windows, 0, h))


def _call(kernel, static, length, inputs, outputs, products):
  """Runs a kernel over (rows and windows, heads, blocks).

  Args:
    kernel: `_forward` or one of the backward ones.
    static: (heads, rate, result, interpret).
    length: tokens that the programs of a head share out.
    inputs: {name: array}.
    outputs: {name: something of the result's shape and dtype}.
    products: number of matrix products of a head, for the count of FLOPs.

  Returns:
    {name of an output: array}.
  """
  # Imported here because machines without a GPU may lack Triton.
  from jax.experimental.pallas import triton as plt  # pylint: disable=g-import-not-at-top
  heads, rate, _, interpret = static
  b, w, t, c = inputs['query'].shape
  n, names = inputs['key'].shape[2], list(inputs)

  def body(*refs):
    place = pl.program_id(0) % w * heads + pl.program_id(1)
    kernel(_Head(t, n, c // heads, rate, place, dict(zip(names, refs)), plt),
           pl.program_id(2), dict(zip(outputs, refs[len(names):])))
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()]
  moved = sum(x.size * x.dtype.itemsize for x in [*inputs.values(), *shapes])
  found = pl.pallas_call(
      body, grid=(b * w, heads, pl.cdiv(length, _BLOCK)), out_shape=shapes,
      in_specs=[_spec(k, x, c // heads, w) for k, x in inputs.items()],
      out_specs=[_spec(k, x, c // heads, w) for k, x in outputs.items()],
      interpret=interpret, name=f'attention{kernel.__name__}',
      cost_estimate=pl.CostEstimate(
          flops=products * 2 * b * w * t * n * c,
          transcendentals=b * w * t * n * heads, bytes_accessed=moved),
      compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES))(
          *inputs.values())
  return dict(zip(outputs, found))


# --- In the kernels -----------------------------------------------------------
class _Head(NamedTuple):
  """One head of one window, as a program sees it.

  Attributes:
    queries, keys: T and N.
    width: D.
    rate: of dropout.
    place: number of the head among all of its row's windows.
    refs: {name: all tokens of an input}.
    triton: the module of loads and stores with a mask.
  """
  queries: int
  keys: int
  width: int
  rate: float
  place: Any
  refs: Any
  triton: Any

  @property
  def scale(self):
    return 1 / math.sqrt(self.width)

  def read(self, name, block):
    """Tokens of a block: [_BLOCK, D], or [_BLOCK]; zeros beyond the end."""
    ref = self.refs[name]
    return self.triton.load(ref.at[pl.ds(block * _BLOCK, _BLOCK)],
                            mask=self._inside(ref, block), other=0.)

  def write(self, ref, block, value):
    """Writes a block's tokens, those before the end."""
    self.triton.store(ref.at[pl.ds(block * _BLOCK, _BLOCK)],
                      value.astype(ref.dtype), mask=self._inside(ref, block))

  def _inside(self, ref, block):
    """Which values of a block are before the end."""
    rows = block * _BLOCK + jnp.arange(_BLOCK)
    inside = rows < ref.shape[0]
    if len(ref.shape) == 1:
      return inside
    return jnp.broadcast_to(inside[:, None], (_BLOCK, self.width))

  def logits(self, query, key, i, j):
    """[_BLOCK, _BLOCK] float32 of block i of the queries and j of the keys."""
    logits = _product(query, key, 1, 1) * self.scale
    row, column = self.places(i, j)
    real = column < self.keys
    if 'bias' in self.refs:
      ref = self.refs['bias']
      columns = pl.ds(j * _BLOCK, _BLOCK)
      if ref.shape[0] == 1:
        here = j * _BLOCK + jnp.arange(_BLOCK) < self.keys
        bias = self.triton.load(ref.at[pl.ds(0, 1), columns], mask=here[None],
                                other=0.)
      else:
        bias = self.triton.load(
            ref.at[pl.ds(i * _BLOCK, _BLOCK), columns], other=0.,
            mask=real & (row < self.queries))
      logits = logits + bias.astype(jnp.float32)
    return jnp.where(real, logits, _LOW)

  def places(self, i, j):
    """Numbers of the queries and keys of blocks i and j."""
    shape = _BLOCK, _BLOCK
    return (i * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, shape, 0),
            j * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, shape, 1))

  def dropout(self, i, j, *arrays):
    """Each array [_BLOCK, _BLOCK] after the same dropout."""
    if not self.rate:
      return arrays
    row, column = self.places(i, j)
    keep = cheap_keys.kept(
        (self.place * self.queries + row) * self.keys + column,
        self.refs['seeds'][0], self.rate)
    return [jnp.where(keep, x / (1 - self.rate), 0.) for x in arrays]


def _product(x, y, a, b):
  """Matrix product that sums over axis a of x and b of y, in float32."""
  return jax.lax.dot_general(x, y, (((a,), (b,)), ((), ())),
                             preferred_element_type=jnp.float32)


def _blocks(length):
  return pl.cdiv(length, _BLOCK)


def _forward(head, i, outputs):
  query = head.read('query', i)

  def add(j, sums):
    out, most, total = sums
    logits = head.logits(query, head.read('key', j), i, j)
    higher = jnp.maximum(most, logits.max(-1))
    shrink = jnp.exp(most - higher)
    powers = jnp.exp(logits - higher[:, None])
    dropped, = head.dropout(i, j, powers)
    value = head.read('value', j)
    out = out * shrink[:, None] + _product(dropped.astype(value.dtype), value,
                                           1, 0)
    return out, higher, total * shrink + powers.sum(-1)
  zeros = jnp.zeros(_BLOCK, jnp.float32)
  out, most, total = jax.lax.fori_loop(
      0, _blocks(head.keys), add,
      (jnp.zeros((_BLOCK, head.width), jnp.float32), zeros + _LOW, zeros))
  head.write(outputs['out'], i, out / total[:, None])
  head.write(outputs['log_sum'], i, most + jnp.log(total))


def _gradients(head, i, j, query, key, value, gradient):
  """Dropped weights and gradients of the logits, of two blocks."""
  weights = jnp.exp(head.logits(query, key, i, j)
                    - head.read('log_sum', i)[:, None])
  # Queries beyond the end have no sum; their gradient is zero, and finite
  # weights keep the products so.
  row, _ = head.places(i, j)
  weights = jnp.where(row < head.queries, weights, 0.)
  dropped, d_weights = head.dropout(
      i, j, weights, _product(gradient, value, 1, 1))
  d_logits = weights * (d_weights - head.read('inner', i)[:, None])
  return dropped, d_logits * head.scale


def _backward_of_queries(head, i, outputs):
  query, gradient = head.read('query', i), head.read('gradient', i)

  def add(j, total):
    key = head.read('key', j)
    _, d_logits = _gradients(head, i, j, query, key, head.read('value', j),
                             gradient)
    return total + _product(d_logits.astype(key.dtype), key, 1, 0)
  head.write(outputs['query'], i, jax.lax.fori_loop(
      0, _blocks(head.keys), add,
      jnp.zeros((_BLOCK, head.width), jnp.float32)))


def _backward_of_keys(head, j, outputs):
  key, value = head.read('key', j), head.read('value', j)

  def add(i, sums):
    of_key, of_value = sums
    query, gradient = head.read('query', i), head.read('gradient', i)
    dropped, d_logits = _gradients(head, i, j, query, key, value, gradient)
    return (of_key + _product(d_logits.astype(query.dtype), query, 0, 0),
            of_value + _product(dropped.astype(gradient.dtype), gradient, 0, 0))
  zeros = jnp.zeros((_BLOCK, head.width), jnp.float32)
  of_key, of_value = jax.lax.fori_loop(0, _blocks(head.queries), add,
                                       (zeros, zeros))
  head.write(outputs['key'], j, of_key)
  head.write(outputs['value'], j, of_value)
