"""Weights files as people have them: shards, several sets, what is refused."""
import argparse
import json
import pathlib
import types

import flax
import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from e2e_vlp_jax import cli
from e2e_vlp_jax import convert
from e2e_vlp_jax import errors
from e2e_vlp_jax.models import resnet as resnet_lib
from e2e_vlp_jax.weights import files
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import resnet
from e2e_vlp_jax.weights import sets
from e2e_vlp_jax.weights import torchvision_resnet
from tests import commands

# The least that torchvision_resnet takes for its own.
TENSORS = {name: np.full((2, 3), i, np.float32) for i, name in enumerate(
    (*torchvision_resnet.SIGNATURE, 'layer1.0.conv2.weight'))}
SHARDS = ('model-00001-of-00002.safetensors',
          'model-00002-of-00002.safetensors')
INDEX = 'model.safetensors.index.json'


def save(path, tensors):
  safetensors.numpy.save_file(tensors, path)
  return str(path)


def times(tensors, factor):
  return {k: v * factor for k, v in tensors.items()}


def equal(a, b):
  return set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture
def hub(tmp_path):
  """A folder as model hubs have them: an index and two shards."""
  names = sorted(TENSORS)
  places = {n: SHARDS[i >= 2] for i, n in enumerate(names)}
  for shard in SHARDS:
    save(tmp_path / shard, {n: TENSORS[n] for n in names
                            if places[n] == shard})
  (tmp_path / INDEX).write_text(json.dumps(
      {'metadata': {'total_size': 96}, 'weight_map': places}))
  (tmp_path / 'config.json').write_text('{"a": 1}')
  return tmp_path


def refused(capsys, path, *args):
  """The one line of a conversion that is refused."""
  line = commands.refused(
      convert.main, '--format', 'torchvision_resnet', '--config',
      'configs/e2e_vlp.py:detr,data=scenes', '--input', str(path), '--output',
      str(pathlib.Path(path).parent / 'never'), '--config.data.labels=scenes',
      *args, capsys=capsys)
  print(line)
  assert str(path) in line
  return line


# --- Shards -------------------------------------------------------------------
@pytest.mark.parametrize('name', ['', INDEX])
def test_a_folder_or_its_index_has_all_tensors(hub, name):
  path = files.find(str(hub / name))
  assert path == str(hub / INDEX)
  found, = files.read(path).values()
  assert equal(found, TENSORS)
  assert files.read_config(path) == {'a': 1}


def test_a_folder_with_one_file(tmp_path):
  save(tmp_path / 'model.safetensors', TENSORS)
  (tmp_path / 'pytorch_model.bin').write_bytes(b'the same, for old readers')
  assert files.find(str(tmp_path)) == str(tmp_path / 'model.safetensors')


def test_torch_shards(torch_extra, hub):
  import torch  # pylint: disable=import-outside-toplevel
  for shard in SHARDS:
    tensors = safetensors.numpy.load_file(hub / shard)
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()},
               hub / shard.replace('safetensors', 'bin'))
    (hub / shard).unlink()
  index = (hub / INDEX).read_text()
  (hub / INDEX).unlink()
  (hub / 'pytorch_model.bin.index.json').write_text(
      index.replace('safetensors', 'bin'))
  found, = files.read(files.find(str(hub))).values()
  assert equal(found, TENSORS)


def rewrite(hub, **places):
  index = json.loads((hub / INDEX).read_text())
  index['weight_map'] |= places
  (hub / INDEX).write_text(json.dumps(index))


def cut(hub):
  data = (hub / SHARDS[1]).read_bytes()
  (hub / SHARDS[1]).write_bytes(data[:-9])


def repeat(hub):
  tensors = safetensors.numpy.load_file(hub / SHARDS[1])
  save(hub / SHARDS[1], {**tensors, min(TENSORS): np.ones(1, np.float32)})


BAD_SHARDS = {
    'shard lost': (lambda hub: (hub / SHARDS[1]).unlink(),
                   '1 of 2 shards are not in its folder: ' + SHARDS[1]),
    'shard cut': (cut, f'{SHARDS[1]}\' is not a complete safetensors file'),
    'tensor lost': (lambda hub: rewrite(hub, more=SHARDS[0]),
                    f"{SHARDS[0]}' lacks tensors of its index: more"),
    'tensor twice': (repeat, f"has the tensor {min(TENSORS)!r} twice, in "
                     f'{SHARDS[0]} and {SHARDS[1]}'),
    'elsewhere': (lambda hub: rewrite(hub, more='../other.safetensors'),
                  "names the file '../other.safetensors'; expected one in"),
    'index half': (lambda hub: (hub / INDEX).write_text('{"weight_m'),
                   'is not an index with a weight_map (JSONDecodeError'),
    'index empty': (lambda hub: (hub / INDEX).write_text('{}'),
                    "is not an index with a weight_map (KeyError: "),
    'index of numbers': (lambda hub: rewrite(hub, more=3),
                         'is not a table of tensor names and file names'),
    'index lost': (lambda hub: (hub / INDEX).unlink(),
                   f'with {SHARDS[0]}, {SHARDS[1]} in it, but no index'),
    'two models': (lambda hub: save(hub / 'other.safetensors', TENSORS),
                   f'with {SHARDS[0]}, {SHARDS[1]}, {INDEX}, '
                   'other.safetensors in it')}


@pytest.mark.parametrize('name', BAD_SHARDS)
def test_shards_that_are_refused(hub, capsys, name):
  damage, says = BAD_SHARDS[name]
  damage(hub)
  assert says in refused(capsys, hub)


def test_one_shard_alone_is_refused(hub, capsys):
  assert f'is one of 2 shards; expected their folder, or {INDEX}' in refused(
      capsys, hub / SHARDS[0])


# --- Several sets -------------------------------------------------------------
def torch_file(path, tree):
  import torch  # pylint: disable=import-outside-toplevel

  def tensors(node):
    if isinstance(node, dict):
      return {k: tensors(v) for k, v in node.items()}
    return torch.from_numpy(node) if isinstance(node, np.ndarray) else node
  torch.save(tensors(tree), path)
  return str(path)


AVERAGE = times(TENSORS, 10)
SCRIPTS = {  # {name: (what a script saves, set by default, the other one)}
    'timm': ({'state_dict': TENSORS, 'state_dict_ema': AVERAGE, 'epoch': 3},
             'state_dict', 'state_dict_ema'),
    'detr': ({'model_ema': AVERAGE, 'model': TENSORS,
              'optimizer': {'state': {0: {'exp_avg': np.ones(3)}}}},
             'model', 'model_ema'),
    'wrapped': ({'model': TENSORS, 'ema': {'module': AVERAGE, 'updates': 9}},
                'model', 'ema.module'),
    'lightning': ({'state_dict': {
        **TENSORS, **{f'ema.{k}': v for k, v in AVERAGE.items()}}},
                  'state_dict', 'state_dict.ema')}


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_trained_weights_are_taken_and_the_others_named(
    torch_extra, tmp_path, name):
  tree, default, other = SCRIPTS[name]
  path = torch_file(tmp_path / 'x.pth', tree)
  choose = lambda wanted: sets.choose(torchvision_resnet, files.read(path),
                                      wanted, path)
  chosen, tensors, others = choose(None)
  assert (chosen, others) == (default, [other])
  assert all(np.array_equal(tensors[k], v) for k, v in TENSORS.items())
  for wanted in {other, other.rpartition('.')[2]}:
    chosen, tensors, others = choose(wanted)
    assert (chosen, others) == (other, [default])
    assert equal(tensors, AVERAGE)


def test_sets_of_a_safetensors_file(tmp_path):
  both = {**TENSORS, **{f'model_ema.{k}': v for k, v in AVERAGE.items()}}
  path = save(tmp_path / 'x.safetensors', both)
  chosen, tensors, others = sets.choose(torchvision_resnet, files.read(path),
                                        None, path)
  assert (chosen, others) == ('', ['model_ema']) and equal(tensors, both)
  chosen, tensors, others = sets.choose(torchvision_resnet, files.read(path),
                                        'model_ema', path)
  assert (chosen, others) == ('model_ema', ['']) and equal(tensors, AVERAGE)


def test_a_prefix_of_the_format_itself_is_no_set():
  """'module.' stands before every name of a file of DataParallel."""
  own = {f'module.{k}': v for k, v in TENSORS.items()}
  chosen, tensors, others = sets.choose(torchvision_resnet, {'': own}, None,
                                        'x')
  assert (chosen, others) == ('', []) and equal(tensors, own)


def test_a_student_and_its_teacher_must_be_chosen(torch_extra, tmp_path,
                                                  capsys):
  path = torch_file(tmp_path / 'x.pth', {'student': TENSORS,
                                         'teacher': AVERAGE})
  assert 'several sets of weights: student, teacher; choose one with --set' in (
      refused(capsys, path))
  assert "has no set 'techer'; did you mean 'teacher'?" in refused(
      capsys, path, '--set', 'techer')


def test_weights_under_a_prefix_alone(tmp_path, capsys):
  path = save(tmp_path / 'x.safetensors',
              {f'{p}.{k}': v for k, v in TENSORS.items() for p in 'ab'})
  error = refused(capsys, path)
  assert 'only under a prefix: say --set a or --set b' in error


def test_sets_are_not_for_exports(tmp_path, capsys):
  with pytest.raises(SystemExit):
    convert.main(['--export', '--input', 'x', '--set', 'y', '--output',
                  str(tmp_path / 'y.safetensors')])
  assert '--set: not with --export' in capsys.readouterr().err


# --- Values -------------------------------------------------------------------
def source(**tensors):
  """A format whose files have just these tensors."""
  return types.SimpleNamespace(
      SURPLUS=(), COPIES={}, entries=lambda config: [
          mapping.Entry(name, f'params/{name}') for name in tensors])


@pytest.mark.parametrize('kind', files.FLOATS.values(), ids=str)
def test_values_that_are_not_finite_are_refused(kind):
  bad = np.zeros((2, 3), kind)
  bad[0, 1:] = np.nan, -np.inf
  worse = np.full(2, np.inf, kind)
  tensors = dict(bad=bad, good=np.ones(3, kind), worse=worse)
  spelled = {k: (f'their.{k}', v) for k, v in tensors.items()}
  shapes = {f'params/{k}': v.shape for k, v in tensors.items()}
  with pytest.raises(errors.UserError) as e:
    mapping.to_ours(source(**tensors), spelled, None, shapes, 'x.pth')
  assert str(e.value).startswith(
      "--input 'x.pth': 2 tensor(s) have values that are not finite (NaN or "
      'infinite): their.bad (2 of 6); their.worse (2 of 2)')
  # What the model does not use may be anything, such as a mask of -inf.
  del shapes['params/bad'], shapes['params/worse']
  variables, _ = mapping.to_ours(source(**tensors), spelled, None, shapes,
                                 'x')
  assert set(variables) == {'params/good'}
  with pytest.raises(errors.UserError, match=r'checkpoint: 1 .*a \(1 of'):
    mapping.to_theirs(source(a=0), {'params/a': np.array([1, np.nan])}, None)


def test_bfloat16_beyond_float16_is_finite():
  large = np.full(2, 3e38, ml_dtypes.bfloat16)
  mapping.check_finite('x', {'large': large})


# --- Other classes in torch files ---------------------------------------------
class Meter:
  """Of somebody's training script."""

  def __init__(self):
    self.average = 1.


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'old'])
@pytest.mark.parametrize('content,classes', [
    (argparse.Namespace(lr=1), 'argparse.Namespace'),
    (pathlib.PurePosixPath('runs/1'), 'pathlib.PurePosixPath'),
    (Meter(), f'{__name__}.Meter'),
    (np.float64(3), 'numpy._core.multiarray.scalar')])
def test_the_line_names_the_class(torch_extra, tmp_path, capsys, content,
                                  classes, zipped):
  import torch  # pylint: disable=import-outside-toplevel
  path = tmp_path / ('a' * 60 + '.pth')
  torch.save({'model': {'a': torch.zeros(2)}, 'args': content}, path,
             _use_new_zipfile_serialization=zipped)
  error = refused(capsys, path)
  assert 'refused and nothing in it was run: besides tensors it holds' in error
  held = error.partition('it holds ')[2].partition('; expected')[0]
  assert classes in held.split(', ')
  assert 'weights_only' not in error and '\x1b' not in error


def test_all_classes_are_named(torch_extra, tmp_path, capsys):
  import torch  # pylint: disable=import-outside-toplevel
  torch.save({'args': argparse.Namespace(), 'meter': Meter()},
             tmp_path / 'x.pth')
  assert f'it holds argparse.Namespace, {__name__}.Meter; expected' in refused(
      capsys, tmp_path / 'x.pth')


def test_what_is_not_a_tensor_is_named(torch_extra, tmp_path, capsys):
  path = torch_file(tmp_path / 'x.pth', {'model': {**TENSORS, 'steps': 3}})
  assert "tensors by name: 4 tensors, but also 'steps', int" in refused(
      capsys, path)


# --- Formats ------------------------------------------------------------------
CONFIGS = {'hf_detr': 'e2e_vlp.py:detr', 'hf_resnet': 'e2e_vlp.py:detr',
           'torchvision_resnet': 'e2e_vlp.py:detr', 'hf_bert': 'soho.py:r18',
           'soho': 'soho.py:r18', 'hf_swin': 'fiber.py:base',
           'timm_swin': 'fiber.py:base', 'hf_roberta': 'fiber.py:base',
           'fiber_coarse': 'fiber.py:base',
           'fiber_fine': 'fiber_fine.py:base'}


@pytest.mark.parametrize('name', mapping.formats())
def test_a_published_file_is_one_set(name):
  source_ = mapping.find(name)
  config = cli.load_config(f'configs/{CONFIGS[name]}')
  tensors = {e.theirs: None for e in source_.entries(config)}
  assert sets.choose(source_, {'': tensors}, None, 'x') == ('', tensors, [])


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('stem,width', [(12, 12), (12, 10), (40, 10)])
def test_every_variable_of_a_trunk_has_its_tensor(depth, stem, width):
  """A stem wider than the first stage makes a shortcut in its first block."""
  model = resnet_lib.ResNet(depth=depth, stem=stem, width=width)
  shapes = jax.eval_shape(model.init, jax.random.key(0),
                          np.zeros((1, 64, 64, 3), np.float32))
  ours = {f'{kind}/backbone/{"/".join(path)}' for kind in shapes
          for path in flax.traverse_util.flatten_dict(shapes[kind])}
  config = ml_collections.ConfigDict({'model': {'backbone': {
      'depth': depth, 'stem': stem, 'width': width}}})
  assert {e.ours for e in resnet.entries(config)} == ours
