"""FIBER's fine stage: what it promises beyond the original's numbers."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fiber as coarse_lib
from configs import fiber_fine as config_lib
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.models import fpn
from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.objectives import grounding
from e2e_vlp_jax.ops import anchors as anchors_lib
from e2e_vlp_jax.ops import atss
from e2e_vlp_jax.ops import deformable
from e2e_vlp_jax.ops import nms
from e2e_vlp_jax.ops import pixel_boxes
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import sharding
from tests import parity
from tests.test_parity_fiber_fine import each_row

SIZES = dict(vocab_size=30, num_classes=3, num_attributes=0)
LENGTH, BOXES = 8, 3
TRUNK = {'swin.width': 8, 'swin.depths': (1, 1, 1), 'swin.heads': (1, 1, 2),
         'swin.window': 4, 'roberta.depth': 1, 'roberta.width': 16,
         'roberta.heads': 2, 'roberta.ffn': 32, 'roberta.positions': 12,
         'fused_layers': 1}


def small_config(lib=config_lib, **changes):
  """`tiny` of either stage, of some thousand parameters."""
  config = lib.get_config('tiny')
  changes = {f'model.{k}': v for k, v in TRUNK.items()} | changes
  if lib is config_lib:
    changes = {'model.head.width': 16, 'model.head.blocks': 1, **changes}
  config.update_from_flattened_dict(changes)
  return config


def batch_of(b=8, canvas=(32, 48), seed=0):
  """A batch; row 0 has no boxes, row 1 lacks a text too."""
  rng = np.random.default_rng(seed)
  h, w = canvas
  size = np.stack([rng.integers(20, 33, b), rng.integers(20, 49, b)], -1)
  image_mask = ((np.arange(h)[:, None] < size[:, 0, None, None])
                & (np.arange(w) < size[:, 1, None, None]))
  count = rng.integers(1, BOXES + 1, b)
  count[:2] = 0
  box_mask = np.arange(BOXES) < count[:, None]
  side = rng.uniform(.2, .6, (b, BOXES, 2))
  text_mask = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, b)[:, None]
  spans = rng.random((b, BOXES, LENGTH)) < .3
  return {
      'image': rng.integers(0, 256, (b, h, w, 3)).astype(np.uint8),
      'image_mask': image_mask, 'valid': np.arange(b) != 1,
      'text': rng.integers(4, 30, (b, 1, LENGTH)).astype(np.int32),
      'text_mask': text_mask[:, None], 'box_mask': box_mask,
      'boxes': np.concatenate([rng.uniform(side / 2, 1 - side / 2), side],
                              -1).astype(np.float32),
      'span_mask': spans & text_mask[:, None] & box_mask[..., None]}


@functools.cache
def built():
  """(model, variables) with random parameters."""
  model = models.build(small_config(), **SIZES)
  shapes = jax.eval_shape(lambda b: model.init(
      jax.random.key(0), b, model.views), batch_of())
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
      lambda x: rng.normal(0, .3, x.shape).astype(x.dtype), dict(shapes))


# --- Ops --------------------------------------------------------------------
def test_padded_boxes_are_never_assigned():
  """Whatever padding holds, the real boxes keep their anchors."""
  rng = np.random.default_rng(1)
  levels = anchors_lib.pyramid([(12, 16), (6, 8), (3, 4)], 8)
  corner = rng.uniform(0, 60, (4, 5, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(10, 60, (4, 5, 2))],
                         -1).astype(np.float32)
  mask = rng.random((4, 5)) < .6
  mask[0] = False
  owner = np.asarray(atss.assign(each_row(levels, mask), boxes, mask))
  assert (owner[0] < 0).all() and (owner[1:] >= 0).any()
  assert np.take_along_axis(mask, np.maximum(owner, 0), 1)[owner >= 0].all()
  for fill in (7., np.nan):
    np.testing.assert_array_equal(owner, atss.assign(
        each_row(levels, mask), np.where(mask[..., None], boxes, fill), mask))


def test_suppression_equals_the_plain_loop():
  """Against a loop in numpy; 12 results of 60 boxes, three labels."""
  rng = np.random.default_rng(2)
  corner = rng.uniform(0, 20, (2, 60, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (2, 60, 2))],
                         -1).astype(np.float32)
  scores = rng.uniform(-.2, 1, (2, 60)).astype(np.float32)
  labels = rng.integers(0, 3, (2, 60))
  found = np.asarray(nms.by_class(boxes, scores, labels, 12, .4))
  for i in range(2):
    kept = []
    for k in np.argsort(-scores[i]):
      if scores[i, k] > 0 and not any(
          labels[i, k] == labels[i, j] and pixel_boxes.iou(
              boxes[i, k], boxes[i, j]) > .4 for j in kept):
        kept.append(k)
    assert len(kept) > 12
    assert found[i].tolist() == kept[:12]
  few = nms.by_class(boxes, np.where(np.arange(60) < 2, scores, 0.), labels,
                     12)
  assert (np.asarray(few)[:, 2:] == -1).all()


def test_resized_with_corners_kept():
  """A plane stays a plane, also from and to a single row."""
  plane = lambda h, w: (2. * np.linspace(0, 1, h)[:, None]
                        - 3. * np.linspace(0, 1, w))[None, ..., None]
  np.testing.assert_allclose(deformable.resize(jnp.asarray(plane(3, 4)),
                                               (7, 5)), plane(7, 5),
                             atol=1e-6)
  np.testing.assert_allclose(deformable.resize(jnp.ones((1, 1, 2, 1)),
                                               (3, 5)), 1., atol=1e-6)


# --- Training ---------------------------------------------------------------
def test_drop_block():
  """Squares go, as many as the rate says; what stays is scaled up."""
  module = fpn.DropBlock(.3)
  x = jnp.ones((64, 40, 40, 2))
  np.testing.assert_array_equal(module.apply({}, x), x)
  y = np.asarray(module.apply({}, x, True, rngs={
      'dropout': jax.random.key(0)}))
  gone = y[..., 0] == 0
  assert (gone == (y[..., 1] == 0)).all()
  assert .22 < gone.mean() < .28  # 1 - (1 - .3 / 9)**9 = .26
  np.testing.assert_allclose(y.mean((1, 2, 3)), 1., atol=1e-5)
  # Every dropped cell lies in a dropped square.
  inner = np.ones((64, 38, 38), bool)
  for dy in range(3):
    for dx in range(3):
      inner &= gone[:, dy:dy + 38, dx:dx + 38]
  cover = np.zeros_like(gone)
  for dy in range(3):
    for dx in range(3):
      cover[:, dy:dy + 38, dx:dx + 38] |= inner
  inside = (slice(None), slice(2, -2), slice(2, -2))
  assert (cover[inside] == gone[inside]).all()


def loss_and_gradients(config, batch):
  model = models.build(config, **SIZES)
  _, variables = built()
  def total(params):
    out = model.apply({'params': params}, batch, {'joint': ('grounding',)},
                      train=True, rngs={'dropout': jax.random.key(3)})
    losses, _ = grounding.Objective()(out, batch)
    return sum(s / jnp.maximum(w, 1.) for s, w in losses.values())
  return jax.jit(jax.value_and_grad(total))(variables['params'])


def test_frozen_stage():
  """No gradient, and no stochastic depth: only the rest is random."""
  config = small_config(**{'model.swin.drop_path': .5})
  config.optim.groups = config_lib._groups(.1, True)
  _, grads = loss_and_gradients(config, batch_of())
  grads = parity.flat(grads)
  frozen = [k for k in grads if k.startswith(('swin/patch', 'swin/blocks_0'))]
  assert frozen and not any(np.any(grads[k]) for k in frozen)
  assert np.any(grads['swin/blocks_1_0/ffn/in/kernel'])


@pytest.mark.parametrize('fused', [True, False])
def test_what_the_text_changes(fused):
  """Boxes, if the trunk is fused; without, only the token logits."""
  model = models.build(small_config(**{'model.cross_attention': fused}),
                       **SIZES)
  _, variables = built()
  run = jax.jit(lambda b: model.apply(variables, b,
                                      {'joint': ('grounding',)})['joint'])
  batch = batch_of(2)
  one = run(batch)
  batch['text'] = batch['text'][:, :, ::-1].copy()
  other = run(batch)
  gap = lambda k: float(jnp.abs(one[k] - other[k]).max())
  assert gap('token_logits') > 1e-3
  assert (gap('box_code') > 1e-4) == fused


def assembled(accumulate=1, **axes):
  axes = {'data': 1, 'fsdp': 1, 'tensor': 1, **axes}
  config = small_config(**{'total_steps': 3, 'accumulate': accumulate,
                           'optim.warmup_steps': 1})
  mesh = sharding.make_mesh(axes, jax.devices()[:int(np.prod(
      list(axes.values())))])
  assembly = assemble.Assembly(config, models.build(config, **SIZES), mesh,
                               batch_of())
  return assembly, lambda t: sharding.shard_batch(mesh, batch_of(seed=t))


@pytest.fixture(scope='module')
def layout_run():
  """Runs a layout once: (metrics of three steps, text of the program)."""
  @functools.cache
  def run(**layout):
    assembly, batch = assembled(**layout)
    step = assembly.trace(8).lower().compile()
    state, found = assembly.init(), []
    for t in range(3):
      state, metrics = step(state, batch(t))
      found.append(jax.device_get(metrics))
    return found, step.as_text()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'FSDP_MIN_BYTES', 256)
    yield run


@pytest.mark.slow
@pytest.mark.parametrize('layout', [
    dict(data=8), dict(fsdp=8), dict(accumulate=4)], ids=str)
def test_layouts_give_the_same_losses(layout, layout_run):
  """And gradients, by their norm and by the later losses.

  With accumulation a part has rows without boxes alone.
  """
  one, other = layout_run()[0], layout_run(**layout)[0]
  for a, b in zip(one, other):
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-5,
                                 err_msg=name)


@pytest.mark.slow
def test_devices_keep_their_rows(layout_run):
  """No device gathers another one's features for assignment or taps."""
  text = layout_run(data=8)[1]
  largest = max((c.bytes for c in program.collectives(text)
                 if c.kind != 'all-reduce'), default=0)
  assert largest < 8 * 24 * 16 * 4  # The finest stage of the batch.


def test_batch_without_any_box():
  """Finite losses, all of them for the tokens."""
  batch = batch_of()
  batch['box_mask'][:] = False
  model, variables = built()
  out = jax.jit(lambda b: model.apply(variables, b,
                                      {'joint': ('grounding',)}))(batch)
  losses, _ = grounding.Objective()(out, batch)
  assert losses['token'][0] > 0 and losses['token'][1] == 0
  assert losses['box_giou'] == losses['centerness'] == (0, 0)
  assert grounding.Objective.least_weight['token'] == 1


def test_rows_that_are_not_valid_count_nothing():
  batch = batch_of()
  model, variables = built()
  run = jax.jit(lambda b: grounding.Objective()(model.apply(
      variables, b, {'joint': ('grounding',)}), b)[0])
  before = run(batch)
  batch['text_mask'][1] = True
  batch['box_mask'][1] = True
  for name, (total, weight) in run(batch).items():
    np.testing.assert_allclose((total, weight), before[name], rtol=1e-5)


def test_weight_decay_drops():
  """At its steps, for groups that decay; gradients are zero."""
  config = config_lib.get_config('base').optim
  config.update(weight_decay_steps=(2, 3), schedule='constant',
                learning_rate=1., warmup_steps=0, clip_norm=0.,
                groups=(('bias', dict(weight_decay=0.)), ('.*', {})))
  params = {'bias': jnp.ones(2), 'kernel': jnp.ones(2)}
  tx = optim.make_optimizer(config, params, optim.make_schedule(config, 10))
  state, seen = tx.init(params), []
  for _ in range(4):
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state,
                               params)
    seen.append(float(-updates['kernel'][0]))
    assert not updates['bias'].any()
  np.testing.assert_allclose(seen, [.01, .01, .001, .0001], rtol=1e-5)
  config.optimizer = 'adamw_hf'
  with pytest.raises(errors.UserError, match="weight_decay_steps.*'adamw_hf'"):
    optim.make_optimizer(config, params, optim.make_schedule(config, 10))


def test_full_size():
  """At 800 x 1344: 22,400 locations; windows need not divide the grid."""
  config = config_lib.get_config('base')
  model = models.build(config, vocab_size=50265, num_classes=80,
                       num_attributes=0)
  batch = {'image': jax.ShapeDtypeStruct((1, 800, 1344, 3), jnp.uint8),
           'image_mask': jax.ShapeDtypeStruct((1, 800, 1344), bool),
           'text': jax.ShapeDtypeStruct((1, 1, 256), jnp.int32),
           'text_mask': jax.ShapeDtypeStruct((1, 1, 256), bool)}
  out, variables = jax.eval_shape(lambda b: model.init_with_output(
      jax.random.key(0), b, model.views), batch)
  out = out['joint']
  assert out['token_logits'].shape == (1, 1, 22_400, 256)
  assert [x.shape[2] for x in out['anchors'].values()] == [
      100 * 168, 50 * 84, 25 * 42, 13 * 21, 7 * 11]
  sizes = {}
  for name, x in parity.flat(variables['params']).items():
    part = re.sub(r'/.*|_\d$', '', name)
    sizes[part] = sizes.get(part, 0) + x.size
  print('fiber_fine base:', {k: f'{n / 1e6:.2f}M' for k, n in sizes.items()})
  assert .9e7 < sizes['tower'] < 1.3e7


# --- Canvas -----------------------------------------------------------------
def test_results_do_not_depend_on_the_canvas():
  """The same locations on a larger canvas give the same boxes, to the bit."""
  rng = np.random.default_rng(4)
  small, large = [(4, 6), (2, 3)], [(6, 10), (3, 5)]
  size, tokens = jnp.array([[30., 44.]]), np.eye(3, LENGTH) > 0
  maps = {'token_logits': LENGTH, 'box_code': 4, 'centerness': 1}
  inside = {k: [rng.normal(0, 1, (h, w, d)) for h, w in small]
            for k, d in maps.items()}

  def found(sizes):
    out = {}
    for k, d in maps.items():
      levels = []
      for (h, w), x in zip(sizes, inside[k]):
        # What is computed on padding alone finds nothing.
        full = np.full((h, w, d), 0. if k == 'box_code' else -50.)
        full[:x.shape[0], :x.shape[1]] = x
        levels.append(full.reshape(-1, d))
      out[k] = np.concatenate(levels)[None, None].astype(np.float32)
    out['centerness'] = out['centerness'][..., 0]
    out['anchors'] = {f'p{k}': x[None, None] for k, x in enumerate(
        anchors_lib.pyramid(sizes, 8))}
    return grounding_head.objects(out, tokens, size, most=20)
  a, b = found(small), found(large)
  assert (a['labels'] >= 0).sum() > 4
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_targets_do_not_depend_on_the_canvas():
  """Anchors of the image own the same boxes on a larger canvas.

  If the nine nearest of each level are the image's: a canvas with fewer
  locations on a level has other candidates, as in the original.
  """
  boxes = jnp.array([[[20., 18., 52., 44.], [30., 25., 46., 36.]]])
  mask = jnp.ones((1, 2), bool)
  owner, small = [], [(8, 10), (4, 5)]
  for sizes in (small, [(16, 20), (8, 10)]):
    levels = anchors_lib.pyramid(sizes, 8, 4.)
    found = atss.assign(each_row(levels, mask), boxes, mask)[0]
    start, kept = 0, []
    for (h, w), (hs, ws) in zip(sizes, small):
      kept.append(np.asarray(found[start:start + h * w]).reshape(
          h, w)[:hs, :ws])
      start += h * w
    owner.append(kept)
  assert sum((x >= 0).sum() for x in owner[0]) > 2
  jax.tree.map(np.testing.assert_array_equal, *owner)


# --- From the coarse stage --------------------------------------------------
def parameters(config):
  model = models.build(config, **SIZES)
  batch = {k: jnp.asarray(v) for k, v in batch_of(2, (64, 64)).items()}
  batch |= {'masked_text': batch['text'],
            'masked_text_mask': batch['text_mask']}
  wanted = {k: v for k, v in model.views.items() if k != 'pair'}
  shapes = jax.eval_shape(lambda b: model.init(
      {'params': jax.random.key(0), 'sample': jax.random.key(1)}, b, wanted),
                          batch)['params']
  rng = np.random.default_rng(5)
  return model, jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_transfer_from_the_coarse_stage():
  """The whole trunk is taken; the rest is listed (facts of the release)."""
  _, coarse = parameters(small_config(coarse_lib))
  model, fine = parameters(small_config())
  put = lambda tree: jax.tree.map(jnp.asarray, tree)
  merged, report = checkpoint.merge(put(fine), model.adapt(coarse, fine))
  assert not report['other_shape']
  assert all(k.startswith(('swin/', 'text/')) for k in report['loaded'])
  new = {k.split('/')[0] for k in report['missing']}
  assert new == {'stage_norms_0', 'stage_norms_1', 'stage_norms_2', 'pyramid',
                 'tower', 'head'}
  gone = {k.split('/')[0] for k in report['surplus']}
  assert {'swin', 'itm_head', 'mlm_head'} <= gone
  assert [k for k in report['surplus'] if k.startswith(('swin', 'text/'))
          ] == ['swin/norm/norm/bias', 'swin/norm/norm/scale']
  flat = parity.flat(coarse)
  for name, x in parity.flat(merged).items():
    if name in report['loaded']:
      np.testing.assert_array_equal(x, flat[name])


@pytest.mark.parametrize('change, message', [
    ({'model.swin.fusion': 'v2'},
     r'fusion=v3, this model v2.*--config\.model\.swin\.fusion=v3'),
    ({'model.swin.window': 2},
     r'window=4, this model 2.*--config\.model\.swin\.window=4')])
def test_coarse_checkpoint_of_another_kind(change, message):
  _, coarse = parameters(small_config(coarse_lib))
  model, fine = parameters(small_config(**change))
  with pytest.raises(errors.UserError, match=message):
    model.adapt(coarse, fine)


@pytest.mark.parametrize('change, message', [
    ({'model.swin.fusion': 'v1'}, "fusion: 'v1'; did you mean 'v3'"),
    ({'model.channels': 'bgrr'}, "channels: 'bgrr'; did you mean 'bgr'"),
    ({'model.head.width': 20}, 'head.width: 20; expected a multiple of 16'),
    ({'model.swin.depths': (1, 1), 'model.swin.heads': (1, 1)},
     r'depths: \(1, 1\); expected at least 3 stages')])
def test_configs_that_cannot_be(change, message):
  with pytest.raises(errors.UserError, match=message):
    parameters(small_config(**change))


def test_more_than_one_text():
  config = small_config(**{'data.sentences': 2})
  with pytest.raises(errors.UserError, match='data.sentences: 2.*expected'):
    grounding.Objective().check(config, built()[0])


@pytest.mark.parametrize('argument, message', [
    ('base,recipe=refcocoo', "recipe: 'refcocoo'; did you mean 'refcoco'"),
    ('bse', "no size 'bse'; did you mean 'base'")])
def test_arguments_that_cannot_be(argument, message):
  with pytest.raises(ValueError, match=message):
    config_lib.get_config(argument)
