"""One config means the same on any mesh; what the compiler made of it."""
import functools
import re

import jax
import numpy as np
import pytest

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step
from tests import small_run

SIZES = dict(vocab_size=50, num_classes=6, num_attributes=13)
STEPS = 20


def assembled(accumulate=1, **axes):
  """(Assembly of the small run, function t -> global batch t)."""
  axes = {'data': 1, 'fsdp': 1, 'tensor': 1, **axes}
  config = small_run.get_config()
  config.update_from_flattened_dict({
      'total_steps': STEPS, 'warm_start.steps': 0, 'accumulate': accumulate,
      'optim.warmup_steps': 5})
  mesh = sharding.make_mesh(axes, jax.devices()[:int(np.prod(
      list(axes.values())))])
  make = functools.partial(synthetic.synthetic_batch, config.data,
                           batch_size=8, **SIZES)
  assembly = assemble.Assembly(config, models.build(config, **SIZES), mesh,
                               make(seed=0))
  return assembly, lambda t: sharding.shard_batch(mesh, make(seed=t))


@pytest.fixture(scope='module')
def layout_run():
  """Runs a layout once: (metrics of each step, last state, lowered, text)."""
  @functools.cache
  def run(**layout):
    assembly, batch = assembled(**layout)
    lowered = assembly.trace(8).lower()
    step = lowered.compile()
    state, found = assembly.init(), []
    for t in range(STEPS):
      state, metrics = step(state, batch(t))
      found.append(jax.device_get(metrics))
    return found, state, lowered.as_text(), step.as_text()

  # Small arrays too are split, or nothing of this model would be.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'FSDP_MIN_BYTES', 256)
    yield run


@pytest.mark.parametrize('layout', [
    dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2),
    dict(accumulate=4)], ids=str)
def test_layouts_give_the_same_losses(layout, layout_run):
  """20 steps; two processes: tests/test_multihost.py."""
  one, other = layout_run()[0], layout_run(**layout)[0]
  worst = max(abs(a['loss'] - b['loss']) / abs(a['loss'])
              for a, b in zip(one, other))
  print(f'{layout}: loss of {STEPS} steps within {worst:.1e}')
  for a, b in zip(one, other):
    for name in set(a) - {'grad_norm'}:  # Kinks of ReLU: 5e-4 once.
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=2e-5,
                                 err_msg=name)


def test_fsdp_holds_an_eighth(layout_run):
  """Of the parameters and of the optimizer's state: measured, and of `r50`."""
  state = layout_run(fsdp=8)[1]
  for part in (state.params, state.opt_state):
    leaves = jax.tree.leaves(part)
    held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    # Of so small a model a part is too small to be split, even here.
    assert held < sum(x.nbytes for x in leaves) / 5

  config = config_lib.get_config('r50')
  mesh = sharding.make_mesh(dict(data=1, fsdp=8, tensor=1))
  sizes = dict(vocab_size=30522, num_classes=1600, num_attributes=400)
  example = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
  assembly = assemble.Assembly(config, models.build(config, **sizes), mesh,
                               example)
  for part in ('params', 'opt_state'):
    shapes = getattr(assembly.shapes, part)
    held = program.bytes_per_chip(shapes, getattr(assembly.shardings, part))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    print(f'r50, {part}: a device holds {held / total:.3f} of '
          f'{total / 1e6:.0f} MB')
    assert held < total / 6


@pytest.mark.parametrize('layout', [dict(data=8), dict(fsdp=8)], ids=str)
def test_compiled_step(layout, layout_run):
  """No collective inside the matching; activations split by example."""
  _, _, lowered, text = layout_run(**layout)
  assert 'sharding_constraint' in lowered
  found = program.collectives(text)
  assert any(c.kind in ('all-reduce', 'reduce-scatter') for c in found)
  assert re.search(r'\bwhile\(', text), 'the matching is a loop'
  assert not [c for c in found if c.in_loop]
  # 64 grid tokens and 2 x (64 + 20) of grid and text, of width 32: a device
  # has one example, never all eight.
  for shape in ('{},64,32', '{},84,32'):
    examples = 2 if '84' in shape else 1
    assert f'f32[{shape.format(examples)}]' in text
    assert f'f32[{shape.format(8 * examples)}]' not in text


def test_constraints_on_outputs_act():
  """Replicated in, split out: the constraint alone does it."""
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  double = jax.jit(lambda x: sharding.constrain_batch(mesh, {'x': 2 * x}))
  out = double(jax.device_put(np.ones((8, 4)), sharding.replicated(mesh)))
  assert {s.data.shape for s in out['x'].addressable_shards} == {(1, 4)}


@pytest.mark.parametrize('spec', ['configs/e2e_vlp.py:tiny',
                                  'configs/soho.py:tiny',
                                  'configs/fiber.py:tiny,queue=8'])
def test_models_name_their_outputs_without_a_batch(spec):
  """Every output that does not grow with the batch, and no other."""
  config = cli.load_config(spec, [('data.sentences', '1')])
  model = models.build(config, **SIZES)

  def shapes(size):
    batch = synthetic.synthetic_batch(config.data, batch_size=size, **SIZES)
    keys = {name: jax.random.key(0) for name in ('params', 'dropout',
                                                 'sample')}
    outputs, _ = jax.eval_shape(
        lambda: model.init_with_output(keys, batch, model.views, train=True))
    return {(view, name): [x.shape for x in jax.tree.leaves(value)]
            for view, found in outputs.items() for name, value in found.items()}
  at_8, at_16 = shapes(8), shapes(16)
  found = {name for (view, name), value in at_8.items()
           if any(len(x) == 0 or (x[0], y[0]) != (8, 16)
                  for x, y in zip(value, at_16[view, name]))}
  assert found == set(model.batchless_outputs)


def test_a_queue_as_long_as_the_batch_is_not_split():
  """It has the batch's size by coincidence: only declarations count."""
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
  queues = 'image_queue', 'itc_scale'
  constrain = jax.jit(lambda x: train_step._constrain_outputs(mesh, {'v': x},
                                                              queues, 8)['v'])
  outputs = {'image_embedding': np.ones((8, 4)), 'image_queue': np.ones((8, 4)),
             'itc_scale': np.float32(1),
             'aux_outputs': [{'pred_boxes': np.ones((8, 2, 4))}]}
  out = constrain(jax.device_put(outputs, sharding.replicated(mesh)))
  held = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, out)
  assert held == {'image_embedding': (1, 4), 'image_queue': (8, 4),
                  'itc_scale': (), 'aux_outputs': [{'pred_boxes': (1, 2, 4)}]}
  with pytest.raises(ValueError, match="'usage' of view 'v'.*batchless"):
    constrain({'usage': np.float32(1)})


def test_several_slices_put_data_on_the_slow_network():
  class Chip:
    platform, device_kind = 'tpu', 'TPU v5 lite'

    def __init__(self, number, slice_index):
      self.id = self.process_index = number
      self.slice_index, self.core_on_chip = slice_index, 0
      self.coords = (number % 2, number // 2 % 2, 0)

  chips = [Chip(i, i // 4) for i in range(8)]
  mesh = sharding.arrange([4, 2, 1], chips)
  assert mesh.shape == (4, 2, 1)
  # The outer half of 'data' is one slice; fsdp stays within it.
  assert [{c.slice_index for c in part.flat} for part in mesh] == [
      {0}, {0}, {1}, {1}]
  with pytest.raises(errors.UserError, match='mesh.data: 1 does not divide'):
    sharding.arrange([1, 8, 1], chips)


def test_fsdp_may_span_nodes_of_gpus():
  """Also where 'data' divides over no nodes; a node's GPUs are neighbours."""
  class Gpu:
    platform = device_kind = 'gpu'

    def __init__(self, number, node):
      self.id, self.process_index, self.slice_index = number, node, node

  gpus = [Gpu(i, i // 4) for i in range(8)]
  for sizes in ([1, 8, 1], [1, 2, 4], [1, 1, 8]):
    mesh = sharding.arrange(sizes, gpus[::-1])
    assert mesh.shape == tuple(sizes)
    assert [g.id for g in mesh.flat] == list(range(8))
  mesh = sharding.arrange([2, 4, 1], gpus)  # Gradients alone leave a node.
  assert [{g.slice_index for g in part.flat} for part in mesh] == [{0}, {1}]
  with pytest.raises(errors.UserError, match='does not fit 8 devices'):
    sharding.make_mesh(dict(data=3, fsdp=1, tensor=1), gpus)


@pytest.mark.parametrize('rule, message', [
    ((r'project/kernel', ('fsdp', 'tensr')), "did you mean 'tensor'"),
    ((r'project/kernel', ('fsdp', None, 'data')), 'fewer dimensions'),
    ((r'itm_head/.*', ('tensor',)), 'does not divide by'),
    ((r'no/such', ('fsdp',)), 'matches no parameter')])
def test_bad_sharding_rules(rule, message):
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=8))
  shapes = {'project': {'kernel': np.zeros((16, 32))},
            'itm_head': {'kernel': np.zeros((34, 2))}}
  with pytest.raises(errors.UserError, match=message):
    sharding.parameter_specs(shapes, mesh, (rule,))


def test_rows_of_a_host_are_all_rows_here():
  """With one process; with several: tests/test_multihost.py."""
  for axes in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, **axes})
    np.testing.assert_array_equal(sharding.host_rows(mesh, 16),
                                  np.arange(16))
