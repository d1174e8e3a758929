"""FIBER's views, its contrast and its negatives, sizes and bad input.

Padding, kept features and captions: tests/test_contract.py and
tests/test_beam_search.py.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fiber as config_lib
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.models import feature_queue
from e2e_vlp_jax.models import fiber
from e2e_vlp_jax.models import roberta
from e2e_vlp_jax.objectives import itc
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.training import sharding
from tests import parity

SIZES = dict(vocab_size=50, num_classes=6, num_attributes=13)


def small_config(**model):
  """Three stages, so that pairs lie in two of them; shifted windows."""
  config = config_lib.get_config('tiny')
  config.data.sentences = 2
  config.data.buckets = ((48, 48),)
  config.model.update(dict(width=24, fused_layers=3))
  config.model.swin.update(dict(width=8, depths=(1, 2, 1), heads=(1, 2, 2),
                                patch=3, window=4))
  config.model.roberta.update(dict(width=20, heads=2, ffn=32, depth=4))
  config.model.update(model)
  return config


def batch_for(config, batch_size=3, seed=0):
  return jax.tree.map(jnp.asarray, synthetic.synthetic_batch(
      config.data, batch_size=batch_size, seed=seed, **SIZES))


def build(config, batch_size=3, seed=0):
  """(model, variables, batch); all weights random, the gates too."""
  model = models.build(config, **SIZES)
  batch = batch_for(config, batch_size, seed)
  variables = jax.jit(lambda b: model.init(jax.random.key(seed), b,
                                           model.views))(batch)
  draw = np.random.default_rng(seed)
  params = jax.tree.map(
      lambda x: x + .2 * draw.standard_normal(x.shape).astype(x.dtype),
      variables['params'])
  return model, {**variables, 'params': params}, batch


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(model, variables, batch, wanted):
  return model.apply(variables, batch, dict(wanted))


def apply(model, variables, batch, **wanted):
  return _apply(model, variables, batch, tuple(wanted.items()))


EVERYTHING = dict(
    image_only=('itc', 'captioning'), text_only=('itc',),
    joint=('mlm', 'itm'), joint_masked=('mlm', 'itm'),
    hard_negative=('itm',))


@pytest.fixture(scope='module')
def built():
  return build(small_config())


@pytest.fixture(scope='module')
def outputs(built):
  return apply(*built, **EVERYTHING)


# --- Views ------------------------------------------------------------------
def test_outputs_have_the_promised_names_and_shapes(outputs):
  shapes = jax.tree.map(lambda x: x.shape, outputs)
  b, s, l, v = 3, 2, 20, SIZES['vocab_size']
  assert shapes == {
      'image_only': {'image_embedding': (b, 24), 'itc_scale': (),
                     'caption_logits': (b, s, l, v)},
      'text_only': {'text_embedding': (b, s, 24), 'itc_scale': ()},
      'joint': {'mlm_logits': (b, s, l, v), 'itm_logits': (b, s, 2)},
      'joint_masked': {'mlm_logits': (b, s, l, v), 'itm_logits': (b, s, 2)},
      'hard_negative': {'itm_logits': (b, 3 * s, 2), 'itm_labels': (b, 3 * s)}}
  for view, name in (('image_only', 'image'), ('text_only', 'text')):
    length = jnp.linalg.norm(outputs[view][f'{name}_embedding'], axis=-1)
    np.testing.assert_allclose(length, 1, rtol=1e-5)


@pytest.mark.slow
def test_views_do_not_depend_on_which_others_run(built, outputs):
  for view, heads in EVERYTHING.items():
    alone = apply(*built, **{view: heads})[view]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5),
                 alone, outputs[view])


def test_a_large_image_does_not_drown_the_text():
  """From scratch, Swin's stream grows to 8 times a text's values.

  Two texts must stay apart in a layer that attends to it.
  """
  layer = roberta.Layer(128, 4, 256, dropout=0., from_scratch=True)
  common, own, *texts = (jax.random.normal(jax.random.key(i), (1, n, 128))
                         for i, n in enumerate((1, 36, 20, 20)))
  image = 8 * (.9 * common + .4 * own)
  variables = layer.init(jax.random.key(4), texts[0], None, image)
  one, other = (layer.apply(variables, x, None, image) for x in texts)
  assert jnp.linalg.norm(one - other) > .8 * jnp.linalg.norm(one)


def test_closed_gates_make_the_dual_encoder(built):
  """With all gates at 0 fused tokens are those of the trunks alone."""
  model, variables, batch = built
  params = jax.tree_util.tree_map_with_path(
      lambda path, x: x * 0 if path[-1].key == 'gate' else x,
      variables['params'])

  def gap(params):
    _, seen = jax.jit(lambda p: model.apply(
        {'params': p}, batch, {'image_only': ('itc',), 'text_only': ('itc',),
                               'joint': ('itm',)},
        mutable=['intermediates'], capture_intermediates=True))(params)
    seen = parity.flat(seen['intermediates'])
    alone, fused = seen['swin/blocks_2_0/__call__']
    image = np.abs(fused.reshape(3, 2, *alone.shape[1:])
                   - alone[:, None]).max()
    # Fused text lacks the last layer's norm, which is made all the same.
    alone, fused = seen['text/layers_3/norm2/__call__']
    return image, np.abs(alone - fused).max()
  assert max(gap(params)) < 1e-5
  assert min(gap(variables['params'])) > .01  # and with open gates they differ


def test_fused_views_see_both_sides(built, outputs):
  model, variables, batch = built
  base = np.asarray(outputs['joint']['mlm_logits'])
  dark = apply(model, variables, {**batch, 'image': batch['image'] * 0},
               joint=('mlm', 'itm'))['joint']['mlm_logits']
  assert np.abs(base - dark).max() > 1e-3
  other = {**batch, 'text': batch['text'].at[:, :, 1].set(11)}
  other = apply(model, variables, other, **EVERYTHING)
  text = np.asarray(other['joint']['mlm_logits'])
  assert np.abs(base[:, :, 2] - text[:, :, 2]).max() > 1e-3
  np.testing.assert_array_equal(other['image_only']['image_embedding'],
                                outputs['image_only']['image_embedding'])


def test_caption_does_not_leak(built, outputs):
  """Token t on changes no logit before t, of any sentence."""
  model, variables, batch = built
  s, t = 1, 3
  changed = {**batch, 'text': batch['text'].at[:, s, t:].set(
      (batch['text'][:, s, t:] + 7) % 50)}
  after = apply(model, variables, changed, **EVERYTHING)
  a, b = (np.asarray(x['image_only']['caption_logits'])
          for x in (outputs, after))
  np.testing.assert_array_equal(a[:, s, :t], b[:, s, :t])
  np.testing.assert_array_equal(a[:, 1 - s], b[:, 1 - s])
  assert np.abs(a[:, s, t:] - b[:, s, t:]).max() > 1e-3


# --- Contrast ---------------------------------------------------------------
def contrast(image, text, there, **more):
  """itc.Objective on features made up here."""
  out = {'image_only': {'image_embedding': image, 'itc_scale': 5.},
         'text_only': {'text_embedding': text, 'itc_scale': 5.}}
  for view, k in (('image_only', 'image_queue'), ('text_only', 'text_queue')):
    if more:
      out[view] |= {k: more[k], 'queue_filled': more['filled']}
  losses, metrics = itc.Objective(more.get('unfilled', False))(
      out, {'text_mask': there[..., None]})
  return losses['itc'], metrics


def unit(draw, *shape):
  x = draw.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits, true):
  return np.log(np.exp(logits).sum()) - logits[true]


@pytest.mark.parametrize('queue', [False, True])
def test_itc_is_what_it_says(queue):
  """Against loops: own texts are no rivals, rows without text take no part,
  only the filled part of a queue counts."""
  draw = np.random.default_rng(1)
  b, s, q, e = 4, 2, 6, 8
  image, text = unit(draw, b, e), unit(draw, b, s, e)
  there = np.array([[1, 1], [1, 0], [1, 1], [0, 0]], bool)
  filled = np.arange(q) < 4
  past = unit(draw, q, e) * (1 if queue else 0), unit(draw, q, e)
  expected = []
  for i in range(b):
    for k in range(s):
      if not there[i, k]:
        continue
      images = [image[j] for j in range(b) if there[j].any()]
      texts = [text[i, k]] + [text[j, m] for j in range(b) for m in range(s)
                              if j != i and there[j, m]]
      if queue:
        images += list(past[0][filled])
        texts += list(past[1][filled])
      mine = [j for j in range(b) if there[j].any()].index(i)
      expected.append(.5 * (
          cross_entropy(5 * np.array(images) @ text[i, k], mine)
          + cross_entropy(5 * np.array(texts) @ image[i], 0)))
  more = dict(image_queue=past[0], text_queue=past[1],
              filled=filled) if queue else {}
  (total, count), metrics = contrast(image, text, there, **more)
  assert count == len(expected) == 5
  np.testing.assert_allclose(total, sum(expected), rtol=1e-5)
  assert set(metrics) == {'itc_text_accuracy', 'itc_image_accuracy'}
  if queue:
    (whole, _), _ = contrast(image, text, there, unfilled=True, **more)
    assert whole > total + 1e-3


def test_itc_of_perfect_features_is_right():
  image = np.eye(4, dtype=np.float32)
  (_, count), metrics = contrast(image, image[:, None], np.ones((4, 1), bool))
  assert [float(s / w) for s, w in metrics.values()] == [1., 1.]
  _, metrics = contrast(image, image[::-1, None], np.ones((4, 1), bool))
  assert [float(s / w) for s, w in metrics.values()] == [0., 0.]
  assert count == 4


def test_with_a_queue_each_side_trains_itself():
  """Other features are constants, in the batch too (the released code)."""
  draw = np.random.default_rng(2)
  image, text = unit(draw, 3, 8), unit(draw, 3, 1, 8)
  there = np.ones((3, 1), bool)
  more = dict(image_queue=unit(draw, 2, 8), text_queue=unit(draw, 2, 8),
              filled=np.ones(2, bool))
  grad = lambda **m: jax.grad(
      lambda x: contrast(x, text, there, **m)[0][0])(image)
  # By hand: d/dx of image -> text alone, with the queue's texts.
  every = np.concatenate([text[:, 0], more['text_queue']])
  alone = jax.grad(lambda x: .5 * jnp.sum(
      jax.nn.logsumexp(5 * x @ every.T, -1) - 5 * (x * text[:, 0]).sum(-1)))
  np.testing.assert_allclose(grad(**more), alone(image), atol=1e-5)
  assert np.abs(grad() - grad(**more)).max() > .01


# --- Negatives --------------------------------------------------------------
def test_negatives_are_drawn_by_similarity():
  draw = np.random.default_rng(3)
  similarity = draw.standard_normal((3, 5)).astype(np.float32) * 2
  allowed = np.array([1, 1, 1, 0, 1], bool)
  own = np.eye(3, 5, dtype=bool)
  logits = fiber.negatives(similarity, allowed, own)
  assert np.isinf(logits[own | ~allowed]).all()
  expected = np.exp(similarity) * (allowed & ~own)
  expected /= expected.sum(1, keepdims=True)
  drawn = jax.random.categorical(jax.random.key(0), logits, shape=(20000, 3))
  share = np.stack([(np.asarray(drawn) == k).mean(0) for k in range(5)], 1)
  np.testing.assert_allclose(share, expected, atol=.015)


def test_hard_negatives_are_other_pairs(built, outputs):
  """Without a stream of draws the most similar; each is scored as `joint`
  scores that pair."""
  model, variables, batch = built
  image = np.asarray(outputs['image_only']['image_embedding'])
  text = np.asarray(outputs['text_only']['text_embedding'])
  out = outputs['hard_negative']
  np.testing.assert_array_equal(out['itm_labels'],
                                [[1, 1, 0, 0, 0, 0]] * 3)
  similar = np.einsum('be,nse->bns', image, text)
  for i in range(3):
    other = [j for j in range(3) if j != i]
    flat = similar[i][other].reshape(-1)
    j, k = np.unravel_index(flat.argmax(), (2, 2))
    pair = {k_: v for k_, v in batch.items()}
    for name in ('text', 'text_mask'):
      pair[name] = batch[name].at[i, 0].set(batch[name][other[j], k])
    alone = apply(model, variables, pair, joint=('itm',))['joint']
    np.testing.assert_allclose(out['itm_logits'][i, 2],
                               alone['itm_logits'][i, 0], atol=2e-5)
    j = other[similar[other, i, 0].argmax()]
    pair = {**batch, 'image': batch['image'].at[i].set(batch['image'][j]),
            'image_mask': batch['image_mask'].at[i].set(
                batch['image_mask'][j])}
    alone = apply(model, variables, pair, joint=('itm',))['joint']
    np.testing.assert_allclose(out['itm_logits'][i, 4],
                               alone['itm_logits'][i, 0], atol=2e-5)


def test_hardness_zero_does_not_look_at_similarity(built):
  """All other pairs are as likely then; of equals the first is taken."""
  _, variables, batch = built
  model = models.build(small_config(negative_hardness=0.), **SIZES)
  out = apply(model, variables, batch, hard_negative=('itm',))
  for i in range(3):
    j = 1 if i == 0 else 0
    pair = {**batch, **{k: batch[k].at[i, 0].set(batch[k][j, 0])
                        for k in ('text', 'text_mask')}}
    alone = apply(model, variables, pair, joint=('itm',))['joint']
    np.testing.assert_allclose(out['hard_negative']['itm_logits'][i, 2],
                               alone['itm_logits'][i, 0], atol=2e-5)


def test_cells_are_of_the_tokens_that_the_first_pair_reads(built):
  """So the warm start moves what lies below, and nothing above."""
  model, variables, batch = built
  config = model.config
  fresh = jax.jit(lambda b: model.init(jax.random.key(0), b, model.views))(
      batch)['params']
  params = {**variables['params'],
            **{k: fresh[k] for k in ('cells_head', 'cells_norm')}}
  grid = lambda p: apply(model, {**variables, 'params': p}, batch,
                         grid=('grid_classes',))['grid']
  out = grid(params)
  # Blocks 0, 1 and 2, 3: the pairs begin with block 1, in the second stage.
  assert sum(config.swin.depths) - config.fused_layers == 1
  assert out['grid_logits'].shape == (3, 8 * 8, SIZES['num_classes'] + 1)
  assert out['grid_xy'].shape == (3, 8 * 8, 2)
  assert out['grid_mask'].shape == (3, 8 * 8)
  moved = jax.grad(lambda p: (grid(p)['grid_logits']**2).sum())(params)['swin']
  size = lambda tree: float(sum(jnp.abs(x).max() for x in jax.tree.leaves(
      tree)))
  assert size(moved['blocks_0_0']) > 0 and size(moved['patch_embed']) > 0
  for name in ('blocks_1_0', 'blocks_1_1', 'blocks_2_0'):
    assert size(moved[name]) == 0


def test_rows_without_text_are_no_negatives(built):
  model, variables, batch = built
  empty = {**batch, 'text_mask': batch['text_mask'].at[1].set(False)}
  out = apply(model, variables, empty, **EVERYTHING)['hard_negative']
  assert (out['itm_labels'][1] == -1).all()
  assert (out['itm_labels'][jnp.array([0, 2])] >= 0).all()
  only = {**batch, 'text_mask': batch['text_mask'].at[1:].set(False)}
  out = apply(model, variables, only, **EVERYTHING)['hard_negative']
  assert out['itm_labels'][0].tolist() == [1, 1, -1, -1, -1, -1]
  assert np.isfinite(out['itm_logits']).all()


@pytest.mark.slow
def test_negatives_follow_the_stream_of_draws(built):
  model, variables, batch = built
  draw = jax.jit(lambda seed: model.apply(
      variables, batch, {'hard_negative': ('itm',)},
      rngs={'sample': jax.random.key(seed)})['hard_negative']['itm_logits'])
  first = np.asarray(draw(0))
  np.testing.assert_array_equal(first, draw(0))
  assert any(np.abs(first - draw(seed)).max() > 1e-3 for seed in range(1, 6))


# --- Training ---------------------------------------------------------------
def two_steps(config, devices=1):
  """(metrics of each of two steps, final state) of a config's assembly."""
  config.mesh.data = devices
  model = models.build(config, **SIZES)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  batch = synthetic.synthetic_batch(config.data, seed=7, **SIZES,
                                    batch_size=config.batch_size)
  built = assemble.Assembly(config, model, mesh, jax.tree.map(
      lambda x: x[:1], batch))
  state, step, logged = built.init(), built.step(), []
  for _ in range(2):
    state, metrics = step(state, sharding.shard_batch(mesh, batch))
    logged.append(jax.device_get(metrics))
  return logged, jax.device_get(state)


def train_config(**model):
  config = small_config(**model)
  config.batch_size = 8
  config.warm_start.steps = 0
  config.optim.warmup_steps = 0
  config.data.sentences = 1
  return config


@pytest.mark.long
def test_two_devices_train_as_one():
  """Contrast and negatives are of the global batch."""
  one, two = (two_steps(train_config(), n)[0] for n in (1, 2))
  assert {'mlm', 'itc', 'itm', 'itc_text_accuracy'} <= set(one[0])
  for a, b in zip(one, two):
    for key in ('loss', 'itc', 'itm', 'mlm'):
      np.testing.assert_allclose(a[key], b[key], rtol=2e-4, err_msg=key)
  assert one[0]['itc'] != one[1]['itc']


def test_the_last_rows_of_a_large_batch_stay():
  queue = feature_queue.Queue(3)
  rows = dict(text=np.arange(5)[:, None], text_features=np.eye(5, 4))
  state = queue.init(jax.random.key(0), rows, True)
  for seen in (5, 10):
    _, state = queue.apply(state, rows, True, mutable=['queue'])
    kept = state['queue']
    assert kept['count'] == seen
    assert sorted(kept['text'][:, 0].tolist()) == [2, 3, 4]
    np.testing.assert_array_equal(
        kept['text_features'], rows['text_features'][kept['text'][:, 0]])


@pytest.mark.slow
def test_queue_moves_with_training():
  config = train_config(queue=12)
  config.optim.learning_rate = 0.
  logged, state = two_steps(config)
  queue = state.model_state['queue']['queue']
  assert queue['count'] == 16
  assert queue['image'].shape == (12, 48, 48, 3)
  # The second batch wraps: its last four rows lie in front, and it is the
  # first batch again, with the same weights.
  np.testing.assert_allclose(queue['text_features'][:4],
                             queue['text_features'][4:8], atol=1e-6)
  np.testing.assert_array_equal(queue['text'][:4], queue['text'][4:8])
  # Past features make the task harder, those of the same pair impossible.
  assert logged[1]['itc'] > logged[0]['itc'] + .1


# --- Checkpoints of another image side --------------------------------------
def test_adapt_resizes_tables_and_nothing_else():
  small = build(small_config())[1]['params']
  config = small_config()
  config.model.swin.window = 8
  shapes = jax.eval_shape(
      lambda b: models.build(config, **SIZES).init(
          jax.random.key(0), b, EVERYTHING), batch_for(config))['params']
  model = models.build(config, **SIZES)
  adapted = parity.flat(models.adapt(model, small, shapes))
  shapes, small = parity.flat(shapes), parity.flat(small)
  changed = 0
  for name, x in adapted.items():
    if name in shapes:
      assert x.shape == shapes[name].shape, name
    if x.shape != small[name].shape:
      assert name.endswith('relative_bias')
      # Bicubic weights add up to 1.
      one = fiber.swin_lib.resize_relative_bias(np.ones((49, 2)), 225)
      np.testing.assert_allclose(one, 1, rtol=1e-5)
      changed += 1
    else:
      np.testing.assert_array_equal(x, small[name])
  assert changed == 3  # of 4 blocks: the last grid is smaller than a window


# --- Sizes ------------------------------------------------------------------
def test_parameter_counts():
  """FIBER-Base by parts (facts of the public code); tiny's README figure."""
  count = {}
  for size, vocabulary in (('base', 50265), ('tiny', 75)):
    config = config_lib.get_config(size)
    sizes = {**SIZES, 'vocab_size': vocabulary}
    model = models.build(config, **sizes)
    batch = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
    shapes = jax.eval_shape(lambda b, m=model: m.init(
        jax.random.key(0), b, EVERYTHING), batch)['params']
    count[size] = {}
    for name, x in parity.flat(shapes).items():
      top = name.split('/')[0]
      part = f'{top} cross' if '/cross/' in name else top
      count[size][part] = count[size].get(part, 0) + x.size
    print(size, count[size], sum(count[size].values()))
  base = count['base']
  gates, norms, pooler = 12, 6 * 2 * 768, 768 * 768 + 768
  assert base['swin'] == 86_878_584
  assert base['swin cross'] == 12_607_494
  assert base['text'] == 124_645_632 - pooler     # never used there
  # Theirs also has a gate in the six lower layers, and unused norms.
  assert base['text cross'] == 13_397_004 - norms - gates / 2
  assert base['mlm_head'] + base['mlm_decoder'] == 39_245_913
  assert base['itm_head'] == 3_074
  assert sum(v for k, v in base.items() if k.endswith('_projection')
             ) == 2 * (590_592 + 787_200)
  assert sum(v for k, v in base.items() if k.endswith('_pooler')
             ) == 4 * 590_592
  assert program.count_parameters(shapes)['total'] == sum(
      count['tiny'].values())


# --- Bad input --------------------------------------------------------------
@pytest.mark.parametrize('change, message', [
    (lambda c: c.data.update(buckets=((54, 48),)), 'window'),
    (lambda c: c.data.update(buckets=((50, 48),)), 'patch'),
    (lambda c: c.data.update(max_text=21), 'positions'),
    (lambda c: c.model.update(fused_layers=5), 'fused_layers'),
    (lambda c: c.model.update(queue=4), 'sentences'),
    (lambda c: c.model.update(queue=-1), 'model.queue: -1'),
    (lambda c: c.model.swin.update(depths=(1, 1, 1, 1)), 'model.swin.heads'),
    (lambda c: c.model.roberta.update(heads=3), 'heads: 3.*text/layers_0'),
], ids=['window', 'patch', 'positions', 'fuse', 'queue', 'queue<0', 'stages',
        'heads'])
def test_what_does_not_fit_is_refused(change, message):
  config = small_config()
  change(config)
  model = models.build(config, **SIZES)
  with pytest.raises(errors.UserError, match=message) as e:
    jax.eval_shape(lambda b: model.init(jax.random.key(0), b, EVERYTHING),
                   batch_for(config))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('arg, message', [
    ('huge', "no size 'huge'; valid choices: tiny"),
    ('base,sides=3', "no argument 'sides'; did you mean 'side'"),
    ('tiny,data=flickr+', r"data: 'flickr\+'; expected the name of a prep")])
def test_arguments_are_checked(arg, message):
  with pytest.raises(ValueError, match=message):
    config_lib.get_config(arg)
  with pytest.raises(ValueError, match="side: found 'x', expected a whole"):
    config_lib.get_config('base,side=x')


@pytest.mark.parametrize('changes, message', [
    ({'batch_size': 1}, 'batch_size: 1 in 1'),
    ({'batch_size': 2, 'accumulate': 2, 'objectives.itc': 0.},
     'objective itm .* at least 4'),
    ({'objective_options.itm.view': 'hard'}, 'valid choices: joint'),
    ({'optim.schedule': 'cosin', 'warm_start.steps': 5}, 'optim.schedule'),
    ({'dtype': 'float33'}, "dtype: 'float33'.*'float32'")])
def test_recipes_that_cannot_be(changes, message):
  """Refused before the first step, of a later stage too."""
  config = config_lib.get_config('tiny')
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=message):
    assemble.Assembly(config, models.build(config, **SIZES),
                      sharding.make_mesh(config.mesh), {})
