"""ResNet-18, -50 and -101 equal transformers' ResNetModel.

Same random weights; the maps of all four stages with running statistics and
with the batch's, and the running statistics after a training step.
"""
import functools

import jax
import numpy as np
import pytest

from tests import parity
from e2e_vlp_jax import models
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.ops import place
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import resnet as names

# ResNet-101 compiles for half a minute.
STORED = [18, 50, pytest.param(101, marks=pytest.mark.slow)]


@functools.lru_cache(None)
def ours(depth):
  """The results under the names of parity_torch.resnet_results."""
  trunk, variables = parity.build_resnet(depth)
  pixels = parity.resnet_pixels()

  @jax.jit
  def run(variables):
    train, state = trunk.apply(variables, pixels, True,
                               mutable=['batch_stats'])
    return trunk.apply(variables, pixels), train, state
  still, train, state = run(variables)
  out = {f'{mode}/stage{i}': x for mode, maps in (('eval', still),
                                                  ('train', train))
         for i, x in enumerate(maps, 1)}
  after = {'/backbone/'.join(k.split('/', 1)): x
           for k, x in parity.flat(state).items()}
  out.update({f'after/{k}': x for k, x in parity.theirs(
      'hf_resnet', parity.resnet_config(depth), after).items()})
  return out


def compare(record_property, depth, want, against):
  got = ours(depth)
  assert set(got) == set(want)
  kinds = {'eval/': 'features of 4 stages, eval mode',
           'train/': 'features of 4 stages, train mode',
           'after/': 'BatchNorm statistics after a training step'}
  for prefix, title in kinds.items():
    worst = max(parity.difference(k, got[k], want[k]) for k in want
                if k.startswith(prefix))
    parity.note(record_property, f'ResNet-{depth}: {title}', against, worst,
                parity.TOLERANCE)


@pytest.mark.parametrize('depth', STORED)
def test_equals_stored_results(record_property, depth):
  compare(record_property, depth, parity.stored(f'resnet_{depth}'),
          'stored transformers results')


@pytest.mark.slow
@pytest.mark.parametrize('depth', parity.RESNETS)
def test_equals_transformers(record_property, torch_extra, depth):
  from tests import parity_torch  # pylint: disable=import-outside-toplevel
  compare(record_property, depth, parity_torch.resnet_results(depth),
          parity_torch.WITH)


@pytest.mark.parametrize('depth', sorted(resnet.BLOCKS))
def test_names_go_both_ways(depth):
  """torchvision's and transformers' names of every tensor, one to one."""
  config = parity.resnet_config(depth)
  ours_ = [e.theirs for e in names.entries(config)]
  hf = [e.theirs for e in mapping.find('hf_resnet').entries(config)]
  assert [names.to_torchvision(x) for x in hf] == ours_
  assert [names.to_transformers(x) for x in ours_] == hf
  assert len(set(ours_)) == len(ours_)
  if depth == 50:  # torchvision's own list
    assert len(ours_) == 265
    assert {'conv1.weight', 'bn1.running_var', 'layer1.0.downsample.0.weight',
            'layer3.5.bn3.bias', 'layer4.2.conv3.weight'} <= set(ours_)


@pytest.mark.parametrize('depth', [18, 50])
def test_names_are_those_of_transformers(torch_extra, depth):
  from tests import parity_torch  # pylint: disable=import-outside-toplevel
  model = parity_torch.resnet(depth)
  hf = {e.theirs for e in mapping.find('hf_resnet').entries(
      parity.resnet_config(depth))}
  assert hf == {k for k in model.state_dict()
                if not k.endswith('num_batches_tracked')}


@pytest.mark.parametrize('stride', [1, 2])
def test_a_convolution_of_one_cell_is_a_product_on_a_cpu(monkeypatch, stride):
  """The same results and gradients as the convolution of other devices."""
  conv = resnet.Conv(5, 1, stride)
  x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
  factor = jax.random.uniform(jax.random.key(1), (5,))
  params = conv.init(jax.random.key(2), x)

  def results():
    def loss(params, x):
      y = conv.apply(params, x, factor)
      return (y * jax.numpy.cos(y)).sum(), y
    return (jax.grad(loss, (0, 1), has_aux=True)(params, x),
            str(jax.make_jaxpr(loss)(params, x)).count('conv_general'))
  product, without = results()
  monkeypatch.setattr(place, 'platform', lambda: 'gpu')
  convolution, with_ = results()
  assert (without, with_) == (0, 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               product, convolution)


def test_frozen_parts_pass_no_gradient():
  """As DETR trains its trunk, by the patterns of its config alone."""
  _, variables = parity.build_resnet(18)
  groups = models.frozen_groups(parity.resnet_config(18))
  trunk = resnet.ResNet(18, frozen=tuple(
      (pattern.replace('backbone/', ''), freeze)
      for pattern, freeze in groups))
  params, state = variables['params'], variables['batch_stats']
  pixels = parity.resnet_pixels()[:1, :32, :32]

  def loss(params):
    maps, new = trunk.apply({'params': params, 'batch_stats': state}, pixels,
                            True, mutable=['batch_stats'])
    return (maps[0]**2).sum(), new['batch_stats']
  grads, new = jax.jit(jax.grad(loss, has_aux=True))(params)
  for name, g in parity.flat(grads).items():
    frozen = name.startswith(('conv1', 'bn1', 'layer1')) or '/bn' in name or (
        'downsample_bn' in name)
    assert np.any(g) != frozen, name
  jax.tree.map(np.testing.assert_array_equal, new, state)
