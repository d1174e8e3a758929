"""Published weights to checkpoints and back, and what is refused."""
import contextlib
import functools
import io
import json
import os
import pathlib
import pickle
import re
import sys

import jax
import ml_dtypes
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from e2e_vlp_jax import cli
from e2e_vlp_jax import convert
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import models
from e2e_vlp_jax import predict
from e2e_vlp_jax import train
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.weights import files as weights_io
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import resnet
from tests import commands
from tests import parity

REPO = pathlib.Path(__file__).resolve().parent.parent
BASE = str(REPO / 'configs' / 'e2e_vlp.py')
NARROW = str(REPO / 'tests' / 'narrow_resnet.py')
CONFIG = {  # small models of each kind; 'scenes' has 6 classes
    'detr': {'spec': f'{NARROW}:detr,data=scenes,side=64',
             'data.labels': 'scenes', 'model.backbone.depth': 18,
             'model.width': 32, 'model.attention_heads': 4, 'model.ffn': 48,
             'model.encoder_layers': 1, 'model.decoder_layers': 2,
             'model.num_queries': 8},
    'soho': {'spec': f'{REPO}/configs/soho.py:r18,data=scenes,side=64',
             'dtype': 'float32', 'model.backbone.stem': 8,
             'model.backbone.width': 8, 'model.width': 32,
             'model.attention_heads': 4, 'model.ffn': 48, 'model.max_text': 24,
             'model.remat': 'none', 'data.tokenizer.path': 'scenes'},
    'bert': {'spec': f'{NARROW}:r50,data=scenes,side=64', 'dtype': 'float32',
             'data.tokenizer.path': 'scenes',
             'model.backbone.depth': 18, 'model.width': 32,
             'model.attention_heads': 4,
             'model.ffn': 48, 'model.encoder_layers': 2,
             'model.decoder_layers': 1, 'model.num_queries': 8,
             'model.max_text': 24, 'model.text_types': 2, 'model.act': 'gelu',
             'model.epsilon': 1e-12}}
TRUNK = 'model.backbone.conv_encoder.model.'


def config_args(name, **changes):
  options = {**CONFIG[name], **changes}
  return ['--config', options.pop('spec')] + [
      f'--config.{k}={v}' for k, v in options.items()]


def load_config(name):
  options = dict(CONFIG[name])
  return cli.load_config(options.pop('spec'),
                         [(k, str(v)) for k, v in options.items()])


def published(source, config, classes=6, vocabulary=75):
  """{published name: seeded tensor} of a small model."""
  sizes = dict(vocab_size=vocabulary, num_classes=classes, num_attributes=0)
  model = models.build(config, **sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
  shapes = parity.flat(jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, model.views), batch))
  variables, _ = parity.load(source, config,
                             {k: x.shape for k, x in shapes.items()})
  return parity.theirs(source, config, variables)


def save(path, tensors):
  safetensors.numpy.save_file(
      {k: np.asarray(v, order='C') for k, v in tensors.items()}, path)
  return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Weights files by name, as the public ones are written."""
  folder = tmp_path_factory.mktemp('weights')
  detr = published('hf_detr', load_config('detr'))
  bert = published('hf_bert', load_config('bert'))
  trunk = {k.removeprefix(TRUNK): v for k, v in detr.items()
           if k.startswith(TRUNK)}
  counters = {k.replace('running_var', 'num_batches_tracked'): np.array(7)
              for k in trunk if k.endswith('running_var')}
  classifier = np.ones((10, 512), np.float32)
  native = {TRUNK + resnet.to_transformers(k): v for k, v in trunk.items()}
  words = 'bert.embeddings.word_embeddings.weight'
  all_ = {
      # facebook/detr-resnet-50 has timm's names.
      'detr_timm': detr,
      'detr_native': {**native, **{k: v for k, v in detr.items()
                                   if not k.startswith(TRUNK)}},
      'detr_half': {k: v.astype(np.float16) for k, v in detr.items()},
      'detr_bfloat16': {k: v.astype(ml_dtypes.bfloat16)
                        for k, v in detr.items()},
      'torchvision': {**trunk, **counters, 'fc.weight': classifier},
      'resnet': {**{'resnet.' + resnet.to_transformers(k): v
                    for k, v in {**trunk, **counters}.items()},
                 'classifier.1.weight': classifier},
      'bert': {**bert, 'bert.embeddings.position_ids': np.arange(24)[None],
               'cls.predictions.decoder.weight': bert[words],
               'cls.predictions.decoder.bias': bert['cls.predictions.bias']},
      # bert-base-uncased still has the names of 2018.
      'bert_2018': {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
          'LayerNorm.bias', 'LayerNorm.beta'): v for k, v in bert.items()},
      'bert_bare': {k.removeprefix('bert.'): v for k, v in bert.items()
                    if k.startswith('bert.') and 'pooler' not in k}}
  return {name: save(folder / f'{name}.safetensors', tensors)
          for name, tensors in all_.items()}


def run(*args):
  convert.main([str(a) for a in args])


def refused(capsys, *args):
  """The error line of a conversion that must fail with exit code 2."""
  return commands.refused(convert.main, *map(str, args), capsys=capsys)


ROUND_TRIPS = {
    'detr_timm': ('hf_detr', 'detr'), 'detr_native': ('hf_detr', 'detr'),
    'detr_half': ('hf_detr', 'detr'), 'detr_bfloat16': ('hf_detr', 'detr'),
    'torchvision': ('torchvision_resnet', 'detr'),
    'resnet': ('hf_resnet', 'detr'), 'bert': ('hf_bert', 'bert'),
    'bert_2018': ('hf_bert', 'bert'), 'bert_bare': ('hf_bert', 'bert')}


@pytest.fixture(scope='module')
def converted(files, tmp_path_factory):
  """name -> (checkpoint, what was printed), converted on first use."""
  @functools.cache
  def convert_(name):
    kind, config = ROUND_TRIPS[name]
    folder = tmp_path_factory.mktemp(name) / 'ckpt'
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      run('--format', kind, '--input', files[name], *config_args(config),
          '--output', folder)
    return folder, printed.getvalue()
  return convert_


@pytest.mark.parametrize('name', ROUND_TRIPS)
def test_there_and_back_is_equal_to_the_bit(files, converted, tmp_path,
                                            capsys, name):
  ckpt, imported = converted(name)
  run('--export', '--input', ckpt, '--output', tmp_path / 'back.safetensors')
  exported = capsys.readouterr().out
  a = safetensors.numpy.load_file(files[name])
  b = safetensors.numpy.load_file(tmp_path / 'back.safetensors')
  record = json.loads((ckpt / 'conversion.json').read_text())

  assert (record['set'], record['other_sets']) == ('', [])
  assert ' set ' not in imported

  # Every tensor of the file comes back, or is accounted for.
  assert set(a) == set(b) | set(record['surplus'])
  assert not set(b) & set(record['surplus'])
  for key, x in b.items():
    assert x.dtype == a[key].dtype and x.shape == a[key].shape, key
    assert x.tobytes() == a[key].tobytes(), key
  unused = [k for k in a if k.endswith('num_batches_tracked')
            or k in ('fc.weight', 'classifier.1.weight',
                     'bert.embeddings.position_ids')]
  assert sorted(record['surplus']) == sorted(unused)
  for text in (imported, exported):  # in print, too
    for key in unused:
      assert re.sub(r'\d+', '#', key) in text or key in text
  assert 'unknown' not in imported

  # Every variable of the model has a value: from the file or drawn.
  params, state, meta = checkpoint.load(str(ckpt))
  ours = parity.flat({'params': params, **state})
  assert set(ours) == set(record['tensors']) | set(record['missing'])
  assert all(x.dtype == np.float32 for x in ours.values())
  for module in {k.split('/')[1] for k in record['missing']}:
    assert f'/{module}' in imported
  assert meta['labels']['classes'] and meta['tokenizer']
  if name == 'bert':
    assert record['copies'] == {
        'cls.predictions.decoder.weight':
            'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'}
  if name == 'bert_bare':
    assert {k.split('/')[1] for k in record['missing']} >= {'mlm_head',
                                                            'itm_head'}


def test_shards_and_a_set_by_name_give_the_same_parameters(
    files, converted, tmp_path, capsys):
  tensors = safetensors.numpy.load_file(files['torchvision'])
  both = {**{k: v + 1 for k, v in tensors.items()},
          **{f'model_ema.{k}': v for k, v in tensors.items()}}
  places = {k: f'model-{1 + i % 2:05}-of-00002.safetensors'
            for i, k in enumerate(both)}
  (tmp_path / 'hub').mkdir()
  for shard in set(places.values()):
    save(tmp_path / 'hub' / shard,
         {k: v for k, v in both.items() if places[k] == shard})
  (tmp_path / 'hub' / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': places}))
  ckpt = tmp_path / 'ckpt'
  run('--format', 'torchvision_resnet', '--input', tmp_path / 'hub', '--set',
      'model_ema', *config_args('detr'), '--output', ckpt)
  assert ('set      model_ema; the file also has its own (--set NAME takes '
          'another)') in capsys.readouterr().out
  record = json.loads((ckpt / 'conversion.json').read_text())
  assert (record['set'], record['other_sets']) == ('model_ema', [''])
  a, b = (checkpoint.load(str(x)) for x in (ckpt, converted('torchvision')[0]))
  jax.tree.map(np.testing.assert_array_equal, a[:2], b[:2])


def test_all_names_of_a_trunk_give_the_same_parameters(converted):
  trees = []
  for name in ('detr_timm', 'detr_native', 'torchvision', 'resnet'):
    params, state, _ = checkpoint.load(str(converted(name)[0]))
    trees.append((params['backbone'], state['batch_stats']['backbone']))
  for tree in trees[1:]:
    jax.tree.map(np.testing.assert_array_equal, trees[0], tree)


@pytest.mark.parametrize('config,layers', [('bert', 1), ('soho', 3)])
def test_a_bert_of_more_layers(files, tmp_path, capsys, config, layers):
  """A model starts from the first ones; the others are accounted for."""
  a = safetensors.numpy.load_file(files['bert'])
  place = 'bert.encoder.layer.'
  last = {k.removeprefix(place + '1.'): v for k, v in a.items()
          if k.startswith(place + '1.')}
  a |= {f'{place}{i}.{k}': v + i for i in (2, 3) for k, v in last.items()}
  file = save(tmp_path / 'bert4.safetensors', a)
  ckpt = tmp_path / 'ckpt'
  run('--format', 'hf_bert', '--input', file, '--output', ckpt,
      *config_args(config, **{'model.encoder_layers': layers}))
  out = capsys.readouterr().out
  assert (f'model.encoder_layers={layers}: the first {layers} of the file\'s '
          f'4; {4 - layers} left out') in out
  params, _, _ = checkpoint.load(str(ckpt))
  assert {k for k in params['encoder'] if k.startswith('layer')} == {
      f'layer{i}' for i in range(layers)}
  run('--export', '--input', ckpt, '--output', tmp_path / 'back.safetensors')
  b = safetensors.numpy.load_file(tmp_path / 'back.safetensors')
  assert all(a[k].tobytes() == x.tobytes() for k, x in b.items())
  surplus = json.loads((ckpt / 'conversion.json').read_text())['surplus']
  assert set(a) == set(b) | set(surplus) and not set(b) & set(surplus)
  unused = {k for k in a if k.startswith(place)
            and int(k.removeprefix(place)[0]) >= layers}
  assert len(unused) == 16 * (4 - layers)
  assert unused == {k for k, why in surplus.items() if 'above the last' in why}
  # What the layers of a BERT do not have is no less unknown.
  odd = save(tmp_path / 'odd.safetensors',
             {**a, place + '3.gate': np.zeros(1, np.float32)})
  if config == 'bert':
    run('--format', 'hf_bert', '--input', odd, '--output', tmp_path / 'odd',
        *config_args(config, **{'model.encoder_layers': layers}))
    assert f'{place}3.gate (unknown' in capsys.readouterr().out
  error = refused(capsys, '--format', 'hf_bert', '--input', file,
                  '--output', tmp_path / 'more',
                  *config_args(config, **{'model.encoder_layers': 5}))
  assert 'model.encoder_layers is 5, the file has 4' in error


def test_a_trained_checkpoint_exports_under_published_names(
    files, converted, tmp_path, capsys):
  """One that convert did not write has the published names and float32."""
  params, state, meta = checkpoint.load(str(converted('detr_half')[0]))
  del meta['converted']
  checkpoint.write(str(tmp_path / 'trained'), params, state, meta)
  back = tmp_path / 'back.safetensors'
  error = refused(capsys, '--export', '--input', tmp_path / 'trained',
                  '--output', back)
  assert '--format' in error and 'hf_detr' in error
  run('--export', '--format', 'hf_detr', '--input', tmp_path / 'trained',
      '--output', back)
  assert 'detection_head/attributes' in capsys.readouterr().out  # left out
  a = safetensors.numpy.load_file(files['detr_half'])
  b = safetensors.numpy.load_file(back)
  assert set(a) == set(b)
  for key in a:
    np.testing.assert_array_equal(b[key], a[key].astype(np.float32))
  # What lies in it is no BERT.
  error = refused(capsys, '--export', '--format', 'hf_bert', '--input',
                  tmp_path / 'trained', '--output', tmp_path / 'x.safetensors')
  assert 'text_embedding' in error


@pytest.mark.slow
def test_predict_evaluate_and_train_accept_it(converted, tmp_path,
                                              tiny_scenes, capsys):
  ckpt, _ = converted('detr_timm')
  Image.fromarray(np.full((50, 70, 3), 90, np.uint8)).save(tmp_path / 'a.png')
  predict.main(['--checkpoint', str(ckpt), '--task', 'detect', '--image',
                str(tmp_path / 'a.png'), '--threshold', '0', '--json',
                str(tmp_path / 'a.json')])
  found = json.loads((tmp_path / 'a.json').read_text())
  assert len(found['objects']) == 8 and found['image'] == {
      'height': 50, 'width': 70}

  changes = {'data.dir': str(tiny_scenes), 'eval_batch_size': 8,
             'batch_size': 8, 'total_steps': 1, 'eval_every_steps': 0,
             'tensorboard': 'false', 'samples.count': 0}
  evaluate.main([*config_args('detr', **changes), '--checkpoint', str(ckpt),
                 '--workdir', str(tmp_path / 'eval')])
  scores = json.loads((tmp_path / 'eval' / 'eval.json').read_text())
  assert 0 <= scores['eval/detection/AP'] <= 1

  capsys.readouterr()
  train.main([*config_args('detr', init_from=str(ckpt), **changes),
              '--workdir', str(tmp_path / 'run')])
  out = capsys.readouterr().out
  assert ' 0 not in the checkpoint' in out and ' 0 of another shape' in out
  before, _, _ = checkpoint.load(str(ckpt))
  after, state, _ = checkpoint.load(str(tmp_path / 'run'))
  a, b = parity.flat(before), parity.flat(after)
  for key in a:  # one small step away; what DETR freezes, not at all
    frozen = re.match(r'backbone/(conv1|bn1|layer1)|.*bn\d/', key)
    assert np.abs(a[key] - b[key]).max() <= (0 if frozen else 2e-4), key


def test_published_detr_label_space():
  """91 classes with holes: the config that fits the published files."""
  config = cli.load_config(f'{BASE}:detr', [('data.labels', 'coco91')])
  labels = vocabularies_lib.Vocabularies.load(config.data).labels
  coco = vocabularies_lib.Vocabularies.load(
      cli.load_config(f'{BASE}:detr').data).labels
  assert len(labels.classes) == 91
  assert [c for c in labels.classes if not c.startswith('N/A')] == coco.classes
  for number, name in ((1, 'person'), (18, 'dog'), (44, 'bottle'),
                       (90, 'toothbrush')):  # COCO's category ids
    assert labels.classes[number] == name


# --- Bad input --------------------------------------------------------------
def test_of_another_model(files, tmp_path, capsys):
  """Names the differences, and following the advice mends them."""
  args = ['--format', 'hf_detr', '--input', files['detr_timm'], '--output',
          tmp_path / 'ckpt']
  spec = CONFIG['detr']['spec']
  error = refused(capsys, *args, '--config', spec, '--config.data.labels=coco')
  for part in ('model.backbone.depth is 50, the file has 18',
               'model.width is 256, the file has 32',
               '--config.model.backbone.depth=18', '--config.model.width=32',
               '--config.model.num_queries=8', '--config.data.labels=scenes'):
    assert part in error
  advice = re.findall(r'--config\.\S+=\S+', error)
  run(*args, '--config', spec, *advice, '--config.model.attention_heads=4')
  assert ('model.attention_heads=4 is taken from --config'
          in capsys.readouterr().out)


def test_of_another_trunk(files, tmp_path, capsys):
  error = refused(capsys, '--format', 'hf_resnet', '--input', files['resnet'],
                  '--config', f'{BASE}:tiny', '--output', tmp_path / 'ckpt')
  assert "model.backbone.name is patch_cnn, the file has resnet" in error


def test_heads_come_from_the_config_json_beside(files, tmp_path, capsys):
  os.link(files['detr_timm'], tmp_path / 'model.safetensors')
  args = ['--format', 'hf_detr', '--input', tmp_path / 'model.safetensors',
          *config_args('detr'), '--output', tmp_path / 'ckpt']
  beside = tmp_path / 'config.json'
  beside.write_text(json.dumps({
      'encoder_attention_heads': 8, 'decoder_attention_heads': 8,
      'activation_function': 'relu', 'dilation': True}))
  error = refused(capsys, *args)
  assert 'model.attention_heads is 4, the file has 8' in error
  assert '--config.model.backbone.dilated=True' in error
  beside.write_text('{"encoder_attention_heads": 8, '
                    '"decoder_attention_heads": 4}')
  assert 'are 8 and 4; expected the same' in refused(capsys, *args)
  beside.write_text('not JSON')
  assert 'config.json' in refused(capsys, *args)


def test_of_another_format(files, tmp_path, capsys):
  args = [*config_args('detr'), '--output', tmp_path / 'ckpt']
  error = refused(capsys, '--format', 'hf_bert', '--input',
                  files['detr_timm'], *args)
  assert 'did you mean --format hf_detr?' in error
  error = refused(capsys, '--format', 'hf_dert', '--input',
                  files['detr_timm'], *args)
  assert "did you mean 'hf_detr'?" in error
  error = refused(capsys, '--input', files['detr_timm'], *args)
  assert '--format is needed' in error
  error = refused(capsys, '--format', 'hf_detr', '--input',
                  files['detr_timm'], '--output', tmp_path / 'ckpt')
  assert '--config is needed' in error


def test_tensors_of_other_shapes_types_or_names(files, tmp_path, capsys):
  args = [*config_args('detr'), '--output', tmp_path / 'ckpt']
  name = 'model.encoder.layers.0.fc2.weight'
  good = safetensors.numpy.load_file(files['detr_timm'])

  def attempt(changes):
    path = save(tmp_path / 'bad.safetensors', {**good, **changes})
    return refused(capsys, '--format', 'hf_detr', '--input', path, *args)
  error = attempt({name: np.zeros((32, 47), np.float32)})
  assert f'{name} is [32, 47], expected [32, 48]' in error
  assert f'{name} is int8, expected one of float32' in attempt(
      {name: good[name].astype(np.int8)})
  assert f'{name} is float64' in attempt({name: good[name].astype(float)})
  path = save(tmp_path / 'less.safetensors',
              {k: v for k, v in good.items() if k != name})
  error = refused(capsys, '--format', 'hf_detr', '--input', path, *args)
  assert f'not whole: it lacks {name}' in error
  assert 'two names' in attempt(
      {name.replace('.fc2', '.mlp.fc2'): good[name]})
  # A tensor that nobody knows is listed, and no reason to stop.
  path = save(tmp_path / 'more.safetensors',
              {**good, 'model.extra': np.zeros(3, np.float32)})
  run('--format', 'hf_detr', '--input', path, *args)
  assert 'model.extra (unknown to this format)' in capsys.readouterr().out


def test_files_that_are_no_weights(files, tmp_path, capsys):
  args = ['--format', 'hf_detr', *config_args('detr'), '--output',
          tmp_path / 'ckpt']
  data = pathlib.Path(files['detr_timm']).read_bytes()
  for name, content in (('text', b'hello'), ('empty', b''),
                        ('short', data[:len(data) // 2]),
                        ('header', data[:200])):
    path = tmp_path / f'{name}.safetensors'
    path.write_bytes(content)
    error = refused(capsys, '--input', path, *args)
    assert f'{name}.safetensors' in error and 'safetensors file' in error
  (tmp_path / 'weights.h5').write_bytes(b'')
  assert '.safetensors' in refused(capsys, '--input', tmp_path / 'weights.h5',
                                   *args)
  assert 'no file' in refused(capsys, '--input', tmp_path / 'none', *args)
  error = refused(capsys, '--input', tmp_path, *args)
  assert 'a folder, with' in error and 'text.safetensors' in error
  assert not (tmp_path / 'ckpt').exists()


def test_an_output_that_exists_is_kept(files, tmp_path, capsys):
  (tmp_path / 'ckpt').mkdir()
  (tmp_path / 'ckpt' / 'mine').write_text('')
  error = refused(capsys, '--format', 'hf_detr', '--input',
                  files['detr_timm'], *config_args('detr'), '--output',
                  tmp_path / 'ckpt')
  assert 'exists' in error
  back = tmp_path / 'back.safetensors'
  back.write_text('mine')
  assert 'exists' in refused(capsys, '--export', '--input', tmp_path,
                             '--output', back)
  assert back.read_text() == 'mine'
  assert 'none found' in refused(capsys, '--export', '--input', tmp_path,
                                 '--output', tmp_path / 'new.safetensors')
  assert '.safetensors' in refused(capsys, '--export', '--input', tmp_path,
                                   '--output', tmp_path / 'new.bin')
  assert '--config' in refused(capsys, '--export', '--input', tmp_path,
                               *config_args('detr'), '--output', back)


def test_torch_files_without_torch(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'model.bin').write_bytes(b'')
  error = refused(capsys, '--format', 'hf_detr', '--input',
                  tmp_path / 'model.bin', *config_args('detr'), '--output',
                  tmp_path / 'ckpt')
  assert '[torch]' in error and '.safetensors' in error


class _Trap:
  """Unpickling this makes a file."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return (open, (self.path, 'w'))


def test_a_pickle_with_code_is_refused(torch_extra, tmp_path, capsys):
  import torch  # pylint: disable=import-outside-toplevel
  trap = tmp_path / 'sprung'
  pickle.loads(pickle.dumps(_Trap(trap))).close()
  assert trap.exists()  # the trap works
  trap.unlink()
  args = ['--format', 'hf_detr', *config_args('detr'), '--output',
          tmp_path / 'ckpt']
  content = {'weight': torch.zeros(2), 'trap': _Trap(trap)}
  torch.save(content, tmp_path / 'new.pth')
  torch.save(content, tmp_path / 'old.bin',
             _use_new_zipfile_serialization=False)
  (tmp_path / 'plain.pt').write_bytes(pickle.dumps(_Trap(trap)))
  for name in ('new.pth', 'old.bin', 'plain.pt'):
    error = refused(capsys, '--input', tmp_path / name, *args)
    assert 'refused and nothing in it was run' in error
    assert not trap.exists()
  whole = (tmp_path / 'new.pth').read_bytes()
  for name, data in (('text.pth', b'hello'), ('empty.bin', b''),
                     ('short.pth', whole[:len(whole) // 2])):
    (tmp_path / name).write_bytes(data)
    assert name in refused(capsys, '--input', tmp_path / name, *args)
  torch.save([torch.zeros(2)], tmp_path / 'list.pth')
  assert 'dict of tensors' in refused(capsys, '--input',
                                      tmp_path / 'list.pth', *args)


def test_torch_files_give_the_same(torch_extra, files, tmp_path):
  import torch  # pylint: disable=import-outside-toplevel
  want = safetensors.numpy.load_file(files['torchvision'])
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in want.items()}
  half = {k: v.bfloat16() if v.is_floating_point() else v
          for k, v in tensors.items()}
  cases = {'plain.pth': (tensors, {}),
           'old.bin': (tensors, {'_use_new_zipfile_serialization': False}),
           'wrapped.pt': ({'state_dict': tensors, 'epoch': 3}, {}),
           'half.pth': (half, {})}
  for name, (content, options) in cases.items():
    torch.save(content, tmp_path / name, **options)
    got, = weights_io.read(str(tmp_path / name)).values()
    assert set(got) == set(want)
    for key, x in want.items():
      if name == 'half.pth' and x.dtype == np.float32:
        x = x.astype(ml_dtypes.bfloat16)
      assert got[key].dtype == x.dtype
      np.testing.assert_array_equal(got[key], x)
  run('--format', 'torchvision_resnet', '--input', tmp_path / 'half.pth',
      *config_args('detr'), '--output', tmp_path / 'ckpt')
  _, _, meta = checkpoint.load(str(tmp_path / 'ckpt'))
  kinds = {kind for _, kind in meta['converted']['tensors'].values()}
  assert kinds == {'bfloat16'}


def test_transformers_files(torch_extra, tmp_path, capsys):
  """A file that transformers writes, and transformers reads the export."""
  from tests import parity_torch  # pylint: disable=import-outside-toplevel
  import transformers  # pylint: disable=import-outside-toplevel
  c = CONFIG['detr']
  case = parity.Detr(18, c['model.width'], c['model.attention_heads'],
                     c['model.ffn'], 1, 2, 8, 6, (64, 64), ((64, 64),), (1,))
  model = parity_torch.detr(case)
  model.save_pretrained(tmp_path / 'hf')
  file = tmp_path / 'hf' / 'model.safetensors'
  run('--format', 'hf_detr', '--input', file, *config_args(
      'detr', **{'model.backbone.stem': 64, 'model.backbone.width': 64}),
      '--output', tmp_path / 'ckpt')
  # config.json lies beside it, so the heads are known.
  assert 'taken from --config' not in capsys.readouterr().out
  back = tmp_path / 'back' / 'model.safetensors'
  run('--export', '--input', tmp_path / 'ckpt', '--output', back)
  a, b = (safetensors.numpy.load_file(f) for f in (file, back))
  assert set(a) == set(b)
  assert all(a[k].tobytes() == b[k].tobytes() for k in a)
  (tmp_path / 'back' / 'config.json').write_text(
      (tmp_path / 'hf' / 'config.json').read_text())
  again = transformers.DetrForObjectDetection.from_pretrained(
      tmp_path / 'back')
  for (k, x), y in zip(model.state_dict().items(),
                       again.state_dict().values()):
    assert x.equal(y), k


def test_every_format_is_documented():
  page = (REPO / 'docs' / 'weights.md').read_text()
  for name in mapping.formats():
    assert f'`{name}`' in page
