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

from e2e_vlp_jax.ops import cheap_keys

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


def pack(x):
  """[..., 3 C] of queries, keys, values, side by side -> their packed order.

  In it, the queries, keys and values of each group of heads are neighbours, so
  that one program reads one block. Projections are made in this order by
  packing the columns of their weights, not the activations.
  """
  groups = x.shape[-1] // (3 * _LANES)
  return x.reshape(*x.shape[:-1], 3, groups, _LANES).swapaxes(
      -3, -2).reshape(x.shape)


def attention(query, key=None, value=None, *, heads, rate=0., bias=None,
              table=None, seeds=None, interpret=False):
  """Softmax attention.

  Args:
    query: [B, W, T, C], C = heads * D; or, without key and value, all three
      as [B, W, T, 3 C] in the order of `pack`.
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
  static = heads, rate if seeds is not None else 0., interpret
  arrays = ({'packed': query} if key is None else
            {'query': query, 'key': key, 'value': value})
  others = {'bias': bias, 'table': table, 'seeds': seeds}
  return _attention(static, arrays,
                    {k: x for k, x in others.items() if x is not None})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, arrays, others):
  first = arrays.get('query', arrays.get('packed'))
  width = first.shape[-1] // (3 if 'packed' in arrays else 1)
  out = jax.ShapeDtypeStruct((*first.shape[:-1], width), first.dtype)
  return _call(_forward, static, arrays | others, {'out': out}, 2)['out']


def _attention_fwd(static, arrays, others):
  return _attention(static, arrays, others), (arrays, others)


def _attention_bwd(static, inputs, gradient):
  arrays, others = inputs
  wanted = arrays | {k: x for k, x in others.items() if k == 'table'}
  found = _call(_backward, static,
                arrays | others | {'gradient': gradient}, wanted, 5)
  return ({k: found[k] for k in arrays},
          {k: found.get(k) for k in others})


_attention.defvjp(_attention_fwd, _attention_bwd)


def _spec(name, x, width, windows):
  """Which block of x a program reads or writes.

  Args:
    name: of the input or output.
    x: array or ShapeDtypeStruct.
    width: D.
    windows: W.
  """
  if name == 'seeds':
    return pl.BlockSpec(memory_space=pltpu.SMEM)
  if name == 'table':
    return pl.BlockSpec((_LANES // width, *x.shape[1:]),
                        lambda g, i, j: (g, 0, 0))
  if name == 'bias':
    a, b = int(x.shape[0] > 1), int(x.shape[1] > 1 and windows > 1)
    return pl.BlockSpec((None, None, *x.shape[2:]),
                        lambda g, i, j: (i * a, j * b, 0, 0))
  lanes = _LANES * (3 if name == 'packed' else 1)
  return pl.BlockSpec((None, None, x.shape[2], lanes),
                      lambda g, i, j: (i, j, 0, g))


def _call(kernel, static, inputs, outputs, products):
  """Runs a kernel over (groups of heads, rows, windows).

  Args:
    kernel: `_forward` or `_backward`.
    static: (heads, rate, interpret).
    inputs: {name: array}.
    outputs: {name: something of the result's shape and dtype}.
    products: number of matrix products of a head, for the count of FLOPs.

  Returns:
    {name of an output: array}.
  """
  heads, rate, interpret = static
  b, w, t, c = inputs.get('query', inputs.get('packed')).shape
  c //= 3 if 'packed' in inputs else 1
  n = inputs['key'].shape[2] if 'key' in inputs else t
  width, names = c // heads, list(inputs)

  def body(*refs):
    found = dict(zip(names, refs))
    place = tuple(pl.program_id(axis) for axis in range(3))
    kernel(lambda k: _Head(k, width, found, heads, rate, place), found,
           dict(zip(outputs, refs[len(names):])), _LANES // width)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs.values()]
  moved = sum(x.size * x.dtype.itemsize for x in [*inputs.values(), *shapes])
  found = pl.pallas_call(
      body, grid=(c // _LANES, b, w), out_shape=shapes,
      in_specs=[_spec(k, x, width, w) for k, x in inputs.items()],
      out_specs=[_spec(k, x, width, w) for k, x in outputs.items()],
      interpret=interpret, name=f'attention{kernel.__name__}',
      cost_estimate=pl.CostEstimate(
          flops=products * 2 * b * w * t * n * c,
          transcendentals=b * w * t * n * heads, bytes_accessed=moved),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('arbitrary',) * 3, vmem_limit_bytes=_VMEM))(
              *inputs.values())
  return dict(zip(outputs, found))


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
    keep = cheap_keys.kept((first + row) * n + column,
                           self.refs['seeds'][batch], self.rate)
    return [jnp.where(keep, x / (1 - self.rate), 0.) for x in arrays]


def _product(x, y, a, b):
  """Matrix product that sums over axis a of x and b of y, in float32."""
  return jax.lax.dot_general(x, y, (((a,), (b,)), ((), ())),
                             preferred_element_type=jnp.float32)


def _read(refs):
  """The program's queries, keys and values, [T or N, 128] each."""
  if 'packed' in refs:
    return [refs['packed'][:, k * _LANES:(k + 1) * _LANES] for k in range(3)]
  return [refs[k][...] for k in ('query', 'key', 'value')]


def _forward(head_of, refs, outputs, count):
  query, key, value = _read(refs)

  def add(k, out):
    head = head_of(k)
    weights, = head.dropout(head.weights(head.only(query), key))
    return out + _product(weights.astype(value.dtype), head.only(value), 1, 0)
  out = _for_each(count, add, jnp.zeros(query.shape, jnp.float32))
  outputs['out'][...] = out.astype(query.dtype)


def _backward(head_of, refs, outputs, count):
  query, key, value = _read(refs)
  gradient = refs['gradient'][...]
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
  for k, (name, x) in enumerate(zip(('query', 'key', 'value'), sums)):
    if name in outputs:
      outputs[name][...] = narrow(x)
    else:
      outputs['packed'][:, k * _LANES:(k + 1) * _LANES] = narrow(x)


def _for_each(count, add, start):
  """add(k, sums) for each of `count` heads; a loop, as code takes memory."""
  if count == 1:
    return add(0, start)
  return jax.lax.fori_loop(0, count, add, start)
