"""Damaged checkpoints: one line from every command, and a run that goes on."""
import glob
import json
import os
import shutil

import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import convert
from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import predict
from e2e_vlp_jax import train
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import checkpointer
from e2e_vlp_jax.training import train_step
from e2e_vlp_jax.training import workdir as workdir_lib

# Orbax leaves futures behind when a file is damaged.
pytestmark = pytest.mark.filterwarnings(
    'ignore::pytest.PytestUnraisableExceptionWarning')
OPTIONS = ml_collections.ConfigDict(dict(
    every_steps=1, every_minutes=0, keep=5, keep_every=0, best='eval/a/b'))
META = {'config': {'data': {'dir': 'd'}, 'model': {'name': 'none'}},
        'tokenizer': {'kind': 'wordpiece', 'tokens': []},
        'labels': {'classes': []}}


def state(step, ema=True):
  """A TrainState of two small arrays, one of them in a file of its own."""
  rng = np.random.default_rng(step)
  params = lambda: {'a': {'kernel': rng.normal(size=(32, 16))},
                    'b': np.arange(5.) * step}
  tree = lambda x: jax.tree.map(lambda y: jax.numpy.float32(y), x)
  return train_step.TrainState(
      step=jax.numpy.int32(step), params=tree(params()),
      model_state=tree({'batch_stats': {'mean': np.ones(3) * step}}),
      opt_state=(jax.numpy.zeros(4),), rng=jax.random.key(0),
      ema_params=tree(params()) if ema else None,
      bad_steps=jax.numpy.int32(0))


def saver(folder):
  return checkpointer.Checkpointer(str(folder), META, OPTIONS)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A WORKDIR with the steps 2 and 4."""
  folder = tmp_path_factory.mktemp('whole')
  with saver(folder) as s:
    for step in (2, 4):
      s.save(step, state(step), {'eval/a/b': step / 5})
    s.wait()
  return folder


@pytest.fixture
def run(whole, tmp_path):
  """A copy of it."""
  shutil.copytree(whole, tmp_path / 'run')
  return tmp_path / 'run'


def equal(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      np.array_equal(x, y)
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


# --- What happens to files ----------------------------------------------------
def unreadable(path):
  """Permissions do not stop root; a link to itself stops everybody."""
  path.unlink()
  path.symlink_to(path)


def largest(folder):
  """The file of an item's folder that holds an array."""
  return max(folder.glob('ocdbt.process_0/d/*'), key=os.path.getsize)


EMPTY = {'meta': '{}', 'null': 'null', 'half': '{"config": {"da', 'none': '',
         'list': '[1]', 'config': '{"config": {}, "tokenizer": {}}'}
# {name: (what is done to the folder of step 4, what the line says of it)}
DAMAGES = {
    'array cut': (lambda d: os.truncate(largest(d / 'ema_params'), 100),
                  'ema_params is damaged (OUT_OF_RANGE: Error reading '
                  '"a.kernel/0.0"'),
    'array lost': (lambda d: largest(d / 'ema_params').unlink(),
                   'ema_params is damaged'),
    'array unreadable': (
        lambda d: unreadable(largest(d / 'ema_params')),
        'Too many levels of symbolic links'),
    'index broken': (lambda d: (d / 'ema_params/_METADATA').write_text('{'),
                     'ema_params is damaged (incomplete)'),
    'index lost': (lambda d: (d / 'model_state/manifest.ocdbt').unlink(),
                   'model_state is damaged (incomplete)'),
    **{f'meta {name}': (
        lambda d, text=text: (d / 'meta/metadata').write_text(text), 'its meta')
       for name, text in EMPTY.items()},
    'meta lost': (lambda d: (d / 'meta/metadata').unlink(),
                  'its meta is damaged'),
    'meta unreadable': (lambda d: unreadable(d / 'meta/metadata'),
                        'its meta is damaged (meta/metadata: Too many levels'),
    **{f'no {item}': (lambda d, item=item: shutil.rmtree(d / item),
                      f'it lacks {item}')
       for item in ('params', 'ema_params', 'model_state', 'meta')},
    'nothing': (lambda d: (shutil.rmtree(d), d.mkdir()),
                'it lacks meta, params')}


@pytest.mark.parametrize('name', DAMAGES)
def test_the_line_names_what_is_damaged_and_the_newest_whole_step(run, name):
  damage, says = DAMAGES[name]
  damage(run / 'checkpoints/4')
  with pytest.raises(errors.UserError) as e:
    checkpoint.load(str(run))
  line = str(e.value)
  print(line)
  assert line.startswith(f"checkpoint: '{run}/checkpoints/4' cannot be read: ")
  assert says in line and '\n' not in line and len(line) < 700
  assert line.endswith(
      f"; the newest whole step is '{run}/checkpoints/2'")
  *trees, meta = checkpoint.load(str(run / 'checkpoints/2'))
  assert meta['step'] == 2
  want = state(2)
  assert equal(trees, [want.ema_params, want.model_state])


def test_no_other_step_is_whole(run):
  for step in (2, 4):
    shutil.rmtree(run / f'checkpoints/{step}/params')
  with pytest.raises(errors.UserError, match='4.*it lacks params; no other '
                     'step beside it is whole'):
    checkpoint.load(str(run))


@pytest.mark.parametrize('kind', ['delete', 'halve', 'zeros'])
def test_any_file_lost_halved_or_blank(whole, tmp_path, kind):
  """The same arrays, or the line; nothing in between."""
  *want, _ = checkpoint.load(str(whole))
  files = [os.path.relpath(f, whole) for f in glob.glob(
      f'{whole}/checkpoints/4/**', recursive=True) if os.path.isfile(f)
           and not f.endswith('commit_success.txt')]
  files = [f for f in files if '/opt_state/' not in f]
  assert len(files) > 12
  refused = 0
  for number, name in enumerate(files):
    copy = tmp_path / str(number)
    shutil.copytree(whole, copy / 'run')
    file = copy / 'run' / name
    size = file.stat().st_size
    if kind == 'delete':
      file.unlink()
    elif kind == 'halve':
      os.truncate(file, size // 2)
    else:
      file.write_bytes(bytes(size))
    try:
      *got, _ = checkpoint.load(str(copy / 'run'))
      assert equal(got, want), name
    except errors.UserError as e:
      assert 'the newest whole step is' in str(e), name
      refused += 1
  assert refused > 5


def test_only_what_is_read_must_be_there(run):
  """Who only predicts may delete the largest item."""
  shutil.rmtree(run / 'checkpoints/4/opt_state')
  assert checkpoint.load(str(run))[-1]['step'] == 4


def test_a_step_under_another_name(run):
  (run / 'checkpoints/4').rename(run / 'best')
  with pytest.raises(errors.UserError, match='best.*not named by its step'):
    checkpoint.load(str(run / 'best'))


# --- Every command that opens a checkpoint -----------------------------------
def _photo(folder):
  Image.new('RGB', (8, 8)).save(folder / 'a.png')
  return folder / 'a.png'


def _weights(folder):
  (folder / 'x.safetensors').write_bytes(b'')
  return str(folder / 'x.safetensors')


COMMANDS = {
    'predict': lambda run, out: predict.main([
        '--checkpoint', run, '--task', 'detect', '--image',
        str(_photo(out))]),
    'evaluate': lambda run, out: evaluate.main([
        '--checkpoint', run, '--workdir', str(out)]),
    'export': lambda run, out: convert.main([
        '--export', '--format', 'hf_detr', '--input', run, '--output',
        str(out / 'x.safetensors')]),
    'onto': lambda run, out: convert.main([
        '--format', 'hf_detr', '--input', _weights(out), '--onto', run,
        '--config', 'configs/e2e_vlp.py:detr', '--output', str(out / 'x')]),
    'finetune': lambda run, out: train.main([
        '--config', f'configs/finetune.py:answer,from={run}', '--workdir',
        str(out)])}


@pytest.mark.parametrize('command,damage', [
    (command, damage) for command in COMMANDS
    for damage in ('no meta', 'meta meta', 'array cut')
    # It reads no array before it trains; then as `init_from`.
    if (command, damage) != ('finetune', 'array cut')])
def test_every_command_ends_with_that_line(run, tmp_path, capsys, command,
                                           damage):
  DAMAGES[damage][0](run / 'checkpoints/4')
  (tmp_path / 'out').mkdir()
  with pytest.raises(SystemExit) as e:
    COMMANDS[command](str(run), tmp_path / 'out')
  error = capsys.readouterr().err
  assert e.value.code == 2 and error.count('\n') == 1, error
  assert error.startswith('error: ')
  assert f"{run}/checkpoints/4' cannot be read" in error
  assert f"the newest whole step is '{run}/checkpoints/2'" in error


def test_init_from_ends_with_that_line(run):
  DAMAGES['array cut'][0](run / 'checkpoints/4')
  with pytest.raises(errors.UserError, match='newest whole step is.*/2'):
    checkpoint.start_from(str(run), state(0), lambda x: x)


# --- A run that goes on -------------------------------------------------------
def no_opt_state(folder):
  shutil.rmtree(folder / 'opt_state')


def no_opt_state_nor_list(folder):
  no_opt_state(folder)
  (folder / '_CHECKPOINT_METADATA').write_text('{')


@pytest.mark.parametrize('damage', [no_opt_state, no_opt_state_nor_list, *(
    DAMAGES[name][0] for name in (
        'no params', 'no ema_params', 'no model_state', 'no meta', 'nothing',
        'array cut', 'index broken', 'meta meta', 'meta half'))])
def test_a_run_sets_it_aside_and_goes_on_from_the_one_before(run, damage):
  damage(run / 'checkpoints/4')
  with saver(run) as s:
    got = s.restore(state(0))
    assert int(got.step) == 2
    assert equal([got.params, got.ema_params, got.model_state],
                 [state(2).params, state(2).ema_params,
                  state(2).model_state])
    s.save(4, state(4), {'eval/a/b': .1})
    s.wait()
  assert (run / 'damaged_checkpoint_4').is_dir()
  assert checkpoint.load(str(run))[-1]['step'] == 4


def test_another_model_is_not_set_aside(whole, tmp_path):
  """What was never saved is not lacking."""
  with saver(tmp_path) as s:
    s.save(2, state(2, ema=False), {'eval/a/b': .1})
    s.wait()
    with pytest.raises(errors.UserError, match='has no ema_params'):
      s.restore(state(0))
  assert not list(tmp_path.glob('damaged*'))


@pytest.mark.parametrize('damage', [
    None, no_opt_state, DAMAGES['no params'][0], DAMAGES['meta half'][0]])
def test_a_sweep_finishes_a_run_whose_last_step_is_damaged(run, damage):
  config = ml_collections.ConfigDict({'total_steps': 4})
  (run / 'config.json').write_text(json.dumps(config.to_dict()))
  if damage:
    damage(run / 'checkpoints/4')
  assert workdir_lib.finished(str(run), config) == (damage is None)
