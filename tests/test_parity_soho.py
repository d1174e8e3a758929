"""SOHO equals the released code, whose results the reference pack holds.

Every array of reference/soho that concerns the model: trunk, necks,
dictionary, pre-training model in eval and train mode, one optimizer step, VQA
model. (Its optimizer and schedule alone are in test_parity_optim, image
pipeline and tokenizer in test_parity_data.)
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from configs import soho as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import necks
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.models import soho
from e2e_vlp_jax.models import visual_dictionary
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import resnet as resnet_names
from tests import parity

AGAINST = 'researchmm/soho 95824a8, torch 2.13.0'
# The pack's README says how far float32 is from float64 there.
EVAL, TRAIN, LOSS, GRAD, BUFFER = 5e-5, 1e-3, 5e-5, 1e-3, 1e-5
REQUESTS = {'joint_masked': ('itm', 'mlm', 'mvm')}
SOURCE = mapping.find('soho')


@functools.lru_cache(None)
def read(path):
  with np.load(path) as f:
    return {k: f[k].astype(np.float32) if f[k].dtype == np.float16 else f[k]
            for k in f.files}


@pytest.fixture(scope='module')
def pack(shared):
  """pack(name) -> {array name: array}; pack(name, prefix): those of a part."""
  def get(name, prefix=''):
    every = read(shared / 'reference' / 'soho' / f'soho_{name}.npz')
    return {k[len(prefix):]: v for k, v in every.items()
            if k.startswith(prefix)}
  return get


@pytest.fixture
def note(record_property):
  def note_(what, ours, theirs, tolerance, scale=1.):
    """Compares arrays or lists of them; the row names the worst."""
    if not isinstance(ours, list):
      ours, theirs = [ours], [theirs]
    worst = max(parity.difference(what, a, b) / s for a, b, s in zip(
        ours, theirs, scale if isinstance(scale, list) else [scale] * len(
            ours), strict=True))
    parity.note(record_property, f'soho_{what}', AGAINST, worst, tolerance)
  return note_


def mesh_of(devices):
  return sharding.make_mesh({'data': devices, 'fsdp': 1, 'tensor': 1},
                            jax.devices()[:devices])


# --- The reference's models -------------------------------------------------
def reference_config(**model):
  """The released configuration at the pack's size, with its behaviour."""
  config = config_lib.get_config('r18')
  config.dtype = 'float32'
  config.model.update(dict(
      width=32, attention_heads=4, ffn=64, max_text=24, dropout=0.,
      remat='none',
      # The pack's images are normalised: 255 times what we divide by 255.
      image_mean=(0., 0., 0.), image_std=(1 / 255.,) * 3))
  config.model.backbone.update(dict(stem=8, width=8, mask_padding=False,
                                    remat='none'))
  config.model.neck.square_mask = True
  config.model.dictionary.size = 16
  config.model.update(model)
  return config


def recorded(config, cell, keep):
  """The model, which draws what torch drew: cell (1,), keep (4,)."""
  class Recorded(soho.Model):

    def choose_cells(self, mask, texts):
      shape = mask.shape[0], texts
      return (jnp.broadcast_to(jnp.asarray(cell), shape),
              jnp.asarray(keep, bool).reshape(shape))
  return Recorded(config.model, 120, 6, 13,
                  frozen=models.frozen_groups(config))


def batch_of(inputs):
  image = np.moveaxis(inputs['img_f16'], 1, -1)
  h, w = inputs['img_shape'][:, :, None, None].transpose(1, 0, 2, 3)
  mask = ((np.arange(image.shape[1])[:, None] < h)
          & (np.arange(image.shape[2]) < w))
  yes = np.ones(len(image), bool)
  batch = {'image': image, 'image_mask': mask,
           'masked_text': inputs['language_tokens'].astype(np.int32),
           'masked_text_mask': inputs['language_attention'] > 0,
           'task_mask/mlm': yes, 'task_mask/itm': yes}
  if 'mask_labels' in inputs:
    batch['mlm_labels'] = np.maximum(inputs['mask_labels'], -1)
    batch['itm_labels'] = inputs['next_label']
  return {k: jnp.asarray(v) for k, v in batch.items()}


def variables_of(state, config, model, batch, requests):
  """Our variables, through the door that `convert` uses."""
  shapes = parity.flat(jax.eval_shape(
      lambda: model.init(jax.random.key(0), batch, requests)))
  tensors = mapping.spelled(SOURCE, state, 'pack')
  mapping.check_config(SOURCE.describe(state), config, {
      'vocabulary': ('data.tokenizer.path', 120, {})}, 'pack')
  variables, record = mapping.to_ours(
      SOURCE, tensors, config, {k: x.shape for k, x in shapes.items()},
      'pack')
  assert not record['missing']
  assert record['copies'] == {'mask_l_fc.weight': SOURCE.SIGNATURE[3]}
  assert all(k.endswith('num_batches_tracked') for k in record['surplus'])
  return parity.nested(variables)


def losses_of(outputs, batch):
  """{objective: (sum, weight)} and the total."""
  config = config_lib.get_config('r18')
  found = {}
  for name, (weight, objective) in objectives_lib.build(config).items():
    terms, _ = objective(outputs, batch)
    assert weight == 1 and list(terms) == [name]
    found[name] = terms[name][0] / terms[name][1]
  return found, sum(found.values())


def reference_outputs(outputs, seen, words, copies=2):
  """Our outputs and intermediates under the pack's names and layouts."""
  neck, trunk = seen['neck'], seen['backbone']
  text_last = lambda x, n: np.concatenate([x[:, n:], x[:, :n]], 1)
  nchw = lambda x: np.moveaxis(np.asarray(x), -1, 1)
  pairs = lambda x: np.repeat(np.asarray(x), copies, 0)
  flat = lambda x: pairs(x).reshape(-1, x.shape[-1])
  of = lambda tree: tree['__call__'][0]
  quantised, index = of(neck['words'])
  h, w = index.shape[1:]
  joint = outputs['joint_masked']
  tokens = of(neck['token_norm'])
  fused = text_last(np.asarray(of(seen['encoder'])), h * w)
  masked = np.asarray(joint['mvm_labels']).reshape(-1, h * w)
  return {
      'backbone.layer1': nchw(of(trunk['layer1_1'])),
      'backbone.layer4': nchw(of(trunk)[0]),
      'neck.conv': nchw(pairs(of(neck['conv_norm']))),
      'neck.vq.0': flat(quantised), 'neck.vq.1': flat(index[..., None]),
      'neck.pos_line': flat(of(neck['after'])),
      'neck.gate_fc': nchw(pairs(of(neck['gate_norm']))),
      'neck.0': np.asarray(tokens).reshape(-1, h * w, tokens.shape[-1]),
      'neck.1': flat(of(neck)['mask']),
      'neck.2': np.where(masked < 0, -100, masked),
      'text_embeddings': np.asarray(of(seen['text_embedding'])).reshape(
          -1, *of(seen['text_embedding']).shape[2:]),
      'encoder.layer0.0': text_last(
          np.asarray(of(seen['encoder']['layer0'])), h * w),
      'fusion_feature': fused,
      'mlm_logits_all': fused @ words.T,
      'mlm_logits': np.asarray(joint['mlm_logits']).reshape(-1, 120),
      'mvm_logits': np.asarray(joint['mvm_logits']).reshape(-1, 16),
      'mvm_labels': np.where(masked < 0, -100, masked).ravel(),
      'itm_logits': np.asarray(joint['itm_logits']).reshape(-1, 2)}


GROUPS = {  # name in the table: arrays of out/
    'trunk, stages 1 and 4': ('backbone.layer1', 'backbone.layer4'),
    'neck, convolution': ('neck.conv',),
    'quantised cells': ('neck.vq.0', 'neck.pos_line'),
    'gate logits': ('neck.gate_fc',), 'visual tokens': ('neck.0',),
    'text embeddings': ('text_embeddings',),
    'states of layer 1 and the last': ('encoder.layer0.0', 'fusion_feature'),
    'MLM logits': ('mlm_logits_all', 'mlm_logits'),
    'MVM logits': ('mvm_logits',), 'ITM logits': ('itm_logits',)}
EXACT = ('neck.vq.1', 'neck.1', 'neck.2', 'mvm_labels')


def compare_outputs(note, title, got, losses, total, want, tolerance):
  """Every array below `out/`; what is left over has been forgotten."""
  left = set(want) - {'mvm_drawn_cell', 'mvm_drawn_bernoulli'}
  note(f'{title}: dictionary indices, masks, labels',
       [got[k] for k in EXACT], [want[k] for k in EXACT], 0)
  left -= set(EXACT)
  for group, names in GROUPS.items():
    have = [k for k in names if k in want]
    note(f'{title}: {group}', [got[k] for k in have],
         [want[k] for k in have], tolerance)
    left -= set(have)
  per_pair = want['loss_dict.loss_match']
  logits = got['itm_logits']
  labels = want['itm_labels']
  pair = jax.nn.logsumexp(logits, -1) - logits[np.arange(4), labels]
  note(f'{title}: losses of MLM, MVM, ITM, and total',
       [losses['mlm'], losses['mvm'], losses['itm'], total, pair],
       [want['loss_dict.loss_mlm'], want['loss_dict.loss_mvm'],
        per_pair.mean(), want['total_loss'], per_pair], LOSS)
  left -= {'loss_dict.loss_mlm', 'loss_dict.loss_mvm', 'total_loss',
           'loss_dict.loss_match', 'itm_labels', 'mlm_labels'}
  # Accuracies in percent, and the share of text tokens that are predicted.
  right = lambda name, y: 100 * np.mean(
      (got[name].argmax(-1) == y)[y >= 0]) if (y >= 0).any() else 0.
  words = want['mlm_labels']
  note(f'{title}: accuracies',
       [np.array([right('mlm_logits', words)]),
        np.array([right('mvm_logits', want['mvm_labels'])]),
        np.array([right('itm_logits', labels)]), np.array([np.mean(
            words >= 0)])],
       [want[f'loss_dict.{k}'] for k in ('acc_l', 'acc_v', 'acc_match',
                                         'select')], 1e-4)
  left -= {f'loss_dict.{k}' for k in ('acc_l', 'acc_v', 'acc_match',
                                      'select')}
  assert not left


# --- The whole model --------------------------------------------------------
@pytest.mark.parametrize('name', ['land', 'port'])
def test_pretraining_model_in_eval_mode(pack, note, name):
  state = pack('pretrain_eval', 'state/')
  want = pack('pretrain_eval', f'{name}/out/')
  batch = batch_of(pack('pretrain_eval', f'{name}/in/'))
  np.testing.assert_array_equal(
      np.asarray(batch['mlm_labels']).ravel(),
      np.maximum(want['mlm_labels'], -1))
  config = reference_config()
  model = recorded(config, want['mvm_drawn_cell'],
                   want['mvm_drawn_bernoulli'])
  variables = variables_of(state, config, model, batch, REQUESTS)
  outputs, seen = jax.jit(lambda: model.apply(
      variables, batch, REQUESTS, capture_intermediates=True,
      mutable=['intermediates']))()
  losses, total = losses_of(outputs, batch)
  got = reference_outputs(
      outputs, seen['intermediates'],
      variables['params']['text_embedding']['words']['embedding'])
  compare_outputs(note, f'pretrain_eval, {name}', got, losses, total, want,
                  EVAL)


@pytest.fixture(scope='module')
def step(pack):
  """One training step: config, params, model_state, and what came of it."""
  state = pack('pretrain_train_step', 'state_before/')
  batch = batch_of(pack('pretrain_train_step', 'in/'))
  out = pack('pretrain_train_step', 'out/')
  config = reference_config()
  model = recorded(config, out['mvm_drawn_cell'], out['mvm_drawn_bernoulli'])
  variables = variables_of(state, config, model, batch, REQUESTS)
  params = variables.pop('params')
  objectives = objectives_lib.build(config)
  # Keeps the gradients as they come, before they are clipped.
  keep = optax.GradientTransformation(
      lambda params: params, lambda grads, *_: (grads, grads))
  tx = optax.chain(keep, optim.make_optimizer(
      config.optim, params, lambda count: jnp.asarray(1e-4)))
  start = train_step.TrainState(
      step=jnp.zeros((), jnp.int32), params=params, model_state=variables,
      opt_state=tx.init(params), ema_params=None, rng=jax.random.key(0),
      bad_steps=jnp.zeros((), jnp.int32))

  @jax.jit
  def run(start):
    outputs, seen = model.apply(
        {'params': params, **variables}, batch, REQUESTS, train=True,
        rngs={'dropout': start.rng}, capture_intermediates=True,
        mutable=['intermediates', *variables])
    after, logged = train_step.make_train_step(
        model, objectives, tx, mesh=mesh_of(1),
        shardings=sharding.parameter_specs(params, mesh_of(1)))(start, batch)
    return (outputs, seen['intermediates'], losses_of(outputs, batch),
            after.opt_state[0], after, logged)
  return config, params, variables, run(start)


def test_train_mode_outputs(pack, note, step):
  _, params, _, (outputs, seen, (losses, total), *_) = step
  got = reference_outputs(outputs, seen,
                          params['text_embedding']['words']['embedding'])
  compare_outputs(note, 'pretrain_train_step', got, losses, total,
                  pack('pretrain_train_step', 'out/'), TRAIN)


def test_train_mode_state(pack, note, step):
  """Dictionary and BatchNorm statistics after the step."""
  config, _, variables, (*_, after, _) = step
  got = parity.theirs('soho', config, parity.flat(after.model_state))
  dictionary = pack('pretrain_train_step', 'after_forward/')
  assert len(dictionary) == 4
  for what, names, tolerance in (
      ('counts', ('cluster_size', 'cluster_sum'), BUFFER),
      # Means and sums of features, which differ by as much.
      ('words and sums', ('embed', 'embed_avg'), TRAIN)):
    names = [f'neck.vq.{name}' for name in names]
    note(f'pretrain_train_step: dictionary after the step, {what}',
         [got[k] for k in names], [dictionary[k] for k in names], tolerance)
  # Words without a cell become zero exactly.
  zero = lambda x: ~np.any(x, -1)
  assert zero(dictionary['neck.vq.embed']).sum() == 8
  np.testing.assert_array_equal(zero(got['neck.vq.embed']),
                                zero(dictionary['neck.vq.embed']))
  buffers = {k: v for k, v in pack('pretrain_train_step',
                                   'buffer_after/').items()
             if not k.endswith('num_batches_tracked')
             and not k.startswith('neck.vq')}
  note('pretrain_train_step: BatchNorm statistics after the step',
       [got[k] for k in buffers], list(buffers.values()), EVAL)
  before = parity.theirs('soho', config, parity.flat(variables))
  frozen = [k for k in buffers if k.startswith(('backbone.bn1',
                                                'backbone.layer1'))]
  assert len(frozen) == 10
  for k in buffers:
    assert np.array_equal(got[k], before[k]) == (k in frozen), k


def test_gradients(pack, note, step):
  config, _, _, (_, _, _, grads, _, logged) = step
  want = pack('pretrain_train_step', 'grad/')
  got = parity.theirs('soho', config, parity.flat({'params': grads}))
  # A key's bias moves all logits of a row alike: its gradient is zero.
  names = [k for k in want if not k.endswith('key.bias')
           and k != 'mask_l_fc.weight']
  for k in set(got) - set(want):  # stem and stage 1
    assert k.startswith(('backbone.conv1', 'backbone.bn1',
                         'backbone.layer1')) and not got[k].any(), k
  note(f'pretrain_train_step: gradients of {len(names)} tensors, relative to '
       "each one's maximum", [got[k] for k in names], [want[k] for k in names],
       GRAD, [np.abs(want[k]).max() for k in names])
  norm = pack('pretrain_train_step')['grad_total_norm']
  note('pretrain_train_step: gradient norm, relative', logged['grad_norm'],
       norm, GRAD, norm)


def test_one_optimizer_step(pack, note, step):
  """Clipping to norm 10, AdamW at 1e-4 and, for the trunk, SGD at 1e-2."""
  config, params, _, (*_, after, _) = step
  want = pack('pretrain_train_step', 'param_after/')
  flat = lambda p: parity.theirs('soho', config, parity.flat({'params': p}))
  got, before = flat(after.params), flat(params)
  names = [k for k in want if not k.endswith('key.bias')
           and k != 'mask_l_fc.weight']
  moved = max(np.abs(want[k] - before[k]).max() for k in names)
  assert moved > 1e-4
  note('pretrain_train_step: parameters after one optimizer step',
       [got[k] for k in names], [want[k] for k in names], BUFFER)
  for k in set(got) - set(want):  # frozen: not even decayed
    np.testing.assert_array_equal(got[k], before[k])


def test_optimizer_groups(pack, step):
  """The released builder's optimizer, rate and freezing of each tensor."""
  config, params, *_ = step
  every = pack('pretrain_train_step')
  groups = config.optim.groups
  labels = parity.flat({'params': optim.group_of(params, groups)})
  options = {e.theirs: dict(groups[int(labels[e.ours])][1])
             for e in SOURCE.entries(config) if e.ours in labels}
  names = every['optim_group_names']
  assert set(names) == set(options)
  for name, rate, sgd, trained in zip(
      names, every['optim_group_lr'], every['optim_group_is_sgd'],
      every['optim_group_requires_grad']):
    found = options[str(name)]
    assert trained != bool(found.get('freeze')), name
    if trained:
      assert sgd == (found.get('optimizer') == 'sgd'), name
      np.testing.assert_allclose(
          config.optim.learning_rate * found.get('lr_multiplier', 1.), rate)
      assert found.get('weight_decay', config.optim.weight_decay) == (
          1e-4 if sgd else 1e-2)


# --- The dictionary alone ---------------------------------------------------
@pytest.mark.parametrize('devices, decay', [(1, .4), (1, .99), (2, .4)])
def test_dictionary(pack, note, devices, decay):
  """Four steps and one look; two processes there are two devices here."""
  every = pack('visual_dictionary')
  words = visual_dictionary.VisualDictionary(12, 8, decay=decay)
  book = {'embed': every['embed_init'], 'cluster_size': np.zeros(12),
          'cluster_sum': np.zeros(12), 'embed_avg': np.zeros((12, 8))}
  book = {k: jnp.asarray(v, jnp.float32) for k, v in book.items()}
  place = lambda x: x
  ranks = [f'world1/decay{decay}']
  if devices == 2:
    mesh = mesh_of(2)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P('data')))
    book = jax.device_put(book, NamedSharding(mesh, P()))
    ranks = ['world2/rank0', 'world2/rank1']
  pull = np.concatenate([
      every[f'{rank}/step0/grad_input'] for rank in ranks])

  @jax.jit
  def advance(book, x):
    def f(x):
      (y, index), new = words.apply({'codebook': book}, x, jnp.ones(len(x)),
                                    True, mutable=['codebook'])
      return jnp.sum(pull * y), (y, index, new['codebook'])
    grad, found = jax.grad(f, has_aux=True)(x)
    return (grad, *found)
  indices, floats, buffers = [], [], []
  for i in range(4):
    x = place(every[f'input/step{i}'])
    grad, y, index, book = advance(book, x)
    for r, rank in enumerate(ranks):
      part = slice(r * 40, r * 40 + 40) if devices == 2 else slice(None)
      at = lambda name: every[f'{rank}/step{i}/{name}']  # pylint: disable=cell-var-from-loop
      indices.append((index[part], at('indices')))
      floats += [(y[part], at('quantize')), (grad[part], at('grad_input'))]
      for name, value in book.items():
        if devices == 2:
          # As it lies on this device, not as jax gathers it.
          value = value.addressable_shards[r].data
        buffers.append((value, at(f'{name}_after')))
  y, index = words.apply({'codebook': book}, every['input/step3'],
                         jnp.ones(80))
  for rank in ranks:
    indices.append((index, every[f'{rank}/eval/indices']))
    floats.append((y, every[f'{rank}/eval/quantize']))
  title = f'visual_dictionary, world{devices}, decay {decay}: '
  for what, pairs, tolerance in (
      ('indices', indices, 0),
      ('quantised vectors and straight-through gradients', floats, BUFFER),
      ('words, counts and averages after each of 4 steps', buffers, BUFFER)):
    note(title + what, *map(list, zip(*pairs)), tolerance)


# --- The necks alone --------------------------------------------------------
NECKS = {'gate': {}, 'gate_beginalign': dict(begin_align=True),
         'add': dict(mix='add'), 'add_noposalign_relu_nonorm': dict(
             mix='add', pos_align=False, act='relu', norm=False),
         'vqa': {}}
CASES = ('sq', 'land', 'port', 'tall_mix')


@pytest.mark.parametrize('variant', NECKS)
def test_necks(pack, note, variant):
  every = pack('necks')
  config = reference_config(width=16)
  config.model.neck.update(NECKS[variant])
  config.model.dictionary.size = 0 if variant == 'vqa' else 6
  neck = necks.Neck(16, dict(config.model.dictionary),
                    **config.model.neck)
  variables = {
      e.ours.replace('/neck/', '/'): mapping.FORMS[e.form][0](
          every[f'{variant}/state/{e.theirs.removeprefix("neck.")}'])
      for e in SOURCE.entries(config) if e.theirs.startswith('neck.')}
  stored = {k for k in every if k.startswith(f'{variant}/state/')
            and not k.endswith('num_batches_tracked')}
  assert len(variables) == len(stored)
  variables = parity.nested(variables)

  @jax.jit
  def look(variables, features, mask, draws):
    """The neck's output, tokens and labels for each of the draws."""
    out = neck.apply(variables, features, mask)
    hidden = [necks.same_code_mask(
        out['codes'], out['mask'], jnp.broadcast_to(cell, keep.shape), keep)
              for cell, keep in draws]
    return out, [neck.apply(variables, out['cells'], out['pos'], h,
                            method='tokens') for h in hidden or [None]], [
                                jnp.where(h, out['codes'], -100)
                                for h in hidden]
  exact, close = [], []
  for case in CASES:
    features = np.moveaxis(every[f'{case}/feature_in'], 1, -1)
    mask = _pixels(every, case)

    at = lambda name: every[f'{variant}/{case}/{name}']  # pylint: disable=cell-var-from-loop
    draws = [] if variant == 'vqa' else [
        (at(f'draw{i}/drawn_cell'), at(f'draw{i}/drawn_bernoulli') > 0)
        for i in range(3)]
    out, tokens, labels = look(variables, features, mask, draws)
    exact.append((out['mask'], at('visual_mask') > 0))
    if variant == 'vqa':
      close.append((tokens[0], at('tokens')))
      continue
    exact.append((out['codes'], at('indices')))
    exact += [(x, at(f'draw{i}/mvm_labels')) for i, x in enumerate(labels)]
    close += [(x, at(f'draw{i}/tokens')) for i, x in enumerate(tokens)]
  exact = [(np.asarray(a, np.int64), np.asarray(b, np.int64))
           for a, b in exact]
  note(f'necks, {variant}: valid cells, indices, MVM labels',
       *map(list, zip(*exact)), 0)
  note(f'necks, {variant}: visual tokens', *map(list, zip(*close)), EVAL)


def _pixels(every, case):
  """The mask of the padded batch's pixels."""
  h, w = every[f'{case}/pad_shape'].max(0)
  rows, columns = every[f'{case}/img_shape'].T[:, :, None, None]
  return (np.arange(h)[:, None] < rows) & (np.arange(w) < columns)


def test_grid_masks_and_positions(pack, note):
  every = pack('necks')
  masks, codes = [], []
  code = jax.jit(layers.sine_position_2d, static_argnums=1)
  for case in CASES:
    want = every[f'{case}/grid_mask']
    found = necks.grid_mask(_pixels(every, case), *want.shape[1:],
                            square=True)
    masks.append((np.asarray(found, int), want.astype(int)))
    codes.append((code(want, 16),
                  np.moveaxis(every[f'{case}/position_encoding'], 1, -1)))
  corner = np.zeros((1, 9, 12), bool)
  corner[:, :7, :10] = True
  for name, mask in (('full_9x12', np.ones((1, 9, 12), bool)),
                     ('part_7x10_of_9x12', corner)):
    codes.append((code(mask, 768)[..., ::6],
                  np.moveaxis(every[f'pos768/{name}'], 1, -1)))
  note('necks: grid masks with the released width', *map(list, zip(*masks)), 0)
  note('necks: position codes of 16 and 768 channels', *map(list, zip(*codes)),
       EVAL)


# --- The VQA model: trunk, neck, encoder, head ------------------------------
def test_vqa_model(pack, note):
  """The released head by config, on the state of [CLS]."""
  state, inputs = pack('vqa', 'state/'), pack('vqa', 'in/')
  batch = batch_of(inputs)
  batch |= {k: batch[f'masked_{k}'] for k in ('text', 'text_mask')}
  config = reference_config()
  config.model.dictionary.size = 0
  config.model.heads = {'answer': dict(
      outputs=len(state['head.vqa.3.bias']), act='relu', dropout=0.,
      hidden=len(state['head.vqa.0.bias']), init='kaiming')}
  model = models.build(config, vocab_size=120, num_classes=6,
                       num_attributes=13)
  variables = parity.nested({
      e.ours: mapping.FORMS[e.form][0](state[e.theirs])
      for e in SOURCE.entries(config) if e.theirs in state})
  labels = inputs['vqa_labels'][:, 0]

  def run(params, train=False):
    out, seen = model.apply(
        {'params': params, 'batch_stats': variables['batch_stats']}, batch,
        {'joint': ('answer',)}, train=train, capture_intermediates=True,
        mutable=['batch_stats', 'intermediates'],
        rngs={'dropout': jax.random.key(0)})
    logits = out['joint']['answer_logits'][:, 0]
    loss = (jnp.logaddexp(0., logits) - labels * logits).mean() * 23
    return loss, (logits, seen['intermediates'])
  loss, (logits, seen) = jax.jit(run)(variables['params'])
  want = pack('vqa', 'out/')
  score = np.take_along_axis(labels, np.asarray(logits).argmax(-1)[:, None],
                             1)[:, 0]
  # The joint view computes the states of the text alone: those of the image
  # are asked for by name.
  def states_of(m):
    image = m.encode_image(batch)
    text = m.encode_text(batch['text'], batch['text_mask'])
    return image['mask'], m.fuse(image, text)
  mask, fused = jax.jit(lambda v: model.apply(
      v, method=states_of))(variables)
  states = jnp.concatenate([fused.text, fused.image], 2)[:, 0]
  of = lambda tree: tree['__call__'][0]
  note('vqa: valid cells', np.asarray(mask, int), want['neck.1'], 0)
  note('vqa: trunk, tokens, states, logits, loss, score',
       [np.moveaxis(np.asarray(of(seen['backbone'])[0]), -1, 1),
        of(seen['neck']['token_norm']), states, logits, loss, score],
       [want[k] for k in ('backbone.0', 'neck.0', 'fusion_feature',
                          'vqa_logits', 'loss_dict.loss_cls',
                          'loss_dict.score')], EVAL)
  assert len(want) == 7

  (loss, _), grads = jax.jit(jax.value_and_grad(
      functools.partial(run, train=True), has_aux=True))(variables['params'])
  got = parity.theirs('soho', config, parity.flat({'params': grads}))
  want = pack('vqa', 'train/grad/')
  assert len(want) == 7
  note('vqa, train mode: loss', loss,
       pack('vqa')['train/total_loss'], LOSS)
  note('vqa, train mode: 7 gradients, relative to the maximum',
       [got[k] for k in want], list(want.values()), 1e-4,
       [np.abs(v).max() for v in want.values()])


# --- The trunk of the paper's model -----------------------------------------
@pytest.mark.parametrize('depth', [
    50, pytest.param(101, marks=pytest.mark.slow)])
def test_bottleneck_trunks(pack, note, depth):
  every = pack('resnet_bottleneck')
  state = pack('resnet_bottleneck', f'r{depth}/state/')
  config = parity.resnet_config(depth)
  variables = parity.nested({
      e.ours.replace('/backbone/', '/'): mapping.FORMS[e.form][0](
          state[e.theirs]) for e in resnet_names.entries(config)})
  frozen = ((r'(conv1|bn1|layer1_\d+)/.*', True),)
  trunk = resnet.ResNet(depth, frozen=frozen, stem=8, width=4,
                        out_stages=(1, 2, 3, 4), mask_padding=False)
  pixels = jnp.moveaxis(every['img_f16'], 1, -1)

  @jax.jit
  def run():
    train, new = trunk.apply(variables, pixels, True,
                             mutable=['batch_stats'])
    return trunk.apply(variables, pixels), train, new
  still, train, new = run()
  nchw = lambda x: np.moveaxis(np.asarray(x), -1, 1)
  title = f'resnet_bottleneck, ResNet-{depth}: '
  note(title + 'features of 4 stages, eval mode', [nchw(x) for x in still],
       [every[f'r{depth}/eval/stage{i}'] for i in range(4)], EVAL)
  note(title + 'last features, train mode', nchw(train[-1]),
       every[f'r{depth}/train/stage3'], 5e-4)
  new = parity.flat({'batch_stats': {'backbone': new['batch_stats']}})
  got = {e.theirs: new[e.ours] for e in resnet_names.entries(config)
         if e.ours in new}
  want = {k: v for k, v in pack(
      'resnet_bottleneck', f'r{depth}/train/buffer_after/').items()
          if not k.endswith('num_batches_tracked')}
  assert want and set(want) <= set(got)
  note(title + 'BatchNorm statistics after a step', [got[k] for k in want],
       list(want.values()), 5e-4)
