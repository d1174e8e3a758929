"""Training: it learns, resumes exactly, refuses what does not fit."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import models
from e2e_vlp_jax import train
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import workdir as workdir_lib
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step
from tests import small_run

SIZES = dict(vocab_size=50, num_classes=6, num_attributes=13)


def small_config(data_dir='', **changes):
  config = small_run.get_config()
  config.update_from_flattened_dict({'data.dir': str(data_dir), **changes})
  return config


def mesh_of(**axes):
  axes = {'data': 1, 'fsdp': 1, 'tensor': 1, **axes}
  return sharding.make_mesh(axes, jax.devices()[:int(np.prod(
      list(axes.values())))])


def setup_step(config, mesh, seed=0):
  """(state, step function, batch) on synthetic data."""
  make = lambda size: synthetic.synthetic_batch(
      config.data, batch_size=size, seed=seed, **SIZES)
  assembly = assemble.Assembly(config, models.build(config, **SIZES), mesh,
                               make(1))
  # Not the assembly's own step, which consumes its state.
  step = jax.jit(train_step.make_train_step(
      assembly.model, assembly.objectives[-1],
      assembly.optimizer(assembly.stages[-1]), mesh=mesh,
      accumulate=config.accumulate,
      shardings=assembly.shardings.params))
  return assembly.init(), step, sharding.shard_batch(mesh, make(8))


@pytest.fixture(scope='module')
def one_batch():
  """`setup_step` of a small run."""
  return setup_step(small_config(**{
      'optim.warmup_steps': 5, 'total_steps': 150, 'warm_start.steps': 0}),
                    mesh_of())


def test_overfits_one_batch(one_batch):
  state, step, batch = one_batch
  first = None
  for _ in range(140):  # The small model has one layer.
    state, metrics = step(state, batch)
    first = first or jax.device_get(metrics)
  last = jax.device_get(metrics)
  print({k: (float(first[k]), float(last[k])) for k in last})
  assert last['loss'] < .5 * first['loss']
  for name in ('mlm', 'itm', 'captioning', 'class', 'attributes', 'giou'):
    assert last[name] < first[name], name


def test_nonfinite_update_is_skipped_and_counted(one_batch):
  state, step, batch = one_batch
  bad = dict(batch, boxes=batch['boxes'].at[0].set(jnp.nan))
  after, metrics = step(state, bad)
  assert metrics['skipped'] == 1 and int(after.bad_steps) == 1
  assert metrics['matching_nonfinite'] > 0
  jax.tree.map(np.testing.assert_array_equal, state.params, after.params)
  after, metrics = step(after, batch)
  assert metrics['skipped'] == 0 and int(after.bad_steps) == 0


def read_metrics(workdir):
  lines = [json.loads(line) for line in open(workdir / 'metrics.jsonl')]
  out = {}
  for line in lines:
    for k, v in line.items():
      if k.startswith('train/'):
        out[line['step'], k] = v
  return out


@pytest.fixture(scope='module')
def whole(tiny_scenes, tmp_path_factory):
  """The workdir of a finished, uninterrupted run of `small_config`."""
  workdir = tmp_path_factory.mktemp('whole') / 'w'
  train.train(small_config(tiny_scenes), str(workdir))
  return workdir


def test_killed_run_resumes_to_the_same_bits(whole, tiny_scenes, tmp_path):
  """SIGKILL after a save; the continued run ends like an uninterrupted one."""
  broken = tmp_path / 'broken'
  config = small_config(tiny_scenes)
  script = (
      'import json, sys, time\n'
      'from tests.test_train import small_config\n'
      'from e2e_vlp_jax import train\n'
      'from e2e_vlp_jax.training import checkpointer\n'
      'save = checkpointer.Checkpointer.save\n'
      'def slow(self, step, state, metrics=None):\n'
      '  save(self, step, state, metrics)\n'
      '  self.wait()\n'
      '  if step == 4: print("saved 4", flush=True); time.sleep(600)\n'
      'checkpointer.Checkpointer.save = slow\n'
      f'train.train(small_config({str(tiny_scenes)!r}), {str(broken)!r})\n')
  process = subprocess.Popen([sys.executable, '-c', script],
                             stdout=subprocess.PIPE, text=True,
                             cwd=os.path.dirname(os.path.dirname(__file__)))
  for line in process.stdout:
    if 'saved 4' in line:
      break
  process.send_signal(signal.SIGKILL)
  process.wait()
  train.train(config, str(broken))
  steps = [json.loads(line)['step'] for line in open(broken / 'metrics.jsonl')
           if '"train/loss"' in line]
  assert steps == [1, 2, 3, 4, 5, 6], 'steps were repeated or lost'
  a, b = read_metrics(whole), read_metrics(broken)
  assert set(a) == set(b)
  different = {k: (a[k], b[k]) for k in a if a[k] != b[k]}
  assert not different


def test_damaged_newest_checkpoint_is_set_aside(whole, tiny_scenes, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(whole, workdir)
  for path in (workdir / 'checkpoints' / '6' / 'params').rglob('*'):
    if path.is_file():
      path.write_bytes(b'not a checkpoint')
  train.train(small_config(tiny_scenes), str(workdir))
  assert (workdir / 'damaged_checkpoint_6').is_dir()
  assert not (workdir / 'damaged_checkpoint_4').exists()
  # Went on from step 4, and ended in the same place.
  steps = [json.loads(line)['step'] for line in open(workdir / 'metrics.jsonl')
           if '"train/loss"' in line]
  assert steps == [1, 2, 3, 4, 5, 6, 5, 6]
  saved = [checkpoint.load(str(w)) for w in (whole, workdir)]
  assert [meta['step'] for *_, meta in saved] == [6, 6]
  jax.tree.map(np.testing.assert_array_equal, saved[0][0], saved[1][0])


def test_checkpoint_of_another_size_is_refused(whole, tiny_scenes, tmp_path):
  """By evaluate and by a run that should go on with it."""
  wide = small_config(tiny_scenes, **{'model.width': 64})
  with pytest.raises(errors.UserError, match='another model or size.*'
                     'model.width is 32 there, 64 here'):
    evaluate.evaluate(wide, str(whole), str(tmp_path / 'e'))
  shutil.copytree(whole, tmp_path / 'w')
  (tmp_path / 'w' / 'config.json').unlink()
  with pytest.raises(errors.UserError, match='another model or size'):
    train.train(wide, str(tmp_path / 'w'))
  assert (tmp_path / 'w' / 'checkpoints' / '6' / 'params').is_dir()


def test_init_from_loads_what_fits_and_says_so(whole, tiny_scenes, tmp_path,
                                               capsys):
  config = small_config(tiny_scenes, init_from=str(whole),
                        **{'model.num_queries': 9, 'total_steps': 1,
                           'warm_start.steps': 0, 'ema_decay': .5,
                           'optim.learning_rate': 0.})
  train.train(config, str(tmp_path))
  said = capsys.readouterr().out
  assert re.search(r'[12] of another shape.*query_content', said), said
  assert json.loads((tmp_path / 'init_from.json').read_text())['other_shape']
  # The averaged parameters, which are what is loaded here, start there, too.
  a, b = checkpoint.load(str(whole))[0], checkpoint.load(str(tmp_path))[0]
  np.testing.assert_array_equal(a['encoder']['layer0']['ffn']['in']['kernel'],
                                b['encoder']['layer0']['ffn']['in']['kernel'])
  with pytest.raises(errors.UserError, match='none found'):
    train.train(small_config(tiny_scenes, init_from='/nowhere'),
                str(tmp_path / 'x'))


@pytest.mark.parametrize('changes, message', [
    ({'batch_size': 9}, 'batch_size'),
    ({'data.dir': '/nowhere'}, '/nowhere'),
    ({'objectives.mlm': 0., 'objectives.itm': 0., 'objectives.detection': 0.,
      'objectives.captioning': 0., 'warm_start.steps': 0}, 'objectives'),
    ({'data.max_boxes': 30}, 'max_boxes'),
    ({'mesh.fsdp': 3}, 'mesh'),
    ({'optim.schedule': 'cosin'}, 'cosine'),
    ({'total_steps': 0}, 'total_steps')])
def test_mistakes_are_user_errors(tiny_scenes, tmp_path, changes, message):
  config = small_config(tiny_scenes, **changes)
  with pytest.raises(errors.UserError, match=message):
    train.train(config, str(tmp_path / 'w'))


def test_workdir_of_another_run_is_refused(tiny_scenes, tmp_path):
  config = small_config(tiny_scenes)
  workdir_lib.open_workdir(str(tmp_path), config)
  config.log_every_steps = 3
  workdir_lib.open_workdir(str(tmp_path), config)
  config.optim.clip_norm = 2.  # Nothing was written yet that could be lost.
  workdir_lib.open_workdir(str(tmp_path), config)
  (tmp_path / 'metrics.jsonl').write_text('')
  config.optim.learning_rate = 1.
  before = (tmp_path / 'config.json').read_text()
  with pytest.raises(errors.UserError, match='optim.learning_rate'):
    workdir_lib.open_workdir(str(tmp_path), config)
  assert (tmp_path / 'config.json').read_text() == before


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'step'])
def test_a_run_with_another_schedule_goes_on(tmp_path, schedule):
  """Its config keeps options that only the other schedule reads."""
  config = cli.load_config('configs/e2e_vlp.py:tiny', [
      ('optim.schedule', schedule)])
  workdir_lib.open_workdir(str(tmp_path), config)
  small_run.pretend_saved(tmp_path, config.total_steps)
  workdir_lib.open_workdir(str(tmp_path), config)
  assert workdir_lib.finished(str(tmp_path), config)
  config.optim.learning_rate = 1.
  assert not workdir_lib.finished(str(tmp_path), config)


def test_unwritable_workdir_is_a_user_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot be written'):
    workdir_lib.open_workdir(str(tmp_path / 'file' / 'w'), small_config())


def test_an_objective_that_is_off_has_no_evaluation(tiny_scenes, tmp_path,
                                                    capfd):
  """Its evaluator is left out with a line, and the run ends well."""
  config = small_config(tiny_scenes, **{
      'total_steps': 1, 'warm_start.steps': 0, 'objectives.detection': 0.,
      'objectives.captioning': 0.})
  config.evals = {k: small_run.get_config('evaluated').evals[k]
                  for k in ('captioning', 'mlm')}
  for options in config.evals.values():
    options.max_examples = 8
  scores = train.train(config, str(tmp_path))
  said = ''.join(capfd.readouterr())
  assert 'evals.captioning is left out: this checkpoint was trained' in said
  assert 'eval/mlm/accuracy' in scores
  assert not any('captioning' in k for k in scores)
