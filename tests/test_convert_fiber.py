"""Swin, RoBERTa and FIBER's checkpoints: there and back, and refusals."""
import contextlib
import functools
import io
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.models import swin as swin_lib
from e2e_vlp_jax.models import roberta
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.weights import mapping
from tests import parity
from tests import test_convert
from tests.test_convert import refused, run, save

REPO = pathlib.Path(__file__).resolve().parent.parent
SPEC = f'{REPO}/configs/fiber.py:base,data=scenes,side='
# FIBER's reference arrays are of these sizes.
ORIGINAL = {'model.swin.width': 8, 'model.swin.heads': '(1,2,4,8)',
            'model.roberta.width': 40, 'model.roberta.heads': 4,
            'model.roberta.ffn': 160, 'model.roberta.positions': 24,
            'model.width': 40, 'model.remat': 'none', 'dtype': 'float32'}
SMALL = {**ORIGINAL, 'model.swin.depths': '(1,2)', 'model.swin.heads': '(1,2)',
         'model.roberta.depth': 2, 'model.fused_layers': 1}


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'v.txt'
  path.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
                             *(f'w{i}' for i in range(115))]))
  return str(path)


def options(vocabulary, sizes, side=96, **changes):
  """Command line of a config."""
  changes = {**sizes, 'data.tokenizer.path': vocabulary, **changes}
  return ['--config', f'{SPEC}{side}'] + [
      f'--config.{k}={v}' for k, v in changes.items()]


def config_of(arguments):
  pairs = [a.removeprefix('--config.').split('=', 1) for a in arguments[2:]]
  return cli.load_config(arguments[1], [tuple(p) for p in pairs])


@pytest.fixture(scope='module')
def small(vocabulary):
  return config_of(options(vocabulary, SMALL))


@pytest.fixture(scope='module')
def files(small, shared, tmp_path_factory):
  """{name: (format, sizes, file)}."""
  folder = tmp_path_factory.mktemp('files')
  out = {}
  with np.load(shared / 'reference/fiber_coarse/params.npz') as f:
    fiber = {k: f[k] for k in f.files}
  out['fiber'] = 'fiber_coarse', ORIGINAL, fiber
  scale = {k: v for k, v in fiber.items() if k != 'temp'}
  out['fiber_june'] = 'fiber_coarse', ORIGINAL, {
      **scale, 'logit_scale': np.float32(2.)}
  small_fiber, hf, timm, text = (
      test_convert.published(name, small, vocabulary=120)
      for name in ('fiber_coarse', 'hf_swin', 'timm_swin', 'hf_roberta'))
  out['small'] = 'fiber_coarse', SMALL, small_fiber
  extra = {'classifier.weight': np.ones((9, 16), np.float32)}
  out['hf'] = 'hf_swin', SMALL, {
      **{f'swin.{k}': v for k, v in hf.items()}, **extra}
  out['hf_bare'] = 'hf_swin', SMALL, hf
  index = {f'layers.{s}.blocks.0.attn.relative_position_index':
           np.zeros((9, 9), int) for s in (0, 1)}
  out['timm'] = 'timm_swin', SMALL, {
      **timm, **index, 'head.weight': np.ones((9, 16), np.float32)}
  newer = {k.replace('layers.0.downsample', 'layers.1.downsample'): v
           for k, v in timm.items()}
  out['timm_newer'] = 'timm_swin', SMALL, {
      **newer, 'head.fc.weight': np.ones((9, 16), np.float32)}
  out['roberta'] = 'hf_roberta', SMALL, {
      **text, 'lm_head.bias': np.zeros(120, np.float32),
      'roberta.embeddings.position_ids': np.arange(24)[None]}
  return {name: (kind, sizes, save(folder / f'{name}.safetensors', tensors))
          for name, (kind, sizes, tensors) in out.items()}


@pytest.fixture(scope='module')
def converted(files, vocabulary, tmp_path_factory):
  """name -> (checkpoint, what was printed), converted on first use."""
  @functools.cache
  def convert_(name):
    kind, sizes, file = files[name]
    folder = tmp_path_factory.mktemp(name) / 'ckpt'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      run('--format', kind, '--input', file, *options(vocabulary, sizes),
          '--output', folder)
    return folder, printed.getvalue()
  return convert_


SURPLUS = {
    'fiber_june': r'.*(_index|attn_mask|position_ids|output\.LayerNorm\..*|'
             r'alpha_t2i|pooler\.dense\..*)|cross_modal_att_layers.*|'
             r'rank_output.*|(vqa|nlvr2)_classifier.*',
    'hf': 'classifier.*', 'timm_newer': r'head\.fc\..*',
    'roberta': r'lm_head\..*|.*position_ids|.*pooler.*'}


@pytest.mark.parametrize('name', SURPLUS)
def test_there_and_back_is_equal_to_the_bit(files, converted, tmp_path, name):
  kind, _, file = files[name]
  ckpt, out = converted(name)
  assert 'unknown' not in out
  assert ('model.roberta.heads=4 is taken from' in out) == ('swin' not in kind)
  run('--export', '--input', ckpt, '--output', tmp_path / 'back.safetensors')
  a = safetensors.numpy.load_file(file)
  b = safetensors.numpy.load_file(tmp_path / 'back.safetensors')
  record = json.loads((ckpt / 'conversion.json').read_text())
  # Every tensor of the file comes back, or is accounted for.
  assert set(a) == set(b) | set(record['surplus'])
  assert not set(b) & set(record['surplus']) and not record['resized']
  for key in record['surplus']:
    assert re.fullmatch(SURPLUS[name], key), key
    # The poolers of the model itself are none of RoBERTa's.
    assert not re.match('cross_modal.*pooler', key)
  for key, x in b.items():
    assert x.dtype == a[key].dtype and x.shape == a[key].shape, key
    assert x.tobytes() == a[key].tobytes(), key
  # Every variable of the model has a value: from the file or drawn.
  params, state, _ = checkpoint.load(str(ckpt))
  ours = parity.flat({'params': params, **state})
  used = {re.sub(r'\[.*', '', k) for k in record['tensors']}
  missing = set(record['missing'])
  assert set(ours) == used | missing and not used & missing
  if name.startswith('fiber'):
    assert not missing
  else:
    trunk = 'text' if kind == 'hf_roberta' else 'swin'
    assert {k.split('/')[1] for k in used} == {trunk}
    assert all('/cross/' in k for k in missing if k.split('/')[1] == trunk)


def test_two_files_make_one_model(files, converted, vocabulary, tmp_path,
                                  capsys):
  swin, _ = converted('hf')
  kind, sizes, file = files['roberta']
  args = ['--format', kind, '--input', file, *options(vocabulary, sizes),
          '--output', tmp_path / 'both']
  run(*args, '--onto', swin)
  out = capsys.readouterr().out
  assert f'params/swin (not in the file; from {swin})' in out
  assert 'missing' not in out
  both, one, two = (checkpoint.load(str(path))[0] for path in (
      tmp_path / 'both', swin, converted('roberta')[0]))
  jax.tree.map(np.testing.assert_array_equal, both['swin'], one['swin'])
  jax.tree.map(np.testing.assert_array_equal, both['text']['embedding'],
               two['text']['embedding'])
  # A checkpoint of other sizes, or none at all.
  args[-1] = tmp_path / 'not'
  error = refused(capsys, *args, '--onto', converted('fiber_june')[0])
  assert '--onto' in error and 'of another model' in error
  assert 'none found' in refused(capsys, *args, '--onto', tmp_path / 'no')


def test_names_of_either_age_give_the_same_trunk(files, small):
  """Published and in-memory names, with and without a prefix."""
  trees = {}
  for name in ('hf', 'hf_bare', 'timm', 'timm_newer'):
    kind, _, file = files[name]
    tensors = safetensors.numpy.load_file(file)
    shapes = {e.ours: None for e in mapping.find(kind).entries(small)}
    source = mapping.find(kind)
    spelled = mapping.spelled(source, tensors, file)
    assert {e.theirs for e in source.entries(small)} <= set(spelled)
    trees[name] = {e.key: spelled[e.theirs][1] for e in source.entries(small)}
    assert len({k.partition('[')[0] for k in trees[name]}) == len(shapes)
  for a, b in (('hf', 'hf_bare'), ('timm', 'timm_newer')):
    assert set(trees[a]) == set(trees[b])
    for key, x in trees[a].items():
      np.testing.assert_array_equal(x, trees[b][key])


def test_from_the_original_checkpoint_to_its_logits(
    converted, shared, record_property):
  """A file of the original's tensors, converted; its scores of pairs."""
  params, _, meta = checkpoint.load(str(converted('fiber_june')[0]))
  config = ml_collections.ConfigDict(meta['config'])
  # The reference's images are normalised already.
  config.model.image_mean, config.model.image_std = [0.] * 3, [1 / 255] * 3
  model = models.build(config, vocab_size=120, num_classes=3,
                       num_attributes=0)
  with np.load(shared / 'reference/fiber_coarse/inputs.npz') as f:
    batch = {'image': jnp.asarray(f['image'].transpose(0, 2, 3, 1)),
             'image_mask': jnp.ones((4, 96, 96), bool),
             'text': jnp.asarray(f['text_ids'][:, None].astype(np.int32)),
             'text_mask': jnp.asarray(f['text_masks'][:, None] > 0)}
  out = jax.jit(lambda p: model.apply({'params': p}, batch,
                                      {'joint': ('itm',)}))(params)
  with np.load(shared / 'reference/fiber_coarse/losses_heads.npz') as f:
    want = f['itm.logits_matched']
  parity.note(record_property, 'FIBER coarse, a converted checkpoint: ITM '
              'logits', 'the original code (stored)',
              np.abs(out['joint']['itm_logits'][:, 0] - want).max(), 5e-5)


def test_resized_windows_are_the_originals(files, vocabulary, shared,
                                           tmp_path, capsys,
                                           record_property):
  kind, sizes, file = files['fiber_june']
  args = ['--format', kind, '--input', file, *options(vocabulary, sizes, 128),
          '--output', tmp_path / 'ckpt']
  error = refused(capsys, *args)
  assert 'model.swin.window is 4, the file has 3' in error
  assert '--config.model.swin.window=3 (or --resize)' in error
  run(*args, '--resize')
  assert '  resized  ' in capsys.readouterr().out
  record = json.loads((tmp_path / 'ckpt' / 'conversion.json').read_text())
  assert len(record['resized']) == 24 and not record['missing']
  params, _, _ = checkpoint.load(str(tmp_path / 'ckpt'))
  with np.load(shared / 'reference/fiber_coarse/resolution_change.npz') as f:
    tables = {k.removeprefix('adapted_96_to_128.'): f[k] for k in f.files
              if k.startswith('adapted')}
  assert len(tables) == 3
  worst = 0.
  for name, want in tables.items():
    s, k = re.search(r'layers\.(\d)\.blocks\.(\d+)', name).groups()
    got = params['swin'][f'blocks_{s}_{k}']['attention']['relative_bias']
    worst = max(worst, np.abs(got - want).max())
  parity.note(record_property, 'FIBER coarse, tables of relative positions '
              'resized by convert', 'the original code (stored)', worst, 2e-5)
  # The way back gives the tables of the new windows.
  run('--export', '--input', tmp_path / 'ckpt', '--output',
      tmp_path / 'back.safetensors')
  back = safetensors.numpy.load_file(tmp_path / 'back.safetensors')
  assert back['vit_model.layers.0.blocks.0.attn.relative_position_bias_table'
              ].shape == (49, 1)


@pytest.mark.parametrize('changes, fits', [
    ({'model.swin.depths': '(2,2,6,2)'}, 'model.swin.depths=(2,2,18,2)'),
    ({'model.roberta.depth': 8}, 'model.roberta.depth=12'),
    ({'model.fused_layers': 4}, 'model.fused_layers=6'),
    ({'model.swin.heads': '(2,2,4,8)'}, 'model.swin.heads=(1,2,4,8)'),
    ({'model.swin.window': 6}, 'model.swin.window=3'),
    ({'model.roberta.positions': 30}, 'model.roberta.positions=24'),
    ({'model.width': 48}, 'model.width=40')])
def test_of_another_variant(files, vocabulary, tmp_path, capsys, changes,
                            fits):
  kind, sizes, file = files['fiber']
  error = refused(capsys, '--format', kind, '--input', file,
                  *options(vocabulary, sizes, **changes), '--output',
                  tmp_path / 'ckpt')
  assert f'--config.{fits}' in error and error.count('--config.') == 1, error


def test_missing_and_extra_tensors(files, vocabulary, tmp_path, capsys):
  kind, sizes, file = files['small']
  good = safetensors.numpy.load_file(file)
  args = ['--format', kind, *options(vocabulary, sizes), '--output',
          tmp_path / 'ckpt']
  lost = ('cross_modal_image_pooler_itc.dense.bias', 'itm_score.fc.bias',
          'vit_model.layers.1.blocks.1.attn.alpha_i2t')
  path = save(tmp_path / 'less.safetensors',
              {k: v for k, v in good.items() if k not in lost})
  error = refused(capsys, '--input', path, *args)
  assert 'not whole: it lacks' in error and all(k in error for k in lost)
  path = save(tmp_path / 'odd.safetensors', {
      **good, 'vit_model.layers.0.blocks.0.attn.qkv.weight':
          np.zeros((24, 9), np.float32)})
  assert 'qkv.weight is [24, 9], expected [24, 8]' in refused(
      capsys, '--input', path, *args)
  # What belongs to no layer of ours is listed, as are the queue's buffers.
  path = save(tmp_path / 'more.safetensors', {
      **good, 'vit_model.extra': np.zeros(3, np.float32), 'temp': np.float32(1),
      'image_queue': np.zeros((40, 8), np.float32)})
  run('--input', path, *args)
  out = capsys.readouterr().out
  assert 'vit_model.extra (unknown to this format)' in out
  assert 'image_queue (past examples' in out
  assert 'temp (model.queue decides which' in out


def test_other_formats_are_recognised(files, vocabulary, tmp_path, capsys):
  args = [*options(vocabulary, SMALL), '--output', tmp_path / 'ckpt']
  for given, name in (('hf_swin', 'timm'), ('timm_swin', 'hf'),
                      ('hf_bert', 'roberta'), ('hf_swin', 'fiber')):
    error = refused(capsys, '--format', given, '--input', files[name][2],
                    *args)
    assert f'did you mean --format {files[name][0]}?' in error


def test_a_config_without_these_trunks(files, tmp_path, capsys):
  error = refused(capsys, '--format', 'hf_swin', '--input', files['hf'][2],
                  '--config', f'{REPO}/configs/e2e_vlp.py:tiny', '--output',
                  tmp_path / 'ckpt')
  assert 'a config that has model.swin.depths' in error


def test_tables_of_oblong_windows_are_not_resized():
  with pytest.raises(errors.UserError, match='15 and 49 rows'):
    swin_lib.resize_relative_bias(np.zeros((15, 2)), 49)


def variables_of(kind, config, tensors, shapes, path):
  """{path: array} through the functions behind the command."""
  source = mapping.find(kind)
  spelled = mapping.spelled(source, tensors, path)
  facts = source.describe({k: x for k, (_, x) in spelled.items()})
  facts.pop('vocabulary', None)
  mapping.check_config(facts, config, {}, path)
  return mapping.to_ours(source, spelled, config, shapes, path)


def shapes_of(init, name):
  found = parity.flat(jax.eval_shape(init)['params'])
  return {f'params/{name}/{k}': x.shape for k, x in found.items()}


def test_swin_equals_transformers(torch_extra, small, tmp_path,
                                  record_property):
  # pylint: disable=import-outside-toplevel
  import torch
  import transformers
  torch.manual_seed(0)
  config = small.copy_and_resolve_references()
  config.model.swin.update(dict(width=12, depths=(2, 3, 2),
                                heads=(1, 2, 6), window=4))
  c = config.model.swin
  theirs = transformers.SwinModel(transformers.SwinConfig(
      image_size=64, embed_dim=c.width, depths=list(c.depths),
      num_heads=list(c.heads), window_size=c.window)).eval()
  for x in theirs.parameters():  # tables and biases start at 0
    torch.nn.init.normal_(x, std=.2 if x.ndim > 1 else .5)
  theirs.save_pretrained(tmp_path)
  pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(
      np.float32)
  ours = swin_lib.Swin(**c)
  call = lambda m, x: m.norm(m.run(m.embed(x), 0, m.depth))
  variables, record = variables_of(
      'hf_swin', config,
      safetensors.numpy.load_file(tmp_path / 'model.safetensors'),
      shapes_of(lambda: ours.init(jax.random.key(0), pixels, method=call),
                'swin'), 'model')
  assert not record['missing'] and not record['surplus']
  tree = parity.nested({k.replace('/swin/', '/', 1): x
                        for k, x in variables.items()})
  got = jax.jit(lambda v: ours.apply(v, pixels, method=call))(tree)
  with torch.no_grad():
    want = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2))
                  ).last_hidden_state.numpy()
  assert np.ptp(want) > 3
  parity.note(record_property, 'Swin (width 12, 7 blocks): last features',
              f'transformers {transformers.__version__}, torch '
              f'{torch.__version__}',
              np.abs(got.reshape(want.shape) - want).max(), 1e-4)


def test_roberta_equals_transformers(torch_extra, small, tmp_path,
                                     record_property):
  # pylint: disable=import-outside-toplevel
  import torch
  import transformers
  torch.manual_seed(0)
  c = small.model.roberta
  theirs = transformers.RobertaModel(transformers.RobertaConfig(
      vocab_size=120, hidden_size=c.width, num_hidden_layers=c.depth,
      num_attention_heads=c.heads, intermediate_size=c.ffn,
      max_position_embeddings=c.positions, type_vocab_size=1,
      layer_norm_eps=1e-5)).eval()
  for x in theirs.parameters():
    torch.nn.init.normal_(x, std=.2 if x.ndim > 1 else .5)
  theirs.save_pretrained(tmp_path)
  rng = np.random.default_rng(1)
  length = np.array([[9], [3], [14]])
  mask = np.arange(14) < length
  ids = np.where(mask, rng.integers(3, 120, mask.shape), 1)
  ours = roberta.TextEncoder(120, **c)

  def call(m, ids, mask):
    bias = jnp.where(mask, 0., -1e9)[:, None, None]
    return m.run(m.embed(ids, mask), bias, 0, c.depth)
  variables, record = variables_of(
      'hf_roberta', small,
      safetensors.numpy.load_file(tmp_path / 'model.safetensors'),
      shapes_of(lambda: ours.init(jax.random.key(0), ids, mask, method=call),
                'text'), 'model')
  assert not record['missing'] and all('pooler' in k
                                       for k in record['surplus'])
  tree = parity.nested({k.replace('/text/', '/', 1): x
                        for k, x in variables.items()})
  got = np.asarray(jax.jit(lambda v: ours.apply(
      v, jnp.asarray(ids), jnp.asarray(mask), method=call))(tree))
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids), torch.from_numpy(mask.astype(int))
                  ).last_hidden_state.numpy()
  assert np.ptp(want[mask]) > 3
  parity.note(record_property, 'RoBERTa (width 40, 3 layers): last states',
              f'transformers {transformers.__version__}, torch '
              f'{torch.__version__}', np.abs(got - want)[mask].max(), 1e-4)
