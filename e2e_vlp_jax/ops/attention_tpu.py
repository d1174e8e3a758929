"""Attention of one TPU chip as a Pallas kernel; see `attention`.

One program computes as many heads as share 128 lanes: all logits [T, N] of a
head are in the chip's memory, and nothing of that size leaves it. The backward
kernel computes them again. A head is selected by setting the others' lanes to
zero, because slices of fewer than 128 lanes would have to be moved; the matrix
unit is 128 deep and wide in any case.
"""
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
# Logits of a head in float32: the backward kernel holds about five arrays of
# this size.
_MAX_LOGITS = 2**20
_VMEM = 100 * 2**20


def applies(query, key):
  """Whether the kernel can compute attention of [B, W, T, H, D] inputs."""
  (t, h, d), n = query.shape[2:], key.shape[2]
  return (query.dtype in (jnp.bfloat16, jnp.float32) and t > 1
          and (h * d) % _LANES == 0 and _LANES % d == 0
          and t * n <= _MAX_LOGITS)


def kept(position, seed, rate):
  """True with probability 1 - rate, by a hash of position and seed (int32).

  The steps before the last are those of MurmurHash3's finaliser. In unsigned
  integers these are `cheap_keys.mix`; kernels compute with signed ones.
  """
  shift = jax.lax.shift_right_logical
  constant = lambda n: jnp.int32(n - 2**32 if n >= 2**31 else n)
  x = position ^ seed
  x = (x ^ shift(x, jnp.int32(16))) * constant(0x85ebca6b)
  x = (x ^ shift(x, jnp.int32(13))) * constant(0xc2b2ae35)
  # Without the factor, seeds would only permute the positions.
  x = (x ^ shift(x, jnp.int32(16))) * (seed | jnp.int32(1))
  return shift(x, jnp.int32(8)) >= jnp.int32(round(rate * 2**24))


def attention(query, key, value, *, heads, rate=0., bias=None, table=None,
              seeds=None, interpret=False):
  """Softmax attention.

  Args:
    query: [B, W, T, C], C = heads * D.
    key, value: [B, W, N, C].
    heads: number of heads, side by side in C.
    rate: probability of dropping a weight.
    bias: [1 or B, 1 or W, 1 or T, N] added to the logits of all heads; gets
      no gradient.
    table: [heads, T, N] added to the logits.
    seeds: [B] int32, for dropout.
    interpret: run without a TPU, for tests.

  Returns:
    [B, W, T, C].
  """
  return _attention((heads, rate if seeds is not None else 0., interpret),
                    query, key, value, bias, table, seeds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query, key, value, bias, table, seeds):
  inputs = dict(query=query, key=key, value=value, bias=bias, table=table,
                seeds=seeds)
  return _call(_forward, static, inputs, ('query',), 2)[0]


def _attention_fwd(static, *inputs):
  return _attention(static, *inputs), inputs


def _attention_bwd(static, inputs, gradient):
  inputs = dict(zip(('query', 'key', 'value', 'bias', 'table', 'seeds'),
                    inputs), gradient=gradient)
  wanted = ('query', 'key', 'value') + (
      () if inputs['table'] is None else ('table',))
  dq, dk, dv, *dtable = _call(_backward, static, inputs, wanted, 5)
  return dq, dk, dv, None, dtable[0] if dtable else None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(kernel, static, inputs, outputs, products):
  """Runs a kernel over (groups of heads, rows, windows).

  Args:
    kernel: `_forward` or `_backward`.
    static: (heads, rate, interpret).
    inputs: {name: array or None}.
    outputs: names of the inputs whose shapes the results have.
    products: number of matrix products of a head, for the count of FLOPs.
  """
  heads, rate, interpret = static
  b, w, t, c = inputs['query'].shape
  n = inputs['key'].shape[2]
  d = c // heads
  inputs = {k: x for k, x in inputs.items() if x is not None}

  def spec(name, x):
    if name == 'seeds':
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    if name == 'table':
      return pl.BlockSpec((_LANES // d, t, n), lambda g, i, j: (g, 0, 0))
    if name == 'bias':
      rows, windows = x.shape[:2]
      return pl.BlockSpec(
          (None, None, *x.shape[2:]),
          lambda g, i, j: (i if rows > 1 else 0, j if windows > 1 else 0, 0,
                           0))
    return pl.BlockSpec((None, None, x.shape[2], _LANES),
                        lambda g, i, j: (i, j, 0, g))
  names = list(inputs)
  specs = {k: spec(k, x) for k, x in inputs.items()}

  def body(*refs):
    found = dict(zip(names, refs))
    place = tuple(pl.program_id(axis) for axis in range(3))
    kernel(lambda k: _Head(k, d, found, heads, rate, place), found,
           dict(zip(outputs, refs[len(names):])), _LANES // d)
  shapes = [jax.ShapeDtypeStruct(inputs[k].shape, inputs[k].dtype)
            for k in outputs]
  moved = sum(x.size * x.dtype.itemsize for x in [*inputs.values(), *shapes])
  return pl.pallas_call(
      body, grid=(c // _LANES, b, w), out_shape=shapes,
      in_specs=[specs[k] for k in names],
      out_specs=[specs[k] for k in outputs], interpret=interpret,
      name=f'attention{kernel.__name__}',
      cost_estimate=pl.CostEstimate(
          flops=products * 2 * b * w * t * n * c,
          transcendentals=b * w * t * n * heads, bytes_accessed=moved),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('arbitrary',) * 3, vmem_limit_bytes=_VMEM))(
              *inputs.values())


# --- In the kernels -----------------------------------------------------------
class _Head(NamedTuple):
  """Head number `k` of a program's heads.

  Attributes:
    k: int or int32 scalar.
    width: D.
    refs: {name: the program's block of an input}.
    heads: number of all heads.
    rate: of dropout.
    place: (group of heads, row, window) of the program.
  """
  k: Any
  width: int
  refs: Any
  heads: int
  rate: float
  place: Any

  def only(self, x):
    """x [T, 128] with the lanes of the other heads set to zero."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = self.k * self.width
    mine = (lane >= first) & (lane < first + self.width)
    return jnp.where(mine, x, jnp.zeros_like(x))

  @property
  def scale(self):
    return 1 / math.sqrt(self.width)

  def weights(self, query, key):
    """Softmax weights [T, N] of `only(query)` and key, float32."""
    logits = _product(query, key, 1, 1) * self.scale
    if 'bias' in self.refs:
      logits = logits + self.refs['bias'][...]
    if 'table' in self.refs:
      logits = logits + self.refs['table'][self.k]
    powers = jnp.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)

  def dropout(self, *arrays):
    """Each array [T, N] after the same dropout."""
    if not self.rate:
      return arrays
    t, n = arrays[0].shape
    group, batch, window = self.place
    head = group * (_LANES // self.width) + self.k
    first = (window * self.heads + head) * t
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (t, n), axis)
                   for axis in (0, 1))
    keep = kept((first + row) * n + column,
                self.refs['seeds'][batch], self.rate)
    return [jnp.where(keep, x / (1 - self.rate), 0.) for x in arrays]


def _product(x, y, a, b):
  """Matrix product that sums over axis a of x and b of y, in float32."""
  return jax.lax.dot_general(x, y, (((a,), (b,)), ((), ())),
                             preferred_element_type=jnp.float32)


def _forward(head_of, refs, outputs, count):
  query, key, value = (refs[k][...] for k in ('query', 'key', 'value'))

  def add(k, out):
    head = head_of(k)
    weights, = head.dropout(head.weights(head.only(query), key))
    return out + _product(weights.astype(value.dtype), head.only(value), 1, 0)
  out = _for_each(count, add, jnp.zeros(query.shape, jnp.float32))
  outputs['query'][...] = out.astype(query.dtype)


def _backward(head_of, refs, outputs, count):
  query, key, value, gradient = (
      refs[k][...] for k in ('query', 'key', 'value', 'gradient'))
  narrow = lambda x: x.astype(query.dtype)
  if 'table' in outputs:  # Summed over the programs of a group of heads.
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
      outputs['table'][...] = jnp.zeros_like(outputs['table'])

  def add(k, sums):
    dq, dk, dv = sums
    head = head_of(k)
    q, g = head.only(query), head.only(gradient)
    weights = head.weights(q, key)
    dropped, d_weights = head.dropout(weights, _product(g, value, 1, 1))
    d_logits = weights * (
        d_weights - (weights * d_weights).sum(-1, keepdims=True))
    if 'table' in outputs:
      outputs['table'][k] += d_logits
    d_logits = narrow(d_logits * head.scale)
    return (dq + _product(d_logits, head.only(key), 1, 0),
            dk + _product(d_logits, q, 0, 0),
            dv + _product(narrow(dropped), g, 0, 0))
  sums = _for_each(count, add, tuple(
      jnp.zeros(x.shape, jnp.float32) for x in (query, key, value)))
  for name, x in zip(('query', 'key', 'value'), sums):
    outputs[name][...] = narrow(x)


def _for_each(count, add, start):
  """add(k, sums) for each of `count` heads; a loop, as code takes memory."""
  if count == 1:
    return add(0, start)
  return jax.lax.fori_loop(0, count, add, start)
