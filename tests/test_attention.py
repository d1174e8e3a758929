"""Attention: the TPU's kernel against plain XLA, and dropout by hashing."""
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import swin
from e2e_vlp_jax.ops import attention as attention_lib
from e2e_vlp_jax.ops import attention_gpu
from e2e_vlp_jax.ops import attention_tpu
from e2e_vlp_jax.ops import cheap_keys
from e2e_vlp_jax.ops import place
from e2e_vlp_jax.profiling import program as program_lib
from e2e_vlp_jax.training import sharding
from tests import triton_programs

# [B, W, T, N, heads, D], shape of the bias, table of positions, dropout.
CASES = [
    ((2, 1, 20, 24, 8, 32), (2, 1, 1, 24), False, .1),  # padded keys
    ((2, 4, 9, 9, 4, 32), (1, 4, 9, 9), True, 0.),  # Swin's shifted windows
    ((2, 1, 10, 12, 4, 64), None, False, .5),
    ((2, 1, 10, 10, 2, 64), (2, 1, 10, 10), True, .1),  # a causal text
    ((1, 1, 5, 7, 1, 128), None, False, 0.)]


def drawn(sizes, bias, table, rate):
  """(query, key, value, bias, table, dropout, cotangent)."""
  b, w, t, n, h, d = sizes
  keys = iter(jax.random.split(jax.random.key(0), 7))
  normal = lambda *shape: jax.random.normal(next(keys), shape)
  return (normal(b, w, t, h, d), normal(b, w, n, h, d), normal(b, w, n, h, d),
          None if bias is None else layers.mask_bias(
              jax.random.bernoulli(next(keys), .7, bias)),
          normal(h, t, n) if table else None,
          attention_lib.draw_dropout(next(keys), rate, b) if rate else None,
          normal(b, w, t, h, d))


def plain(query, key, value, bias, table, dropout):
  return attention_lib.attention(
      query, key, value, None if bias is None else bias[:, :, None], table,
      dropout)


def kernel(query, key, value, bias, table, dropout):
  flat = lambda x: x.reshape(*x.shape[:3], -1)
  return attention_tpu.attention(
      flat(query), flat(key), flat(value), heads=query.shape[3], bias=bias,
      table=table, rate=dropout.rate if dropout else 0.,
      seeds=dropout.seeds if dropout else None,
      interpret=True).reshape(query.shape)


def with_gradients(call, query, key, value, bias, table, dropout, cotangent):
  """(result, gradients of query, key, value and the table)."""
  def run(query, key, value, table):
    return call(query, key, value, bias, table, dropout)
  out, back = jax.vjp(run, query, key, value, table)
  return out, back(cotangent)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_kernel_computes_the_same(case):
  inputs = drawn(*case)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      with_gradients(kernel, *inputs), with_gradients(plain, *inputs))


# --- On a GPU -----------------------------------------------------------------
def kernel_of_a_gpu(query, key, value, bias, table, dropout):
  assert table is None
  flat = lambda x: x.reshape(*x.shape[:3], -1)
  return attention_gpu.attention(
      flat(query), flat(key), flat(value), heads=query.shape[3], bias=bias,
      rate=dropout.rate if dropout else 0.,
      seeds=dropout.seeds if dropout else None,
      interpret=True).reshape(query.shape)


@pytest.mark.parametrize('case', [
    CASES[0],  # padded keys
    ((2, 2, 70, 70, 2, 16), (2, 1, 70, 70), False, .1),  # more than a block
    ((1, 1, 5, 130, 1, 64), None, False, 0.)], ids=str)
def test_the_kernels_of_a_gpu_compute_the_same(case):
  inputs = drawn(*case)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      with_gradients(kernel_of_a_gpu, *inputs), with_gradients(plain, *inputs))


def lowered_for_a_gpu(monkeypatch, heads=8, table=None, dtype=jnp.bfloat16):
  """A loss's gradients as a train step on a GPU would lower them."""
  monkeypatch.setattr(place.Place, 'platform', 'gpu')
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1},
                            jax.devices()[:1])
  x = jax.ShapeDtypeStruct((4, 1, 364, heads, 256 // heads), dtype)

  def loss(q, k, v, mask, seeds):
    with place.on(mesh, sharding.BATCH_AXES):
      return attention_lib.attention(
          q, k, v, layers.mask_bias(mask)[:, None, None, None], table,
          attention_lib.Dropout(.1, seeds)).astype(jnp.float32).sum()
  return jax.jit(jax.grad(loss, (0, 1, 2))).trace(
      x, x, x, jax.ShapeDtypeStruct((4, 364), bool),
      jax.ShapeDtypeStruct((4,), jnp.int32)).lower(
          lowering_platforms=('cuda',))


def test_a_step_on_a_gpu_runs_the_kernels(monkeypatch, tmp_path):
  programs = triton_programs.programs(lowered_for_a_gpu(monkeypatch))
  assert len(programs) == 3
  for program in programs:
    triton_programs.compile_program(
        program, tmp_path, attention_gpu._WARPS, attention_gpu._STAGES)


def test_where_the_kernels_of_a_gpu_do_not_apply_xla_computes(monkeypatch):
  table = jnp.zeros((8, 364, 364), jnp.bfloat16)
  # Too narrow; too wide; too much for the shared memory; learned.
  for options in ({'heads': 32}, {'heads': 2},
                  {'heads': 4, 'dtype': jnp.float32}, {'table': table}):
    assert not triton_programs.programs(
        lowered_for_a_gpu(monkeypatch, **options))
  monkeypatch.setenv('E2E_VLP_ATTENTION', 'xla')
  assert not triton_programs.programs(lowered_for_a_gpu(monkeypatch))


def test_products_of_layers_that_run_twice_stay_apart_on_a_gpu(monkeypatch):
  def barriers():
    x = jnp.ones((2, 4))
    layer = layers.FeedForward(4, 8)
    variables = layer.init(jax.random.key(0), x)
    return str(jax.make_jaxpr(layer.apply)(variables, x)).count(
        'optimization_barrier')
  assert barriers() == 0
  monkeypatch.setattr(place, 'platform', lambda: 'gpu')
  assert barriers() == 2


def test_windows_are_projected_and_attended_to_in_one(monkeypatch):
  """With packed weights as with those of three projections."""
  heads, width = 8, 256  # two groups of lanes
  query, *_, bias, table, _, _ = drawn((2, 4, 9, 9, heads, 32), (1, 4, 9, 9),
                                       True, 0.)
  x = query.reshape(2, 4, 9, width)
  kernel = jax.random.normal(jax.random.key(5), (width, 3 * width)) * .1
  offset = jax.random.normal(jax.random.key(6), (3 * width,))
  bias = bias[:, :, None]

  def apart(x, kernel, offset, table):
    parts = jnp.split(x @ kernel + offset, 3, -1)
    return attention_lib.attention(
        *[y.reshape(query.shape) for y in parts], bias, table).reshape(x.shape)

  def together(x, kernel, offset, table):
    with place.on(mesh, sharding.BATCH_AXES):
      return attention_lib.projected(x, kernel, offset, heads, bias, table)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 1, 'tensor': 1},
                            jax.devices()[:2])
  inputs = x, kernel, offset, table
  loss = lambda f: lambda *a: (f(*a) * jnp.cos(jnp.arange(width))).sum()
  gradients = lambda f: jax.jit(jax.value_and_grad(loss(f), (0, 1, 2, 3)))(
      *inputs)
  expected = gradients(apart)
  monkeypatch.setattr(attention_tpu, 'attention', functools.partial(
      attention_tpu.attention, interpret=True))
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
      gradients(together), expected)


def test_a_text_without_tokens_stays_finite():
  query, key, value, *_, cotangent = drawn(*CASES[0])
  bias = jnp.full((2, 1, 1, 24), layers.MASKED)
  for call in (kernel, plain):
    found = with_gradients(call, query, key, value, bias, None, None,
                           cotangent)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize('case', [CASES[0], CASES[1]], ids=str)
def test_every_device_computes_its_own_rows(case, monkeypatch):
  """Dropout and the table's gradient do not depend on the mesh."""
  (b, *sizes), bias, table, rate = case
  bias = (8, *bias[1:]) if bias[0] == b else bias
  inputs = drawn((8, *sizes), bias, table, rate)
  expected = with_gradients(plain, *inputs)
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2, 'tensor': 1})
  monkeypatch.setattr(attention_lib, '_kernel_applies', lambda *_: True)
  monkeypatch.setattr(attention_tpu, 'attention', functools.partial(
      attention_tpu.attention, interpret=True))

  def run():
    with place.on(mesh, sharding.BATCH_AXES):
      return with_gradients(plain, *inputs)
  text = str(jax.make_jaxpr(run)())
  assert 'shard_map' in text and 'pallas_call' in text
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      jax.jit(run)(), expected)


def test_the_kernels_flops_are_those_of_its_products():
  inputs = drawn((2, 3, 8, 8, 4, 32), None, False, 0.)
  count = lambda call: program_lib.flops(
      jax.make_jaxpr(lambda *x: with_gradients(call, *x))(*inputs))
  product = 2 * (2 * 3 * 4) * 8 * 8 * 32
  assert count(plain) == 6 * product
  assert count(kernel) == 7 * product  # The logits are computed again.


ON_A_TPU = '''
import jax, jax.numpy as jnp
jax.config.update('jax_platforms', 'cpu')
from e2e_vlp_jax.ops import attention as attention_lib
from e2e_vlp_jax.ops import place
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.training import sharding
mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1},
                          chips.devices('v5e:2x2')[1])
rows = jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))
make = lambda s, t: jax.ShapeDtypeStruct(s, t, sharding=rows)
def loss(q, k, v, mask, seeds):
  with place.on(mesh, sharding.BATCH_AXES):
    return attention_lib.attention(
        q, k, v, jnp.where(mask, 0., -1e9)[:, None, None, None],
        dropout=attention_lib.Dropout(.1, seeds)).astype(jnp.float32).sum()
x = make((8, 1, 364, 8, 32), jnp.bfloat16)
print(jax.jit(jax.grad(loss, (0, 1, 2))).lower(
    x, x, x, make((8, 364), bool), make((8,), jnp.int32)).compile().as_text())
'''


def test_a_tpu_program_keeps_the_weights_on_the_chip():
  pytest.importorskip('libtpu', reason="no libtpu; pip install '.[preflight]'")
  text = subprocess.run(
      [sys.executable, '-c', ON_A_TPU], check=True, capture_output=True,
      text=True, env={
          **os.environ, 'XLA_FLAGS': '', 'TPU_SKIP_MDS_QUERY': '1',
          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES':
          'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16'}).stdout
  assert 'attention_backward' in text
  assert '364,364' not in text
  # Four chips, each with 2 x 364 x 256 values of each of four arrays.
  assert program_lib.memory_traffic(text) < 2 * 8 * 2 * 364 * 256 * 2


# --- Dropout ------------------------------------------------------------------
@pytest.mark.parametrize('rate', [.1, .5])
def test_hashed_bits_are_evenly_and_independently_distributed(rate):
  n = 2**16
  position = jnp.arange(n, dtype=jnp.int32)
  seeds = attention_lib.draw_dropout(jax.random.key(1), rate, 8).seeds
  dropped = ~np.stack([attention_lib.kept(position, s, rate) for s in seeds])
  spread = (rate * (1 - rate) / n)**.5
  assert abs(dropped.mean(1) - rate).max() < 5 * spread
  # Neighbours in a row, in the next row, and with another seed.
  spread = (rate**2 * (1 - rate**2) / n)**.5
  for other in (np.roll(dropped, 1, 1), np.roll(dropped, 256, 1),
                np.roll(dropped, 1, 0)):
    assert abs((dropped & other).mean(1) - rate**2).max() < 5 * spread


def test_dropout_scales_what_it_keeps_and_its_gradient():
  layer = layers.Dropout(.25)
  x = 1 + jnp.arange(4000.).reshape(40, 100)
  run = lambda x, seed=0: layer.apply(
      {}, x, True, rngs={'dropout': jax.random.key(seed)})
  y, back = jax.vjp(run, x)
  kept = y != 0
  assert .7 < kept.mean() < .8
  np.testing.assert_allclose(y[kept], x[kept] / .75, rtol=1e-6)
  np.testing.assert_array_equal(back(jnp.ones_like(x))[0],
                                jnp.where(kept, 1 / .75, 0))
  assert (run(x, 1) != y).mean() > .3  # another mask
  np.testing.assert_array_equal(layer.apply({}, x), x)


def test_stochastic_depth_drops_whole_rows():
  layer = layers.Dropout(.5, rows=True)
  y = layer.apply({}, jnp.ones((64, 3, 5)), True,
                  rngs={'dropout': jax.random.key(0)})
  assert set(np.unique(y)) == {0., 2.}
  assert (y == y[:, :1, :1]).all() and 16 < (y[:, 0, 0] == 0).sum() < 48


def test_keys_of_dropout_differ_between_steps_layers_and_splits():
  base = [cheap_keys.from_key(jax.random.fold_in(jax.random.key(0), t))
          for t in range(8)]
  derived = [f for key in base for f in (
      *[jax.random.fold_in(key, n) for n in range(32)],
      *jax.random.split(key, 4),
      *[jax.random.fold_in(jax.random.fold_in(key, 5), n) for n in range(4)])]
  found = {tuple(np.asarray(jax.random.key_data(k))) for k in base + derived}
  assert len(found) == len(base + derived)
  # The same key in the same place, on every run and device.
  again = jax.random.fold_in(
      cheap_keys.from_key(jax.random.fold_in(jax.random.key(0), 0)), 0)
  np.testing.assert_array_equal(*map(jax.random.key_data,
                                     (again, derived[0])))


def test_a_window_attention_by_the_kernel(monkeypatch):
  """The module takes the weights of its projection where the kernel runs."""
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1},
                            jax.devices()[:1])
  x = jax.random.normal(jax.random.key(0), (2, 4, 9, 256))
  module = swin.WindowAttention(8, jnp.float32, False)
  variables = module.init(jax.random.key(1), x, (3, 3), None)

  def loss(variables, x):
    with place.on(mesh, sharding.BATCH_AXES):
      y = module.apply(variables, x, (3, 3), None)
    return (y * jnp.cos(jnp.arange(256))).sum()
  expected = jax.value_and_grad(loss)(variables, x)
  calls, kernel_ = [], attention_tpu.attention

  def interpreted(*args, **kwargs):
    calls.append(args)
    return kernel_(*args, **kwargs, interpret=True)
  monkeypatch.setattr(place.Place, 'platform', 'tpu')
  monkeypatch.setattr(attention_tpu, 'attention', interpreted)
  found = jax.value_and_grad(loss)(variables, x)
  assert len(calls) == 1 and len(calls[0]) == 1  # queries, keys, values in one
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4), found, expected)
