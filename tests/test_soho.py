"""SOHO: its dictionary, what may not change its outputs, sizes, weights."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from configs import soho as config_lib
from e2e_vlp_jax import convert
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax import predict
from e2e_vlp_jax import train
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.evaluation import variables as variables_lib
from e2e_vlp_jax.models import necks
from e2e_vlp_jax.models import visual_dictionary
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.training import train_step
from e2e_vlp_jax.weights import mapping
from tests import test_train as training
from tests import parity

REPO = pathlib.Path(__file__).resolve().parent.parent
SPEC = str(REPO / 'configs' / 'soho.py')
SIZES = dict(vocab_size=50, num_classes=6, num_attributes=13)


def small_config(**changes):
  config = config_lib.get_config('tiny')
  config.update_from_flattened_dict({
      'data.buckets': ((48, 60),), 'data.sentences': 2, 'model.width': 32,
      'model.ffn': 48, 'model.encoder_layers': 1, 'model.dictionary.size': 12,
      'model.backbone.stem': 8, 'model.backbone.width': 16,
      'model.backbone.blocks': 1, 'warm_start.steps': 0, **changes})
  return config


def resnet_config(**changes):
  """As r18, a ResNet of few channels."""
  config = config_lib.get_config('r18')
  config.update_from_flattened_dict({
      'dtype': 'float32', 'data.buckets': ((64, 128), (128, 192)),
      'data.sentences': 2, 'data.max_text': 12, 'model.width': 32,
      'model.attention_heads': 4, 'model.ffn': 48, 'model.encoder_layers': 1,
      'model.remat': 'none', 'model.max_text': 16,
      'model.dictionary.size': 12, 'model.backbone.stem': 8,
      'model.backbone.width': 8, 'model.backbone.remat': 'none', **changes})
  return config


def build(config, batch_size=3, requests=None, seed=0):
  model = models.build(config, **SIZES)
  batch = synthetic.synthetic_batch(config.data, batch_size=batch_size,
                                    seed=seed, **SIZES)
  batch = jax.tree.map(jnp.asarray, batch)
  variables = jax.jit(lambda b: model.init(
      jax.random.key(seed), b, requests or model.views))(batch)
  return model, dict(variables), batch


# --- Sizes ------------------------------------------------------------------
def test_parameter_counts_match_the_sources():
  """Fact sheet: 57.3M (57.1M trained) + 1.57M words, and 153.6M."""
  found = {}
  for size in ('r18', 'r101'):
    config = config_lib.get_config(size)
    sizes = {**SIZES, 'vocab_size': 30522}
    model = models.build(config, **sizes)
    batch = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
    requests = objectives_lib.requests(objectives_lib.build(config))
    shapes = jax.eval_shape(
        lambda b: model.init(jax.random.key(0), b, requests), batch)  # pylint: disable=cell-var-from-loop
    counts = program.count_parameters(shapes['params'])
    trunk = shapes['params']['backbone']
    frozen = program.count_parameters({k: v for k, v in trunk.items() if k in (
        'conv1', 'bn1', 'layer1_0', 'layer1_1')})['total']
    words = shapes['codebook']['neck']['words']['embed'].size
    found[size] = counts['total'], counts['total'] - frozen, words
  print({k: [f'{x / 1e6:.2f}M' for x in v] for k, v in found.items()})
  million = lambda size: [round(x / 1e6, 2) for x in found[size]]
  assert million('r18') == [57.27, 57.11, 1.57]
  assert million('r101')[0] == 153.56


# --- The dictionary ---------------------------------------------------------
def dictionary(**options):
  """(step, start): step(book, x, weight) -> (index, new book)."""
  words = visual_dictionary.VisualDictionary(6, 4, **options)
  draw = np.random.default_rng(3)
  book = {'embed': draw.normal(size=(6, 4)), 'cluster_size': np.zeros(6),
          'cluster_sum': np.zeros(6), 'embed_avg': np.zeros((6, 4))}

  @jax.jit
  def step(book, x, weight, seed=0):
    (_, index), new = words.apply(
        {'codebook': book}, x, weight, True, mutable=['codebook'],
        rngs={'sample': jax.random.key(seed)})
    return index, new['codebook']
  # The last two words are far from everything.
  book['embed'][4:] += 50
  return step, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), book)


def vectors(n=40, seed=5):
  return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


def test_paper_momentum():
  """word = .9 word + .1 mean of its vectors; the others stay."""
  step, book = dictionary(update='momentum', decay=.9)
  x = vectors()
  index, new = step(book, x, np.ones(40, np.float32))
  index = np.asarray(index)
  assert len(set(index.tolist())) == 4
  for k in range(6):
    mine = x[index == k]
    want = book['embed'][k] if not len(mine) else (
        .9 * book['embed'][k] + .1 * mine.mean(0))
    np.testing.assert_allclose(new['embed'][k], want, atol=1e-6)


def test_revived_words_are_vectors_of_the_batch():
  """Released, unused words become zero; with `revive`, valid vectors."""
  x, weight = vectors(), np.ones(40, np.float32)
  weight[30:] = 0  # padding, say
  _, new = dictionary()[0](dictionary()[1], x, weight)
  assert not np.any(new['embed'][4:])
  step, book = dictionary(revive=.1)
  index, new = step(book, x, weight)
  used = set(np.asarray(index)[:30].tolist())
  assert used == {0, 1, 2, 3}
  found = [np.flatnonzero((x == w).all(-1)) for w in
           np.asarray(new['embed'][4:])]
  assert all(len(f) == 1 and f[0] < 30 for f in found)
  other = step(book, x, weight, seed=1)[1]['embed'][4:]
  assert np.any(np.asarray(other) != np.asarray(new['embed'][4:]))
  # They then have their own vectors.
  index, _ = step(new, x, weight)
  assert set(np.asarray(index).tolist()) == set(range(6))


def test_weights_count():
  """A vector of weight 2 is two vectors; one of weight 0 is none."""
  step, book = dictionary()
  x = vectors(10)
  weight = np.array([2.] * 5 + [0.] * 5, np.float32)
  _, a = step(book, x, weight)
  _, b = step(book, np.concatenate([x[:5], x[:5]]), np.ones(10, np.float32))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
  assert float(a['cluster_sum'].sum()) == 10


def test_usage():
  words = visual_dictionary.VisualDictionary(4, 2)
  book = {'embed': jnp.ones((4, 2)), 'cluster_sum': jnp.zeros(4),
          'embed_avg': jnp.zeros((4, 2))}
  for sizes, perplexity, dead in (([1., 1, 1, 1], 4., 0.),
                                  ([5., 5, 0, 0], 2., .5)):
    found = words.apply({'codebook': {
        **book, 'cluster_size': jnp.array(sizes)}}, method='usage')
    np.testing.assert_allclose(found['codebook_perplexity'], perplexity,
                               rtol=1e-5)
    assert float(found['codebook_dead']) == dead


# --- Masked visual modelling ------------------------------------------------
def test_all_cells_of_the_chosen_code_are_hidden():
  codes = jnp.array([[3, 1, 3, 2, 3]])
  mask = jnp.array([[True, True, True, True, False]])
  hide = lambda cell, keep=True: np.asarray(necks.same_code_mask(
      codes, mask, jnp.array([cell]), jnp.array([keep])))[0].tolist()
  assert hide(0) == [True, False, True, False, False]
  assert hide(1) == [False, True, False, False, False]
  assert not any(hide(0, keep=False))
  assert not any(hide(4))  # padding was chosen


@pytest.mark.parametrize('cell', ['batch', 'pair'])
def test_draws_of_cells(cell):
  """One cell for the whole batch (released), or one for each pair."""
  config = small_config(**{'model.mvm.cell': cell, 'model.mvm.rate': .5})
  model = models.build(config, **SIZES)
  mask = jnp.arange(20) < jnp.array([[20]] * 32 + [[7]] * 32)
  found, keep = model.apply({}, mask, 4, method='choose_cells',
                            rngs={'sample': jax.random.key(1)})
  found = np.asarray(found)
  assert found.shape == keep.shape == (64, 4)
  assert (len(np.unique(found)) == 1) == (cell == 'batch')
  if cell == 'pair':  # valid ones
    assert (found[32:] < 7).all() and (found[:32] >= 7).any()
  assert .35 < np.asarray(keep).mean() < .65


@pytest.fixture(scope='module')
def built():
  return build(resnet_config())


def test_evaluation_hides_nothing_and_draws_nothing(built):
  """Other heads of the masked view see the whole image, without a key."""
  model, variables, batch = built
  same = {**batch, 'text': batch['masked_text'],
          'text_mask': batch['masked_text_mask']}
  out = jax.jit(lambda b: model.apply(variables, b, {
      'joint': ('itm', 'mlm'), 'joint_masked': ('itm', 'mlm')}))(same)
  for name in ('itm_logits', 'mlm_logits'):
    np.testing.assert_array_equal(out['joint'][name],
                                  out['joint_masked'][name])
  assert out['joint']['mlm_logits'].shape == (3, 2, 12, 50)
  assert 'mvm_logits' not in out['joint_masked']


# --- Padding ----------------------------------------------------------------
def logits_of(model, variables, batch):
  out = jax.jit(lambda b: model.apply(variables, b, {
      'joint': ('itm', 'mlm')}))(batch)['joint']
  valid = np.asarray(batch['text_mask'])
  return np.asarray(out['itm_logits']), np.asarray(out['mlm_logits'])[valid]


def test_padded_pixels_and_tokens_change_nothing(built):
  model, variables, batch = built
  noise = np.random.default_rng(0).integers(0, 255, batch['image'].shape)
  changed = {
      **batch, 'image': jnp.where(batch['image_mask'][..., None],
                                  batch['image'], noise.astype(np.uint8)),
      'text': jnp.where(batch['text_mask'], batch['text'], 9)}
  assert np.any(changed['image'] != batch['image'])
  assert np.any(changed['text'] != batch['text'])
  for a, b in zip(logits_of(model, variables, batch),
                  logits_of(model, variables, changed)):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_larger_canvas_changes_nothing(built):
  """With mask_padding, for an image that fills whole cells."""
  model, variables, batch = built
  batch = {**batch, 'image_mask': jnp.ones_like(batch['image_mask'])}
  grow = ((0, 0), (0, 64), (0, 64))
  larger = {**batch, 'image': jnp.pad(batch['image'], (*grow, (0, 0)),
                                      constant_values=99),
            'image_mask': jnp.pad(batch['image_mask'], grow)}
  for a, b in zip(logits_of(model, variables, batch),
                  logits_of(model, variables, larger)):
    np.testing.assert_allclose(a, b, atol=1e-5)


# --- Training ---------------------------------------------------------------
@pytest.mark.slow
def test_one_and_eight_devices_agree():
  """Losses, usage, and the same words on every device, to the bit."""
  found = []
  for devices in (1, 8):
    state, step, batch = training.setup_step(
        small_config(), training.mesh_of(data=devices))
    for _ in range(3):
      state, metrics = step(state, batch)
    found.append((jax.device_get(metrics), jax.device_get(
        state.model_state)))
    words = state.model_state['codebook']['neck']['words']
    for x in words.values():
      shards = [np.asarray(s.data) for s in x.addressable_shards]
      assert len(shards) == devices and shards[0].shape == x.shape
      for s in shards:
        np.testing.assert_array_equal(s, shards[0])
  (a, state_a), (b, state_b) = found
  assert {'codebook_perplexity', 'codebook_dead', 'mvm', 'mlm',
          'itm'} <= set(a)
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4,
                               err_msg=name)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(
      x, y, rtol=1e-3, atol=1e-3), state_a, state_b)


@pytest.mark.slow
def test_accumulation_is_two_moves_of_the_dictionary():
  """As two batches in turn, but for one update of the parameters."""
  config = small_config(accumulate=2)
  mesh = training.mesh_of()
  state, step, batch = training.setup_step(config, mesh)
  model = models.build(config, **SIZES)
  objectives = objectives_lib.build(config)
  rng = jax.random.fold_in(state.rng, 0)
  moved, sums = state.model_state, np.zeros(2)

  @jax.jit
  def terms(moved, micro, rng):
    losses, _, moved = train_step.loss_terms(
        model, objectives, objectives_lib.requests(objectives), state.params,
        moved, micro, rng, mesh)
    return jnp.stack(losses['mvm']['mvm']), moved
  for k in range(2):
    micro = jax.tree.map(lambda x: x[k::2], batch)  # pylint: disable=cell-var-from-loop
    found, moved = terms(moved, micro, jax.random.fold_in(rng, k))
    sums += np.asarray(found)
  after, logged = step(state, batch)
  assert sums[1] > 0
  np.testing.assert_allclose(logged['mvm'], sums[0] / sums[1], rtol=1e-4)
  words = lambda s: s['codebook']['neck']['words']
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4,
                                                       atol=1e-5),
               words(after.model_state), words(moved))
  # 8 images of 4x5 cells, once for each of 2 texts, padding left out.
  cells = necks.grid_mask(batch['image_mask'], 4, 5).sum()
  assert float(words(moved)['cluster_sum'].sum()) == 2 * cells


@pytest.mark.slow
def test_train_evaluate_and_match(tiny_scenes, tmp_path):
  """The stages, evaluators and predict know nothing of SOHO."""
  small = {k: v for k, v in small_config().to_dict()['model'].items()
           if not isinstance(v, dict)}
  options = {'model.backbone.stem': 8, 'model.backbone.width': 16,
             **{f'model.{k}': small[k] for k in ('width', 'ffn',
                                                 'encoder_layers')},
             'model.dictionary.size': 12, 'data.dir': tiny_scenes,
             'total_steps': 4, 'warm_start.steps': 2, 'batch_size': 8,
             'eval_batch_size': 16, 'log_every_steps': 1,
             'eval_every_steps': 0, 'tensorboard': 'false',
             'samples.count': 2}
  train.main(['--config', f'{SPEC}:tiny', '--workdir', str(tmp_path / 'w'),
              *(f'--config.{k}={v}' for k, v in options.items())])
  lines = [json.loads(line) for line in
           (tmp_path / 'w' / 'metrics.jsonl').read_text().splitlines()]
  logged = {k for line in lines for k in line}
  assert {'train/codebook_perplexity', 'train/codebook_dead', 'train/mvm',
          'train/grid_classes'} <= logged
  scores = json.loads((tmp_path / 'w' / 'eval.json').read_text())
  assert {'eval/itm/accuracy', 'eval/mlm/image_gain',
          'eval/mlm_unseen/accuracy'} <= set(scores)
  Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(
      tmp_path / 'a.png')
  predict.main(['--checkpoint', str(tmp_path / 'w'), '--task', 'match',
                '--image', str(tmp_path / 'a.png'), '--text', 'a red circle',
                '--json', str(tmp_path / 'a.json')])
  found, = json.loads((tmp_path / 'a.json').read_text())['match']
  assert 0 <= found['score'] <= 1


# --- Weights ----------------------------------------------------------------
@pytest.fixture(scope='module')
def state(shared):
  """The reference checkpoint, a released one but for its size."""
  with np.load(shared / 'reference' / 'soho'
               / 'soho_pretrain_eval.npz') as f:
    return {k.removeprefix('state/'): f[k] for k in f.files
            if k.startswith('state/')}


@pytest.fixture
def convert_state(tmp_path):
  """convert_state(tensors, **config) runs the command; returns its output."""
  vocabulary = tmp_path / 'vocab.txt'
  vocabulary.write_text('\n'.join(
      ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
       *(f'w{i}' for i in range(115))]) + '\n')

  def run_(tensors, kind='soho', flags=(), **changes):
    name = f'w{len(list(tmp_path.iterdir()))}'
    path = tmp_path / f'{name}.safetensors'
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    options = {'data.tokenizer.path': vocabulary, 'model.width': 32,
               'model.attention_heads': 4, 'model.ffn': 64,
               'model.max_text': 24,
               'model.dictionary.size': 16, 'model.backbone.stem': 8,
               'model.backbone.width': 8, **changes}
    convert.main(['--format', kind, '--input', str(path), '--config',
                  f'{SPEC}:r18,data=scenes', '--output',
                  str(tmp_path / name), *flags,
                  *(f'--config.{k}={v}' for k, v in options.items())])
    return tmp_path / name
  return run_


def test_released_weights_there_and_back(state, convert_state, tmp_path,
                                         capsys):
  output = convert_state(state)
  record = json.loads((output / 'conversion.json').read_text())
  assert record['copies'] == {
      'mask_l_fc.weight':
          'language.bert.embeddings.word_embeddings.weight'}
  assert all(k.endswith('num_batches_tracked') for k in record['surplus'])
  assert not record['missing'] and 'unknown' not in capsys.readouterr().out
  assert 'codebook/neck/words/embed' in record['tensors']
  back = tmp_path / 'back.safetensors'
  convert.main(['--export', '--input', str(output), '--output', str(back)])
  found = safetensors.numpy.load_file(back)
  assert set(state) == set(found) | set(record['surplus'])
  for k, x in found.items():
    assert x.dtype == state[k].dtype and x.tobytes() == state[k].tobytes(), k


@pytest.mark.parametrize('kind, prefix, module', [
    ('torchvision_resnet', 'backbone.', 'backbone'),
    ('hf_bert', 'language.', 'encoder')])
def test_what_the_papers_start_from(state, convert_state, kind, prefix,
                                    module):
  """An ImageNet trunk or a BERT becomes part of a SOHO."""
  part = {k.removeprefix(prefix): v for k, v in state.items()
          if k.startswith(prefix)}
  output = convert_state(part, kind)
  record = json.loads((output / 'conversion.json').read_text())
  assert {k for k in record['surplus']} == {
      k for k in part if k.endswith('num_batches_tracked')}
  loaded = parity.flat(checkpoint.load(str(output))[0][module])
  whole = parity.flat(checkpoint.load(str(convert_state(state)))[0][module])
  for k, x in whole.items():
    np.testing.assert_array_equal(loaded[k], x)


@pytest.mark.parametrize('change, parts', [
    ({'model.backbone.depth': 34},
     ('model.backbone.depth is 34, the file has 18',
      '--config.model.backbone.depth=18')),
    ({'model.encoder_layers': 12}, ('--config.model.encoder_layers=3',)),
    ({'model.neck.mix': 'add'}, ('--config.model.neck.mix=gate',)),
    ({'model.dictionary.size': 2048},
     ('--config.model.dictionary.size=16',)),
    ({'model.neck.begin_align': 'true', 'model.max_text': 16},
     ('--config.model.neck.begin_align=False',
      '--config.model.max_text=24'))])
def test_checkpoints_of_another_variant(state, convert_state, capsys, change,
                                        parts):
  with pytest.raises(SystemExit) as e:
    convert_state(state, **change)
  error = capsys.readouterr().err
  assert e.value.code == 2 and error.count('\n') == 1
  for part in parts:
    assert part in error


def test_missing_and_extra_tensors(state, convert_state, capsys):
  less = {k: v for k, v in state.items() if k != 'neck.pos_line.bias'}
  with pytest.raises(SystemExit):
    convert_state(less)
  assert 'it lacks neck.pos_line.bias' in capsys.readouterr().err
  convert_state({**state, 'head.extra': np.zeros(3, np.float32)})
  assert 'head.extra (unknown to this format)' in capsys.readouterr().out
  with pytest.raises(SystemExit):  # of the VQA fine-tuning
    convert_state({k: v for k, v in state.items() if 'neck.vq' not in k})
  assert '--config.model.dictionary.size=0' in capsys.readouterr().err


@pytest.mark.parametrize('stem, width', [(12, 12), (12, 10)])
def test_a_stem_as_wide_as_it_likes(stem, width):
  """The first block has a shortcut exactly where its tensors are mapped."""
  config = resnet_config(**{'model.backbone.stem': stem,
                            'model.backbone.width': width})
  model = models.build(config, **SIZES)
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **SIZES)
  shapes = parity.flat(jax.eval_shape(lambda b: model.init(
      jax.random.key(0), b, {'joint_masked': ('mlm', 'itm', 'mvm')}), batch))
  mapped = {e.ours for e in mapping.find('soho').entries(config)}
  assert set(shapes) == mapped
  assert ('params/backbone/layer1_0/downsample_conv/kernel' in shapes) == (
      stem != width)


def test_a_module_that_is_covered_in_part_is_an_error(
    state, convert_state, capsys, monkeypatch):
  """A format that forgets a variable would leave it random."""
  source = mapping.find('soho')
  entries = source.entries
  monkeypatch.setattr(source, 'entries', lambda config: [
      e for e in entries(config) if 'token_norm' not in e.ours])
  with pytest.raises(SystemExit):
    convert_state(state)
  error = capsys.readouterr().err
  assert ('no tensor for params/neck/token_norm/norm/bias and 1 more variables'
          in error and '--allow_random' in error)
  output = convert_state(state, flags=['--allow_random'])
  record = json.loads((output / 'conversion.json').read_text())
  assert sorted(k.split('/')[-1] for k in record['missing']) == ['bias',
                                                                 'scale']


# --- Bad input --------------------------------------------------------------
@pytest.mark.parametrize('key, value, part', [
    ('model.dictionary.update', 'momentun', "did you mean 'momentum'"),
    ('model.neck.mix', 'gates', "did you mean 'gate'"),
    ('model.mvm.cell', 'image', 'valid choices: batch, pair'),
    ('model.attention_heads', 5, 'width 32 of encoder/layer0.*such as 4'),
    ('model.act', 'gelo', "did you mean 'gelu'"),
    ('model.text_pool', 'cla', "did you mean 'cls'"),
    ('model.dictionary.size', -1, 'model.dictionary.size: -1'),
    ('model.dictionary.decay', 1.2, 'decay: 1.2; expected at least 0'),
    ('model.dictionary.decay', 1., 'decay: 1.0; expected .* less than 1'),
    ('model.backbone.depth', 19, 'depth 19; valid choices: 18, 34'),
    ('data.max_text', 17, 'texts of 17 tokens for model.max_text: 16')])
def test_values_that_do_not_fit(key, value, part):
  config = resnet_config(**{key: value})
  model = models.build(config, **SIZES)
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **SIZES)
  with pytest.raises(errors.UserError, match=part):
    jax.eval_shape(lambda: model.init(jax.random.key(0), batch, model.views))


def test_a_checkpoint_with_another_dictionary_is_refused():
  """Parameters alone do not tell; the words are state."""
  def shapes(size):
    config = small_config(**{'model.dictionary.size': size})
    model = models.build(config, **SIZES)
    batch = synthetic.synthetic_batch(config.data, batch_size=1, **SIZES)
    return config, model, jax.eval_shape(
        lambda: model.init(jax.random.key(0), batch, model.views))
  config, model, found = shapes(12)
  variables_lib.check(model, config, SIZES, found, 'W', {})
  found = shapes(6)[2]
  with pytest.raises(errors.UserError, match='codebook/neck/words.*'
                     'model.dictionary.size is 6 there, 12 here'):
    variables_lib.check(model, config, SIZES, found, 'W',
                        {'dictionary.size': (6, 12)})


def test_the_released_mask_hides_columns_of_portraits():
  """square_mask: its width is read from the height; off by default."""
  portrait, landscape = np.ones((1, 800, 608)), np.ones((1, 608, 800))
  landscape[:, :, 620:] = 0  # an image of 608x620 on a wider canvas
  columns = lambda mask, h, w, square: np.asarray(necks.grid_mask(
      jnp.asarray(mask > 0), h, w, square))[0].all(0).sum()
  assert columns(portrait, 12, 9, True) == 7
  assert columns(portrait, 12, 9, False) == 9
  assert columns(landscape, 9, 12, True) == 12
  assert columns(landscape, 9, 12, False) == 10
  assert not config_lib.get_config('r18').model.neck.square_mask
