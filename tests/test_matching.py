"""The assignment is optimal, counts what is not finite, and fits the loss."""
import os
import subprocess
import sys
import types

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.objectives import detection
from e2e_vlp_jax.ops import kernels
from e2e_vlp_jax.ops import matching
from e2e_vlp_jax.ops import matching_tpu
from tests import parity
from tests import triton_programs
from tests.assignment_problems import KINDS, best, problems
from tests.assignment_problems import cost_of as ours

SEED = 11
SHAPES = ((1, 1), (5, 5), (7, 1), (12, 7), (30, 30), (64, 40), (100, 20),
          (100, 100))  # queries, targets
fast = hypothesis.settings(max_examples=40, deadline=None)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_optimal_on_2000_problems(record_property, shape):
  """250 problems of each shape: padded targets, ties, no targets at all."""
  print(f'seed {SEED}')
  draw = np.random.default_rng([SEED, *shape])
  parts = [problems(c, *shape, kind, draw)
           for kind, c in zip(KINDS, (60, 60, 60, 10, 60))]
  cost, mask = (np.concatenate(x) for x in zip(*parts))
  assert len(cost) == 250
  index, bad = jax.device_get(matching.hungarian(cost, mask))
  assert not bad.any()
  worst = 0.
  for c, m, i in zip(cost, mask, index):
    assert len(set(i)) == len(i) and i.min() >= 0 and i.max() < shape[0]
    want = best(c, m)
    size = max(1e-6, np.abs(c[:, m]).max(initial=0)) if m.any() else 1.
    worst = max(worst, abs(ours(c, m, i) - want) / max(size, abs(want)))
  parity.note(record_property,
              f'Matching, 250 problems of {shape[0]} queries and up to '
              f'{shape[1]} targets: cost', 'scipy linear_sum_assignment',
              worst, 1e-6)


def test_equal_on_a_mesh():
  """Inside shard_map on 8 devices: the same queries."""
  draw = np.random.default_rng(SEED)
  cost, mask = problems(16, 12, 7, 'detr', draw)
  alone = matching.hungarian(cost, mask)
  mesh = jax.make_mesh((4, 2), ('data', 'fsdp'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharded = matching.hungarian(cost, mask, mesh, ('data', 'fsdp'))
  jax.tree.map(np.testing.assert_array_equal, alone, sharded)
  assert len(sharded[0].sharding.device_set) == 8


def test_no_collectives_inside_the_loop():
  """The reason for shard_map: devices must not talk while they match."""
  mesh = jax.make_mesh((8,), ('data',),
                       axis_types=(jax.sharding.AxisType.Auto,))
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  like = lambda shape, t: jax.ShapeDtypeStruct(shape, t, sharding=where)
  text = matching.hungarian.lower(
      like((16, 12, 7), np.float32), like((16, 7), bool), mesh,
      ('data',)).compile().as_text()
  for word in ('all-reduce', 'all-gather', 'all-to-all'):
    assert word not in text


@pytest.mark.parametrize('platform', ('cuda', 'tpu'))
@pytest.mark.parametrize('shape', ((1, 1), (12, 7), (30, 30), (100, 20),
                                   (130, 9)), ids=str)
def test_the_kernels_find_the_same_cost(monkeypatch, shape, platform):
  """Interpreted; also queries and problems that fill no vector."""
  draw = np.random.default_rng([SEED, *shape])
  parts = [problems(4, *shape, kind, draw) for kind in KINDS]
  cost, mask = (np.concatenate(x) for x in zip(*parts))
  ran = []

  def as_there(*args, **branches):
    ran.append(branches[platform])
    return branches[platform](*args, interpret=True)
  monkeypatch.setattr(jax.lax, 'platform_dependent', as_there)
  # A new function: jit would reuse the trace of one it knows.
  index, bad = jax.device_get(
      jax.jit(lambda *args: matching._assign(*args))(cost, mask))
  assert ran == [{'cuda': matching._solve_on_gpu,
                  'tpu': matching_tpu.solve}[platform]]
  assert not bad.any()
  for c, m, i in zip(cost, mask, index):
    assert len(set(i)) == len(i) and i.min() >= 0 and i.max() < shape[0]
    np.testing.assert_allclose(ours(c, m, i), best(c, m), rtol=1e-5,
                               atol=1e-6 * np.abs(c).max())


def lowered_for_a_gpu(queries, targets):
  like = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  return matching.hungarian.trace(
      like(192, queries, targets), jax.ShapeDtypeStruct((192, targets), bool)
  ).lower(lowering_platforms=('cuda',))


def test_one_kernel_on_a_gpu():
  """Lowered for CUDA on a machine without: one Triton call and no loop."""
  text = lowered_for_a_gpu(100, 100).as_text()
  assert text.count('__gpu$xla.gpu.triton') == 1
  assert 'stablehlo.while' not in text


def test_a_gpu_without_triton_runs_the_loops(monkeypatch, caplog):
  for capability, runs in (('7.5', False), ('9.0', True)):
    device = types.SimpleNamespace(compute_capability=capability)
    with monkeypatch.context() as patch:
      patch.setattr(jax, 'default_backend', lambda: 'gpu')
      patch.setattr(jax, 'local_devices', lambda d=device: [d])
      assert kernels.triton_runs() == runs
  assert 'compute capability 7.5' in caplog.text
  monkeypatch.setenv('E2E_VLP_MATCHING', 'xla')
  jax.clear_caches()
  text = lowered_for_a_gpu(5, 5).as_text()
  jax.clear_caches()
  assert 'stablehlo.while' in text and '__gpu$xla.gpu.triton' not in text


@pytest.mark.parametrize('shape', ((100, 100), (5, 5), (300, 100)), ids=str)
def test_triton_compiles_the_kernel(tmp_path, shape):
  program, = triton_programs.programs(lowered_for_a_gpu(*shape))
  triton_programs.compile_program(program, tmp_path, warps=1)


def test_one_kernel_on_a_tpu():
  """Lowered on a machine without: one Mosaic call and no loop."""
  lower = lambda queries: matching.hungarian.trace(
      jax.ShapeDtypeStruct((192, queries, 100), np.float32),
      jax.ShapeDtypeStruct((192, 100), bool)).lower(
          lowering_platforms=('tpu',)).as_text()
  text = lower(100)
  assert text.count('@tpu_custom_call') == 1 and 'stablehlo.while' not in text
  # Too many queries for the chip's memory: the loops.
  assert 'stablehlo.while' in lower(4000)


ON_A_TPU = """
import jax, jax.numpy as jnp
jax.config.update('jax_platforms', 'cpu')
from e2e_vlp_jax.ops import matching
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.training import sharding
mesh = sharding.make_mesh({'data': -1, 'fsdp': 1, 'tensor': 1},
                          chips.devices('v5e:2x2')[1])
rows = jax.NamedSharding(mesh, jax.P(sharding.BATCH_AXES))
make = lambda s, t: jax.ShapeDtypeStruct(s, t, sharding=rows)
print(matching.hungarian.lower(
    make((192, 100, 100), jnp.float32), make((192, 100), bool), mesh,
    sharding.BATCH_AXES).compile().as_text())
"""


def test_the_kernel_compiles_for_a_tpu():
  pytest.importorskip('libtpu', reason="no libtpu; pip install '.[preflight]'")
  text = subprocess.run(
      [sys.executable, '-c', ON_A_TPU], check=True, capture_output=True,
      text=True, env={
          **os.environ, 'XLA_FLAGS': '', 'TPU_SKIP_MDS_QUERY': '1',
          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES':
          'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16'}).stdout
  assert text.count('custom_call_target="tpu_custom_call"') == 1
  assert 'all-reduce' not in text and 'all-gather' not in text


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_counted_and_avoided(value):
  draw = np.random.default_rng(SEED)
  cost, mask = problems(40, 12, 7, 'detr', draw)
  broken = draw.random(cost.shape) < .3
  broken[:, :, 0] = False  # a target without any finite cost comes below
  index, bad = jax.device_get(
      matching.hungarian(np.where(broken, value, cost), mask))
  np.testing.assert_array_equal(
      bad, (broken & mask[:, None]).sum((1, 2)))  # padding does not count
  for c, m, b, i in zip(cost, mask, broken, index):
    assert not b[i, np.arange(7)][m].any(), 'matched though it had a choice'
    # Among the finite pairs still the best.
    finite = np.where(b, 1e9, c)
    np.testing.assert_allclose(ours(c, m, i), best(finite, m), rtol=1e-4,
                               atol=1e-4)


def test_no_finite_cost_is_too_high():
  """A NaN is avoided for any finite cost."""
  cost = np.array([[[3e6, np.nan], [4e6, 5e6], [9e6, 9e6]]], np.float32)
  index, bad = matching.hungarian(cost, np.ones((1, 2), bool))
  assert index.tolist() == [[0, 1]] and bad.tolist() == [1]


def test_a_target_without_a_finite_cost_leaves_the_others_alone():
  draw = np.random.default_rng(SEED)
  cost, mask = problems(10, 12, 7, 'detr', draw)
  mask[:] = True
  broken = cost.copy()
  broken[:, :, 3] = np.nan
  index, bad = jax.device_get(matching.hungarian(broken, mask))
  assert (bad == 12).all()
  others = np.arange(7) != 3
  for c, i in zip(cost, index):
    assert len(set(i)) == 7
    np.testing.assert_allclose(ours(c, others, i), best(c, others), rtol=1e-4)


def test_more_targets_than_queries_is_an_error():
  with pytest.raises(errors.UserError, match='data.max_boxes: 6 boxes for 5'):
    matching.hungarian(np.zeros((1, 5, 6)), np.ones((1, 6), bool))


# --- The loss around it -----------------------------------------------------
B, Q, M, C, A = 3, 6, 4, 5, 7


@st.composite
def cases(draw):
  """(outputs, batch) of the detection objective."""
  r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

  def layer():
    return {'pred_logits': r.normal(0, 2, (B, Q, C + 1)),
            'pred_boxes': r.uniform(.1, .6, (B, Q, 4)),
            'pred_attributes': r.normal(0, 2, (B, Q, A))}
  outputs = {**layer(), 'aux_outputs': [layer()]}
  counts = draw(st.lists(st.integers(0, M), min_size=B, max_size=B))
  batch = {
      'boxes': r.uniform(.1, .6, (B, M, 4)),
      'box_labels': r.integers(0, C, (B, M)),
      'box_attributes': r.integers(-1, A, (B, M, 2)),
      'box_mask': np.arange(M) < np.array(counts)[:, None],
      'task_mask/detection': np.ones(B, bool),
      'task_mask/attributes': r.random(B) < .7}
  return outputs, batch


@jax.jit
def losses(outputs, batch):
  terms, metrics = detection.Objective()({'image_only': outputs}, batch)
  return ({k: s / jnp.maximum(w, 1e-9) for k, (s, w) in terms.items()},
          metrics['matching_nonfinite'][0])


def total(outputs, batch):
  terms, bad = jax.device_get(losses(outputs, batch))
  assert bad == 0 and set(terms) == {'class', 'box', 'giou', 'attributes'}
  return terms


def same(a, b):
  for k in a:
    np.testing.assert_allclose(a[k], b[k], rtol=1e-4, atol=1e-5, err_msg=k)


@fast
@hypothesis.given(cases(), st.randoms(use_true_random=False))
def test_order_of_queries_and_targets_does_not_matter(case, random):
  outputs, batch = case
  want = total(outputs, batch)
  order = random.sample(range(Q), Q)
  same(want, total(jax.tree.map(lambda x: x[:, order], outputs), batch))
  order = random.sample(range(M), M)
  same(want, total(outputs, {k: v[:, order] if k.startswith('box') else v
                             for k, v in batch.items()}))
  order = random.sample(range(B), B)
  same(want, total(*jax.tree.map(lambda x: x[order], case)))


@fast
@hypothesis.given(cases(), st.integers(0, 2**32 - 1))
def test_padding_does_not_matter(case, seed):
  """Neither padded targets, whatever they hold, nor padded examples."""
  outputs, batch = case
  want = total(outputs, batch)
  r = np.random.default_rng(seed)
  noise = {'boxes': r.uniform(-3, 3, (B, 2, 4)),
           'box_labels': r.integers(0, C, (B, 2)),
           'box_attributes': r.integers(-1, A, (B, 2, 2)),
           'box_mask': np.zeros((B, 2), bool)}
  same(want, total(outputs, {
      k: np.concatenate([v, noise[k]], 1) if k in noise else v
      for k, v in batch.items()}))
  more_outputs, more = jax.tree.map(
      lambda x: np.concatenate([x, x[:1]], 0), case)
  for k in ('box_mask', 'task_mask/detection', 'task_mask/attributes'):
    more[k][-1] = False
  same(want, total(more_outputs, more))


@fast
@hypothesis.given(cases())
def test_nan_outputs_are_reported(case):
  outputs, batch = case
  outputs['pred_boxes'][1, 2] = np.nan  # one query of the second example
  _, bad = losses(outputs, batch)
  assert bad == batch['box_mask'][1].sum()
