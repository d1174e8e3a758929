"""optim.layer_decay: each layer's learning rate, counted by hand."""
import jax
import numpy as np
import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import optim as optim_lib
from e2e_vlp_jax.training import sharding
from tests import test_pins

# {config: {parameter: layers from it to the output, itself included}}, counted
# on the papers' figures. 0 = in no layer.
COUNTED = {
    # Stem, 4 stages, projection, 12 + 6 layers: 24.
    'e2e_vlp.py:r50': {
        'backbone/conv1/kernel': 24, 'backbone/layer1_2/bn3/scale': 23,
        'backbone/layer4_0/conv2/kernel': 20, 'project/kernel': 19,
        'text_embedding/words/embedding': 19,
        'encoder/layer0/ffn/in/kernel': 18, 'encoder/layer11/ffn/in/bias': 7,
        'decoder/layer0/ffn/in/kernel': 6, 'decoder/layer5/ffn/out/bias': 1,
        'decoder/norm/norm/scale': 1, 'decoder/box_head/dense0/bias': 0,
        'detection_head/classes/kernel': 0, 'mlm_head/bias': 0},
    # Stem, reduction, 2 blocks, projection, 2 + 2 layers: 9.
    'e2e_vlp.py:tiny': {
        'backbone/stem/kernel': 9, 'backbone/reduce_norm/norm/scale': 8,
        'backbone/block0_in/kernel': 7, 'backbone/block1_out/bias': 6,
        'backbone/norm/norm/bias': 6, 'project/bias': 5,
        'encoder/layer0/norm1/norm/scale': 4, 'encoder/norm/norm/scale': 3,
        'decoder/layer0/norm3/norm/scale': 2, 'caption_bias': 0},
    # Stem, 4 stages, neck, 3 layers: 9.
    'soho.py:r18': {
        'backbone/bn1/scale': 9, 'backbone/layer2_1/conv1/kernel': 7,
        'neck/gate/kernel': 4, 'text_embedding/positions/embedding': 4,
        'encoder/layer0/ffn/in/kernel': 3, 'encoder/layer2/ffn/in/kernel': 1,
        'itm_head/kernel': 0},
    # Patches and 2 + 2 + 18 + 2 blocks: 25. Words and 12 layers: 13.
    'fiber.py:base': {
        'swin/patch_embed/kernel': 25, 'swin/blocks_0_0/norm1/norm/scale': 24,
        'swin/merges_0/reduce/kernel': 22, 'swin/blocks_2_0/ffn/in/kernel': 20,
        'swin/blocks_3_1/norm1/norm/bias': 1, 'swin/norm/norm/scale': 1,
        'text/embedding/words/embedding': 13,
        'text/layers_0/ffn/in/kernel': 12, 'text/layers_11/ffn/in/kernel': 1,
        'text_pooler/kernel': 0, 'itm_head/kernel': 0}}


def nested(names):
  """{'a/b': shape} -> {'a': {'b': ShapeDtypeStruct}}."""
  tree = {}
  for name, (shape, dtype) in names.items():
    *groups, last = name.split('/')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = jax.ShapeDtypeStruct(shape, dtype)
  return tree


@pytest.mark.parametrize('spec', COUNTED)
def test_layers_are_counted_from_the_output(spec):
  params = nested(test_pins.read('parameters')[f'configs/{spec}']['params'])
  model = models.build(cli.load_config(f'configs/{spec}'), vocab_size=50,
                       num_classes=6, num_attributes=13)
  found = {sharding.path_name(path): k for path, k in
           jax.tree_util.tree_flatten_with_path(
               optim_lib.layers_above(params, model.towers))[0]}
  assert {name: found.get(name) for name in COUNTED[spec]} == COUNTED[spec]
  # Every layer has parameters, and each trunk is a layer or more.
  for tower in model.towers:
    assert set(range(1, len(tower) + 1)) <= set(found.values())


def test_the_update_is_that_of_the_decayed_rate():
  """On top of the group's own factor; frozen parameters stay."""
  config = cli.load_config('configs/e2e_vlp.py:tiny').optim
  config.groups = (('a/.*', dict(lr_multiplier=3.)), ('c', dict(freeze=True)),
                   ('.*', {}))
  config.layer_decay, config.clip_norm = .5, 0.
  config.weight_decay = 0.
  params = {'a': {'x': np.ones(2, np.float32)}, 'b': np.ones(2, np.float32),
            'c': np.ones(2, np.float32), 'head': np.ones(2, np.float32)}
  tx = optim_lib.make_optimizer(config, params, lambda count: .1,
                                (('a/.*', 'b|c'),))
  updates, _ = tx.update(jax.tree.map(lambda x: 2. * x, params),
                         tx.init(params), params)
  # Adam's first step has the size of the rate.
  for path, want in ((updates['a']['x'], .1 * 3 * .25),
                     (updates['b'], .1 * .5), (updates['c'], 0),
                     (updates['head'], .1)):
    np.testing.assert_allclose(path, -want, rtol=1e-4)


def test_without_it_the_optimizer_is_as_before():
  """Its state has the same names, so that old runs go on."""
  config = cli.load_config('configs/e2e_vlp.py:tiny').optim
  params = {'a': np.ones(2, np.float32), 'bias': np.ones(2, np.float32)}
  states = []
  for _ in range(2):
    tx = optim_lib.make_optimizer(config, params, lambda count: .1, (('a',),))
    states.append(jax.tree.structure(tx.init(params)))
    config.layer_decay = 1.
  assert states[0] == states[1]


def test_what_is_refused():
  config = cli.load_config('configs/e2e_vlp.py:tiny').optim
  params = {'a': np.ones(2, np.float32), 'bias': np.ones(2, np.float32)}
  for value in (0., 1.1, -1.):
    config.layer_decay = value
    with pytest.raises(errors.UserError, match=f'layer_decay: {value}; '):
      optim_lib.make_optimizer(config, params, lambda count: .1, (('a',),))
  config.layer_decay = .9
  for towers in (contract.BaseModel.towers.fget(None), (('elsewhere/.*',),)):
    with pytest.raises(errors.UserError, match='names no layers'):
      optim_lib.make_optimizer(config, params, lambda count: .1, towers)


@pytest.mark.parametrize('system', ['e2e_vlp', 'soho', 'fiber'])
def test_finetuning_takes_it_from_the_command_line(system):
  config = cli.load_config(f'configs/finetune.py:match,system={system}', [
      ('optim.layer_decay', '.75')])
  sizes = vocabularies_lib.Vocabularies.load(config.data).sizes
  assembly = assemble.Assembly(
      config, models.build(config, **sizes),
      sharding.make_mesh(config.mesh, jax.devices()[:1]),
      synthetic.synthetic_batch(config.data, batch_size=1, **sizes))
  inner = assembly.shapes.opt_state[-1].inner_states
  # Groups are split by layer; the task need not train all of them.
  powers = {int(label.split()[1]) for label in inner}
  assert min(powers) == 0
  assert max(powers) == max(map(len, assembly.model.towers))
