"""FIBER's coarse stage equals the original code (microsoft/FIBER).

The reference arrays come from the original on CPU with random weights: all 12
text layers and 24 image blocks, narrow. What is not compared, and why, stands
in docs/fiber.md.
"""
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fiber as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.models import fiber
from e2e_vlp_jax.models import beam_search
from e2e_vlp_jax.models import swin
from e2e_vlp_jax.objectives import captioning
from e2e_vlp_jax.objectives import itc
from e2e_vlp_jax.objectives import itm
from e2e_vlp_jax.objectives import mlm
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.weights import fiber_coarse
from e2e_vlp_jax.weights import mapping
from tests import parity

pytestmark = pytest.mark.large
AGAINST = 'the original code (stored)'
VOCABULARY, QUEUE = 120, 8
FEATURES, LOGITS = 1e-4, 5e-5  # the reference's tolerances


@pytest.fixture(scope='module')
def reference(shared):
  """name -> {array name: array} of the reference pack."""
  @functools.lru_cache(None)
  def load(name):
    path = shared / 'reference' / 'fiber_coarse' / f'{name}.npz'
    with np.load(path, allow_pickle=False) as f:
      return {k: f[k] for k in f.files}
  return load


def reference_config(window=3, queue=0, dtype='float32'):
  config = config_lib.get_config(f'base,queue={queue}')
  config.dtype = dtype
  config.model.remat = 'none'
  config.model.swin.update(dict(width=8, heads=(1, 2, 4, 8), window=window))
  config.model.roberta.update(dict(width=40, heads=4, ffn=160, positions=24))
  # Its images are normalised already.
  config.model.update(dict(width=40, image_mean=(0., 0., 0.),
                           image_std=(1 / 255,) * 3))
  return config


def build(config):
  return models.build(config, vocab_size=VOCABULARY, num_classes=3,
                      num_attributes=0)


def variables_of(config, tensors):
  """Our variables from the original's tensors, float type kept."""
  out = {}
  for e in fiber_coarse.entries(config):
    if e.theirs in tensors:
      out[e.ours] = mapping.FORMS[e.form][0](tensors[e.theirs])
  if not config.model.queue:
    # The parameters are those of the code with a queue.
    out['params/logit_scale'] = np.float32(np.log(1 / .07))
  return parity.nested(jax.tree.map(jnp.asarray, out))


def queue_state(inputs, total):
  nhwc = inputs['queue_image_input'].transpose(0, 2, 3, 1)
  return {'queue': {'queue': {
      'image_features': inputs['queue_image_feat'].T,
      'text_features': inputs['queue_text_feat'].T,
      'image': nhwc, 'image_mask': np.ones(nhwc.shape[:3], bool),
      'text': inputs['queue_text_ids'].astype(np.int32),
      'text_mask': inputs['queue_text_masks'] > 0,
      'count': np.int32(total)}}}


def batch_of(inputs, image='image', rows=slice(None)):
  """The pack's inputs as the pipeline's batch."""
  pixels = inputs[image].transpose(0, 2, 3, 1)
  b = len(pixels)
  text = lambda k: jnp.asarray(inputs[k][:b, None].astype(np.int32))
  mask = jnp.asarray(inputs['text_masks'][:b, None] > 0)
  labels = inputs['text_labels_mlm'][:b, None]
  yes = jnp.ones(b, bool)
  batch = {
      'image': pixels, 'image_mask': np.ones(pixels.shape[:3], bool),
      'text': text('text_ids'), 'text_mask': mask,
      'masked_text': text('text_ids_mlm'), 'masked_text_mask': mask,
      'mlm_labels': np.where(labels < 0, -1, labels).astype(np.int32),
      'itm_labels': np.ones((b, 1), np.int32),
      'task_mask/mlm': yes, 'task_mask/itm': yes, 'task_mask/captioning': yes}
  return jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)


# Which call of a module belongs to which view, when all run at once: below
# the pairs and in them, of the image and of the text trunk.
CALLS = {'dual': (0, 0, 1, 1), 'caption': (0, 0, 0, 0),
         'fused': (0, 1, 1, 2), 'fused_mlm': (0, 2, 2, 3)}
VIEWS = {'image_only': ('itc', 'captioning'), 'text_only': ('itc',),
         'joint': ('itm',), 'joint_masked': ('mlm',)}


def of_view(seen, view, path):
  """What the module at `path` returned in `view`."""
  calls = seen[path]
  trunk = path.split('/')[0]
  if trunk not in ('swin', 'text'):
    return calls[0]
  image_low, image_high, text_low, text_high = CALLS[view]
  if trunk == 'swin':
    upper = re.match(r'swin/(blocks_2_1[4-7]|blocks_3_|merges_2)', path)
    return calls[image_high if upper else image_low]
  return calls[text_high if re.match(r'text/layers_([6-9]|1[01])\b', path)
               else text_low]


def compare(record_property, title, pairs, tolerance):
  """One row for several (ours, theirs)."""
  worst = 0.
  for name, (a, b) in pairs.items():
    a = np.asarray(a)
    assert a.size == np.size(b), (name, a.shape, np.shape(b))
    worst = max(worst, np.abs(a.reshape(np.shape(b)) - b).max())
  assert pairs
  parity.note(record_property, f'FIBER coarse, {title}', AGAINST, worst,
              tolerance)


def wide(tree):
  """Its float32 arrays in float64; within jax.enable_x64."""
  return jax.tree.map(
      lambda x: jnp.asarray(x, 'float64') if x.dtype == np.float32
      else jnp.asarray(x), tree)


@pytest.fixture(scope='module')
def plain(reference):
  """(model, variables, batch) without a queue."""
  config = reference_config()
  return (build(config), variables_of(config, reference('params')),
          batch_of(reference('inputs')))


@pytest.fixture(scope='module')
def queued(reference):
  """(model, variables, batch) with the reference's queue."""
  config = reference_config(queue=QUEUE)
  inputs = reference('inputs')
  return (build(config), {**variables_of(config, reference('params')),
                          **queue_state(inputs, inputs['queue_total'])},
          batch_of(inputs))


@pytest.fixture(scope='module')
def look(plain):
  """batch -> (outputs, {path: what a module returned at each call})."""
  model, variables, _ = plain
  run = jax.jit(lambda b: model.apply(
      variables, b, VIEWS, mutable=['intermediates'],
      capture_intermediates=True))

  def look(batch):
    out, found = run(batch)
    found = parity.flat(found['intermediates'])
    return out, {k.removesuffix('/__call__'): v for k, v in found.items()
                 if k.endswith('/__call__')}
  return look


@pytest.fixture(scope='module')
def seen(plain, look):
  return look(plain[2])


def depth_pairs(want, view, seen):
  """Every array of features.npz of `view` that is a module's output."""
  pairs = {}
  for name, x in want.items():
    if not name.startswith(view + '.'):
      continue
    ours = name.removeprefix(view + '.')
    for pattern, path in (
        (r'img\.patch_embed', 'swin/patch_norm'),
        (r'img\.stage(\d+)\.block(\d+)', r'swin/blocks_\1_\2'),
        (r'img\.stage(\d+)\.downsample', r'swin/merges_\1'),
        (r'img\.final_norm', 'swin/norm'),
        (r'txt\.embeddings', 'text/embedding'),
        (r'txt\.layer(\d+)', r'text/layers_\1')):
      if re.fullmatch(pattern, ours):
        pairs[name] = of_view(seen, view, re.sub(pattern, path, ours)), x
  return pairs


# --- Features ---------------------------------------------------------------
def test_trunk_runs_once(seen):
  """What the views share is computed once, the pairs once a view."""
  _, seen = seen
  assert len(seen['swin/blocks_2_13']) == 1
  assert len(seen['swin/blocks_2_14']) == 3  # alone, joint, joint_masked
  assert len(seen['text/layers_0']) == 3  # text, masked text, causal text


def test_dual_features(record_property, reference, plain, seen):
  want = reference('features')
  out, seen = seen
  pairs = depth_pairs(want, 'dual', seen)
  assert len(pairs) == 1 + 24 + 3 + 1 + 1 + 12
  model, variables, _ = plain
  pairs['text_feats'] = model.apply(
      variables, of_view(seen, 'dual', 'text/layers_11'),
      method=lambda m, x: m.itc_text_projection(x)), want['dual.text_feats']
  pairs['image_feats'] = (seen['itc_image_projection'][0],
                          want['dual.image_feats'])
  compare(record_property, 'dual encoder: every block and layer, '
          'projections', pairs, FEATURES)
  compare(record_property, 'dual encoder: embeddings', {
      'image': (out['image_only']['image_embedding'],
                want['dual.image_cls']),
      'text': (out['text_only']['text_embedding'], want['dual.text_cls'])},
          LOGITS)


def test_fused_features(record_property, reference, plain, seen):
  want = reference('features')
  model, variables, _ = plain
  _, seen = seen
  pairs = depth_pairs(want, 'fused', seen)
  assert len(pairs) == 1 + 24 + 3 + 1 + 12
  for k, view in enumerate(('fused', 'fused_mlm')):
    text = seen['text_projection'][k + 1]
    image = seen['image_projection'][k]
    pairs |= {f'{view} text': (text, want[f'{view}.text_feats']),
              f'{view} image': (image, want[f'{view}.image_feats'])}
    if view == 'fused':
      pairs['pair'] = (model.apply(variables, text, image, None, method='pool'),
                       want['fused.cls_feats'])
  compare(record_property, 'fusion encoder: every block and layer, '
          'projections, pooled pair', pairs, FEATURES)


def test_caption_features(record_property, reference, plain, seen):
  want = reference('features')
  model, variables, batch = plain
  _, seen = seen
  pairs = depth_pairs(want, 'caption', seen)
  assert len(pairs) == 1 + 12
  text = seen['text_projection'][0]
  image = seen['swin/blocks_3_1'][0]
  pairs |= {
      'image': (image, want['caption.image_embeds']),
      'text_feats': (text, want['caption.text_feats']),
      'cls_feats': (model.apply(
          variables, text, method=lambda m, x: jnp.tanh(
              m.text_pooler(x[:, 0]))), want['caption.cls_feats'])}
  # Without a mask our positions count padding too, as nothing says what it
  # is; no token before it is changed by that.
  valid = batch['text_mask'][:, 0]
  states = jax.jit(lambda: model.apply(
      variables, image.reshape(len(valid), -1, image.shape[-1]),
      batch['text'], batch['text_mask'] | True, method='decode'))()
  pairs['no mask'] = (states[:, 0][valid],
                      want['caption_nopadmask.text_feats'][valid])
  compare(record_property, 'captioner: every layer, projections', pairs,
          FEATURES)


def test_block_internals(record_property, reference, seen):
  want = reference('block_internals')
  get = functools.partial(of_view, seen[1], 'fused')
  pairs = {}
  for name, path in (('S2B15', 'swin/blocks_2_15'),
                     ('S3B0', 'swin/blocks_3_0')):
    ours = {'norm1': 'norm1', 'attn.qkv': 'attention/qkv',
            'attn.proj': 'attention/out', 'norm2': 'norm2', 'mlp': 'ffn'}
    pairs |= {f'{name}.{k}': (get(f'{path}/{v}'), want[f'{name}.{k}'])
              for k, v in ours.items()}
    # Cross-attention has a first call less: the dual encoder skips it.
    ours = {'attn.norm_i2t_i': 'norm', 'attn.qkv_i2t': 'query',
            'attn.qkv_text_i2t': 'key_value', 'attn.proj_i2t': 'out'}
    pairs |= {f'{name}.{k}': (seen[1][f'{path}/cross/{v}'][0],
                              want[f'{name}.{k}']) for k, v in ours.items()}
    both = np.asarray(get(f'{path}/attention'))
    both = both + np.asarray(seen[1][f'{path}/cross'][0]).reshape(both.shape)
    pairs[f'{name}.attn'] = both, want[f'{name}.attn']
  for name, path in (('T7', 'text/layers_7'), ('T11', 'text/layers_11')):
    # Calls with an image: captioner, joint, joint_masked.
    cross = lambda k, path=path: seen[1][f'{path}/cross/attention{k}'][1]
    pairs |= {
        f'{name}.self_attn_out': (get(f'{path}/self_attention'),
                                  want[f'{name}.self_attn_out']),
        f'{name}.cross.query': (cross('/query'), want[f'{name}.cross.query']),
        f'{name}.cross.key': (cross('/key'), want[f'{name}.cross.key']),
        f'{name}.cross.value': (cross('/value'), want[f'{name}.cross.value']),
        f'{name}.cross.out': (cross(''), want[f'{name}.cross.out']),
        f'{name}.post_attn_layernorm': (get(f'{path}/norm1'),
                                        want[f'{name}.post_attn_layernorm']),
        f'{name}.intermediate': (
            jax.nn.gelu(get(f'{path}/ffn/in'), approximate=False),
            want[f'{name}.intermediate'])}
  assert set(pairs) == set(want)
  compare(record_property, 'inside two image blocks and two text layers',
          pairs, FEATURES)


# --- Losses -----------------------------------------------------------------
OBJECTIVES = {'mlm': mlm.Objective(), 'itc': itc.Objective(unfilled=True),
              'itm': itm.Objective(view='hard_negative')}
REQUESTS = {'image_only': ('itc',), 'text_only': ('itc',),
            'joint_masked': ('mlm',), 'hard_negative': ('itm',)}


def value(objective, outputs, batch):
  """The loss of one objective."""
  losses, _ = objective(outputs, batch)
  return sum(s / w for s, w in losses.values())


def losses(model, variables, batch):
  """(outputs, {name: loss})."""
  out = model.apply(variables, batch, REQUESTS)
  return out, {k: value(f, out, batch) for k, f in OBJECTIVES.items()}


def gradients(queued):
  """params -> ((sum of the losses, (outputs, {name: loss})), its gradients).

  One program for all: its forward pass is what `losses` alone would compile.
  tests/test_parity_optim.py runs the same one.
  """
  model, variables, batch = queued

  def total(params):
    out, terms = losses(model, {**variables, 'params': params}, batch)
    return sum(terms.values()), (out, terms)
  return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.fixture(scope='module')
def trained(queued):
  """(outputs, {name: loss}, sum of the losses, its gradients {path: array})."""
  (loss, (out, terms)), grads = gradients(queued)(queued[1]['params'])
  return out, terms, loss, parity.flat({'params': grads})


@pytest.fixture(scope='module')
def step(trained):
  return trained[:2]


def itc_arrays(out):
  """Similarities and sampling weights from the outputs, as the pack's."""
  image = np.asarray(out['image_only']['image_embedding'])
  text = np.asarray(out['text_only']['text_embedding'])[:, 0]
  scale = out['text_only']['itc_scale']
  i2t = image @ np.concatenate([text, out['text_only']['text_queue']]).T
  t2i = text @ np.concatenate([image, out['image_only']['image_queue']]).T
  found = {'itc.temp': 1 / scale, 'itc.sim_i2t': scale * i2t,
           'itc.sim_t2i': scale * t2i,
           'itc.sim_inbatch_untempered': image @ text.T}
  return found


def head_arrays(out, terms):
  return {
      'mlm.logits': out['joint_masked']['mlm_logits'],
      'mlm.loss': terms['mlm'], 'itc.loss': terms['itc'],
      'itm_hardneg.logits': out['hard_negative']['itm_logits'].swapaxes(0, 1),
      'itm_hardneg.labels': out['hard_negative']['itm_labels'].swapaxes(0, 1),
      'itm_hardneg.loss': terms['itm'],
      'pretrain.total_loss': sum(terms.values()),
      'pretrain.loss_terms': np.array([terms[k]
                                       for k in ('mlm', 'itc', 'itm')]),
      **itc_arrays(out)}


@pytest.mark.slow
def test_losses(record_property, reference, step):
  want = reference('losses_heads')
  got = head_arrays(*step)
  # What the queue holds before it is filled is noise six times as long as a
  # feature, and so is the rounding of similarities with it.
  filled = len(got['itc.sim_i2t']) + reference('inputs')['queue_total']
  for title, pattern, columns, tolerance in (
      ('MLM logits and loss', r'mlm\..*', None, LOGITS),
      ('ITC with queue: temperature, loss, cosines',
       r'itc\.(temp|loss|sim_inb.*)', None, LOGITS),
      ('ITC with queue: similarities', r'itc\.sim_[it]2[it]',
       slice(filled), LOGITS),
      ('ITC with queue: similarities with its noise', r'itc\.sim_[it]2[it]',
       slice(filled, None), FEATURES),
      ('ITM on hard negatives: logits, labels, loss', r'itm_hardneg\..*',
       None, LOGITS),
      ('pre-training: three losses and their sum', r'pretrain\..*', None,
       LOGITS)):
    cut = lambda x, c=columns: np.asarray(x) if c is None else x[:, c]
    compare(record_property, title, {
        k: (cut(x), cut(want[k])) for k, x in got.items()
        if re.fullmatch(pattern, k)}, tolerance)


@pytest.mark.slow
def test_negatives(record_property, reference, step):
  """By what weights negatives are drawn, and which is the likeliest."""
  want = reference('losses_heads')
  filled = np.asarray(step[0]['text_only']['queue_filled'])
  got = itc_arrays(step[0])
  b = len(got['itc.sim_t2i'])
  allowed = np.concatenate([np.ones(b, bool), filled])
  own = np.eye(b, len(allowed), dtype=bool)
  pairs = {}
  for side, index in (('t2i', 'image'), ('i2t', 'text')):
    logits = np.asarray(fiber.negatives(got[f'itc.sim_{side}'], allowed, own))
    assert (logits.argmax(1) == want[f'itc.neg_{index}_idx_argmax']).all()
    weights = np.exp(logits)[:, allowed]
    expected = want[f'itc.weights_{side}_plus_eps']
    assert np.allclose(expected[own[:, allowed]], 1e-9)
    pairs[side] = weights, np.where(own[:, allowed], 0, expected)
  compare(record_property, 'weights of hard negatives', pairs, LOGITS)


@pytest.fixture(scope='module')
def all_pairs(plain):
  """images -> ITM logits [4, 4, 2] of them with all texts (S = 4)."""
  model, variables, batch = plain
  b = batch['text'].shape[0]
  each = lambda x: jnp.broadcast_to(x[:, 0], (b, *x[:, 0].shape))
  batch = {**batch, 'text': each(batch['text']),
           'text_mask': each(batch['text_mask'])}
  score = jax.jit(lambda images: model.apply(
      variables, {**batch, 'image': images}, {'joint': ('itm',)}))
  return lambda images: np.asarray(score(images)['joint']['itm_logits'])


@pytest.mark.slow
def test_matching_scores(record_property, reference, plain, all_pairs):
  want = reference('losses_heads')
  logits = all_pairs(plain[2]['image'])
  matched = np.einsum('bbk->bk', logits)
  compare(record_property, 'ITM scores of matched and of all pairs', {
      'matched': (matched, want['itm.logits_matched']),
      'rank': (matched[:, 1], want['itm.rank_output']),
      'matrix': (logits[..., 1], want['itm.rank_matrix_image_by_text'])},
          LOGITS)


@pytest.mark.slow
def test_random_negatives(record_property, reference, plain, all_pairs):
  """ITM alone, with pairs that the input pipeline has mixed."""
  want, inputs = reference('losses_heads'), reference('inputs')
  batch = plain[2]
  labels = want['itm_random.labels'].astype(np.int32)
  logits = np.einsum('bbk->bk', all_pairs(jnp.where(
      labels[:, None, None, None] == 1, batch['image'],
      batch_of(inputs, 'false_image')['image'])))
  loss = value(itm.Objective(view='joint'),
               {'joint': {'itm_logits': logits[:, None]}},
               {**batch, 'itm_labels': labels[:, None]})
  compare(record_property, 'ITM on random negatives', {
      'logits': (logits, want['itm_random.logits']),
      'loss': (loss, want['itm_random.loss'])}, LOGITS)


def test_answers(record_property, reference):
  """VQA and NLVR2: the released heads by config, on pooled pairs."""
  want, inputs = reference('losses_heads'), reference('inputs')
  tensors = reference('params')
  config = reference_config()
  head = lambda name, **more: dict(
      hidden=len(tensors[f'{name}_classifier.0.bias']), norm=True, act='gelu',
      outputs=len(tensors[f'{name}_classifier.3.bias']), init='bert', **more)
  config.model.heads = {'answer': head('vqa'),
                        'reason': head('nlvr2', views=('pair',))}
  model = build(config)
  batch = batch_of(inputs)
  second = batch_of(inputs, 'image_1')
  batch |= {f'second_{k}': second[k] for k in ('image', 'image_mask')}
  out = jax.jit(lambda v: model.apply(v, batch, {
      'joint': ('answer',), 'pair': ('reason',)}))(
          variables_of(config, tensors))
  vqa = np.asarray(out['joint']['answer_logits'])[:, 0]
  two = np.asarray(out['pair']['reason_logits'])[:, 0]
  logp = np.asarray(jax.nn.log_softmax(two))
  targets = inputs['vqa_targets']
  compare(record_property, 'VQA and NLVR2: logits, losses, score', {
      'vqa': (vqa, want['vqa.logits']),
      'vqa loss': (targets.shape[1] * (np.logaddexp(0, vqa) - vqa * targets
                                       ).mean(), want['vqa.loss']),
      'score': (targets[range(4), vqa.argmax(1)].mean(), want['vqa.score']),
      'nlvr2': (two, want['nlvr2.logits']),
      'nlvr2 loss': (-logp[range(4), inputs['nlvr2_labels']].mean(),
                     want['nlvr2.loss'])}, LOGITS)


@pytest.mark.slow
def test_gradients(record_property, reference, trained):
  """Of the sum of the three losses, for every tensor that has one."""
  want = dict(reference('grads_pretrain'))
  without = want.pop('__names_without_grad')
  assert not want.pop('__names_with_zero_grad').size
  total = want.pop('__total_loss')
  _, _, loss, grads = trained
  assert abs(loss - total) < LOGITS
  ours = theirs(grads)
  assert set(want) == {k for k, x in ours.items() if np.any(x)}
  # The captioner's projections take no part, and have no gradient here.
  assert all(any(re.fullmatch(p, name) for p, _ in fiber_coarse.SURPLUS)
             for name in without)
  largest = max(np.abs(x).max() for x in want.values())
  worst = 0.
  for name, x in want.items():
    y = ours[name]
    if name.endswith('.self.key.bias'):  # zero but for rounding
      assert max(np.abs(x).max(), np.abs(y).max()) < 1e-5 * largest
      continue
    worst = max(worst, np.abs(x - y).max() / np.abs(x).max())
  parity.note(record_property, f'FIBER coarse, gradients of {len(want)} '
              'tensors, relative to each one\'s maximum', AGAINST, worst, 1e-4)


def theirs(variables):
  """{original name: array} of our variables or gradients."""
  config = reference_config(queue=QUEUE)
  return {e.theirs: mapping.FORMS[e.form][1](np.asarray(variables[e.ours]))
          for e in fiber_coarse.entries(config) if e.ours in variables}


@pytest.mark.slow
def test_global_batch(record_property, reference, plain, compiles_much):
  """Two ranks of the earlier code, which gathers the batch, are two devices.

  There every rank has its own pairs first.
  """
  want = reference('itc_itm_allgather_variant')
  model, variables, batch = plain
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
  split, same = (jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)) for axes in (('data',), ()))
  batch = jax.device_put(batch, split)
  wanted = {k: v for k, v in REQUESTS.items() if k != 'joint_masked'}

  @jax.jit
  def run(params):
    def contrast(params):
      out = model.apply({'params': params}, batch, wanted)
      return value(itc.Objective(), out, batch), out
    (loss, out), grads = jax.value_and_grad(contrast, has_aux=True)(params)
    per_pair = out['hard_negative']['itm_logits']
    ranks = per_pair.reshape(2, 2, 3, 2)
    labels = out['hard_negative']['itm_labels'].reshape(2, 2, 3)
    return out, loss, ranks, labels, grads
  out, loss, logits, labels, grads = run(jax.device_put(
      variables['params'], same))
  image = np.asarray(out['image_only']['image_embedding'])
  text = np.asarray(out['text_only']['text_embedding'])[:, 0]
  scale = float(out['text_only']['itc_scale'])
  logp = jax.nn.log_softmax(logits)
  pairs, gaps = {}, {}
  for r in (0, 1):
    order = np.roll(np.arange(4), -2 * r)
    pairs[f'{r} logits'] = (scale * image[order] @ text[order].T,
                            want[f'rank{r}.itc_logits_i2t'])
    pairs[f'{r} loss'] = loss, want[f'rank{r}.itc_loss']
    pairs[f'{r} scale'] = scale, want[f'rank{r}.logit_scale_exp']
    # Theirs: matched, negative image, negative text; ours has texts first.
    mine = lambda x, r=r: np.swapaxes(x[r], 0, 1)[jnp.array([0, 2, 1])]
    pairs[f'{r} itm'] = mine(logits), want[f'rank{r}.itm_logits']
    assert (mine(labels).ravel() == want[f'rank{r}.itm_labels']).all()
    own = np.take_along_axis(np.asarray(logp[r]), np.asarray(
        labels[r])[..., None], -1)
    pairs[f'{r} itm loss'] = -own.mean(), want[f'rank{r}.itm_loss']
    for side, sims in (('image', text @ image.T), ('text', image @ text.T)):
      index = np.asarray(fiber.negatives(
          scale * sims, np.ones(4, bool), np.eye(4, dtype=bool))).argmax(1)
      found = order[want[f'rank{r}.neg_{side}_idx_argmax']]
      assert (index[order[:2]] == found).all()
  compare(record_property, 'global batch on two devices: similarities, '
          'losses, matching of the negatives', pairs, LOGITS)
  # Gathered features carry no gradient there: of the sum of the ranks each
  # has a part, and the scale, which every rank has whole, once.
  found = theirs(parity.flat({'params': grads}))
  for name in ('image', 'text'):
    name = f'cross_modal_{name}_pooler_itc.dense.weight'
    x = sum(want[f'rank{r}.grad_itc.{name}'] for r in (0, 1))
    gaps[name] = found[name] / np.abs(x).max(), x / np.abs(x).max()
  x = want['rank0.grad_itc.logit_scale']
  gaps['scale'] = np.asarray(grads['logit_scale']) / abs(x), x / abs(x)
  compare(record_property, 'global batch on two devices: gradients of ITC, '
          'relative', gaps, 1e-4)


def test_queue_moves_on(record_property, reference):
  """Two times four items into a queue of eight; the first wraps."""
  want, inputs = reference('queue_update'), reference('inputs')
  module = fiber.feature_queue.Queue(QUEUE)
  state = {'queue': queue_state(inputs, inputs['queue_total'])['queue'][
      'queue']}
  nhwc = lambda k: inputs[k].transpose(0, 2, 3, 1)
  pairs = {}
  for k, (image, order) in enumerate((('image', 1), ('image_1', -1))):
    new = {'image_features': want[f'step{k}.in_image_feat'],
           'text_features': want[f'step{k}.in_text_feat'],
           'image': nhwc(image), 'image_mask': np.ones((4, 96, 96), bool),
           'text': inputs['text_ids'][::order].astype(np.int32),
           'text_mask': inputs['text_masks'][::order] > 0}
    _, state = module.apply(*jax.tree.map(jnp.asarray, (state, new)), True,
                            mutable=['queue'])
    q = state['queue']
    assert q['count'] % QUEUE == want[f'step{k}.ptr'][0]
    assert q['count'] == want[f'step{k}.total'][0]
    pairs |= {f'{k} {name}': (x, want[f'step{k}.{name}']) for name, x in {
        'image_queue': q['image_features'].T,
        'text_queue': q['text_features'].T, 'text_input_queue': q['text'],
        'text_input_mask_queue': q['text_mask'].astype(int),
        'image_input_queue_mean_per_slot': q['image'].mean((1, 2, 3)),
    }.items()}
  compare(record_property, 'queue: features and inputs after two updates',
          pairs, 1e-6)


@pytest.mark.slow
def test_double_precision(record_property, reference, compiles_much):
  """In float64 nothing hides behind rounding: eps and GELU variants show."""
  want, inputs = reference('float64'), reference('inputs')
  with jax.enable_x64(True):
    config = reference_config(queue=QUEUE, dtype='float64')
    model = build(config)
    state = wide(queue_state(inputs, inputs['queue_total']))
    batch = wide(batch_of(inputs))
    variables = {**wide(variables_of(config, reference('params'))), **state}
    head = {**reference('params'), **reference('captioner_params')}
    head = wide(variables_of(config, head))['params']
    wanted = {**REQUESTS, 'image_only': ('itc', 'captioning'),
              'joint': ('itm',)}

    def total(params):
      out, seen = model.apply({**variables, 'params': params}, batch, wanted,
                              mutable=['intermediates'],
                              capture_intermediates=True)
      terms = {k: value(f, out, batch) for k, f in OBJECTIVES.items()}
      return sum(terms.values()), (
          out, terms, parity.flat(seen['intermediates']))
    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (out, terms, seen)), grads = run(variables['params'])
    # Calls of the shared projections: captioner, joint, ...
    text = seen['text_projection/__call__']
    image = seen['image_projection/__call__'][0]
    got = {f'losses_heads/{k}': x for k, x in head_arrays(out, terms).items()}
    matched = out['joint']['itm_logits']
    got |= {
        'losses_heads/itm.logits_matched': matched,
        'losses_heads/itm.rank_output': matched[..., 1],
        'features/dual.image_cls': out['image_only']['image_embedding'],
        'features/dual.text_cls': out['text_only']['text_embedding'],
        'features/fused.text_feats': text[1],
        'features/fused.image_feats': image,
        'features/fused.cls_feats': model.apply(variables, text[1], image,
                                                None, method='pool'),
        'features/caption.text_feats': text[0]}
    for name, o in (('mle', out), ('head_mle', run(head)[0][1][0])):
      got |= {f'captioning/{name}.logits': o['image_only']['caption_logits'],
              f'captioning/{name}.loss': value(captioning.Objective(), o,
                                               batch)}
  assert all(np.asarray(x).dtype in (np.float64, np.int32, np.int64)
             for x in got.values())
  compare(record_property, 'float64: features, logits, losses',
          {k: (x, want[k]) for k, x in got.items()}, 1e-9)
  grads = theirs(parity.flat({'params': grads}))
  compare(record_property, 'float64: L2 norms of 657 gradients', {
      name: (np.linalg.norm(grads[name]), x)
      for name, x in zip(want['grads_pretrain/names'],
                         want['grads_pretrain/l2'])}, 1e-9)


# --- Captions ---------------------------------------------------------------
@pytest.fixture(scope='module')
def captioner(reference):
  config = reference_config()
  return variables_of(config, {**reference('params'),
                               **reference('captioner_params')})


@pytest.mark.slow
def test_captions_teacher_forced(record_property, reference, plain,
                                 captioner, compiles_much):
  """Ours in float64: in float32, two processors differ by 1e-5 themselves."""
  want = reference('captioning')
  _, variables, batch = plain
  pairs = {}
  with jax.enable_x64(True):
    model = build(reference_config(dtype='float64'))
    run = jax.jit(lambda v: model.apply(v, batch,
                                        {'image_only': ('captioning',)}))
    for name, v in (('mle', variables), ('head_mle', captioner)):
      out = run(wide(v))
      pairs |= {
          f'{name}.logits': (out['image_only']['caption_logits'],
                             want[f'{name}.logits']),
          f'{name}.loss': (value(captioning.Objective(), out, batch),
                           want[f'{name}.loss'])}
  compare(record_property, 'captions, teacher-forced: logits and loss', pairs,
          LOGITS)
  labels = np.where(batch['text_mask'], batch['text'], -100)[:, 0, 1:]
  assert (labels == want['mle.labels'][:, :-1]).all()


@pytest.mark.slow
def test_beam_search(record_property, reference, plain, captioner,
                     compiles_much):
  want, inputs = reference('captioning'), reference('inputs')
  model = plain[0]
  search = jax.jit(lambda v, b: beam_search.generate(
      model, v, b, cls_id=0, sep_id=2, pad_id=1, max_length=16, beams=5,
      mask_id=119)[0])
  other = 0
  for image, name in (('image', 'beam'), ('image_1', 'beam_image_1')):
    tokens = np.asarray(search(captioner, batch_of(inputs, image)))[:, 1:]
    expected = want[f'{name}.best_text_ids_without_bos']
    other += (np.where(tokens == 2, 1, tokens) != expected).sum()
  parity.note(record_property, 'FIBER coarse, beam search of width 5: tokens '
              'of 8 captions that differ', AGAINST, other, 0)


# --- Resolution -------------------------------------------------------------
def test_tables_of_relative_positions_resized(record_property, reference):
  want = reference('resolution_change')
  tables = [want[k] for k in ('table_384', 'table_384_to_576',
                              'table_384_to_576_to_384')]
  compare(record_property, 'relative positions, 384 -> 576 -> 384 pixels', {
      str(i): (swin.resize_relative_bias(a, len(b)), b)
      for i, (a, b) in enumerate(zip(tables, tables[1:]))}, 2e-5)


@pytest.mark.slow
def test_resolution_change(record_property, reference, compiles_much):
  """Weights of 96 pixels at 128: windows of 4 instead of 3."""
  want, inputs = reference('resolution_change'), reference('inputs')
  config = reference_config(window=4)
  model = build(config)
  batch = batch_of(inputs, 'image_128')
  wanted = {'image_only': ('itc',), 'joint': ('itm',)}
  shapes = jax.eval_shape(lambda: model.init(
      jax.random.key(0), batch, wanted))['params']
  params = models.adapt(model, variables_of(config, reference('params'))[
      'params'], shapes)
  tensors = theirs(parity.flat({'params': params}))
  pre = 'adapted_96_to_128.'
  compare(record_property, 'relative positions, 96 -> 128 pixels', {
      k: (tensors[k.removeprefix(pre)], x) for k, x in want.items()
      if k.startswith(pre)}, 2e-5)

  out, seen = jax.jit(lambda: model.apply(
      {'params': params}, batch, wanted, mutable=['intermediates'],
      capture_intermediates=True))()
  seen = parity.flat(seen['intermediates'])
  get = lambda k: seen[f'{k}/__call__'][0]
  text, image = get('text_projection'), get('image_projection')
  compare(record_property, 'another resolution: dual and fused features', {
      'fused text': (text, want['fused128.text_feats']),
      'fused image': (image, want['fused128.image_feats']),
      'fused pair': (model.apply({'params': params}, text, image, None,
                                 method='pool'), want['fused128.cls_feats']),
      'dual': (out['image_only']['image_embedding'],
               want['dual128.image_cls']),
      'stage 0': (get('swin/merges_0'), want['dual128.stage0_out'])},
          FEATURES)
  compare(record_property, 'another resolution: ITM logits', {
      'itm': (out['joint']['itm_logits'], want['fused128.itm_logits'])},
          LOGITS)


# --- Full size --------------------------------------------------------------
def full_size(queue=4096):
  """(config, {path: ShapeDtypeStruct}) of the published size."""
  config = config_lib.get_config(f'base,queue={queue}')
  model = models.build(config, vocab_size=50265, num_classes=3,
                       num_attributes=0)
  batch = synthetic.synthetic_batch(config.data, vocab_size=50265,
                                    num_classes=3, num_attributes=0,
                                    batch_size=1)
  wanted = {k: v for k, v in model.views.items() if k != 'grid'}
  shapes = jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, wanted), batch)
  return config, parity.flat(shapes)


def test_full_size_inventory(record_property, reference):
  """Every tensor of FIBER-Base: name, shape, learning rate, decay."""
  want = reference('fullsize_inventory')
  config, shapes = full_size()
  params = {k.removeprefix('params/'): x for k, x in shapes.items()
            if k.startswith('params/')}
  groups = optim.group_of(parity.nested(params), config.optim.groups)
  groups = parity.flat(groups)
  listed = {name: (tuple(json.loads(shape)), lr, wd) for name, shape, lr, wd
            in zip(want['names'], want['shapes_json'], want['lr_multiplier'],
                   want['weight_decay'])}
  ours = {e.theirs: e for e in fiber_coarse.entries(config)}
  assert {e.ours.removeprefix('params/') for e in ours.values()
          } == set(params)
  count = 0
  for name, e in ours.items():
    shape, lr, wd = listed.pop(name)
    x = params[e.ours.removeprefix('params/')]
    back = mapping.FORMS[e.form][1](np.broadcast_to(np.float32(0), x.shape))
    assert back.shape == shape, name
    group = dict(config.optim.groups[int(groups[
        e.ours.removeprefix('params/')])][1])
    assert group.get('lr_multiplier', 1.) == lr, name
    assert group.get('weight_decay', config.optim.weight_decay) == wd, name
    count += int(np.prod(shape))
  assert all(any(re.fullmatch(p, name) for p, _ in fiber_coarse.SURPLUS)
             for name in listed)
  # Trained parameters that the original has and we do not, by their names.
  sizes = dict(zip(want['param_count_groups'], want['param_counts']))
  unused = sum(int(np.prod(shape)) for name, (shape, lr, _) in listed.items()
               if np.isfinite(lr) and not re.match('(vqa|nlvr2)_', name))
  total = sum(sizes.values()) - sizes['vqa_classifier'] - sizes[
      'nlvr2_classifier']
  print(f'FIBER base: {count:,} parameters; the original has {unused:,} more '
        'that it never uses')
  parity.note(record_property, 'FIBER-Base: names, shapes, learning rates and '
              'decay of 665 tensors; parameters', AGAINST,
              abs(count + unused - total), 0)
  assert len(ours) == 665
