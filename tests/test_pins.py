"""What must not move: batches, config values, parameter names, old runs.

`tests/data/pins` was written by the code of November 2026 (5a6402d), before
the library was rearranged. A batch, parameter or config value that has changed
since then breaks somebody's run; a key that was only renamed does not.
"""
import gzip
import hashlib
import json
import os
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import models
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import old_names
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import workdir as workdir_lib

PINS = pathlib.Path(__file__).parent / 'data' / 'pins'
OLD_RUNS = ('e2e_vlp', 'soho', 'fiber')


def read(name):
  with gzip.open(PINS / f'{name}.json.gz', 'rt') as f:
    return json.load(f)


def digests(batch):
  return {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()
                            + str((v.shape, v.dtype)).encode()
                            ).hexdigest()[:16] for k, v in batch.items()}


# --- Batches ----------------------------------------------------------------
@pytest.fixture(scope='module')
def folder(tiny_scenes, shared, tmp_path_factory):
  """scenes, coco and nlvr1, prepared."""
  path = tmp_path_factory.mktemp('pinned')
  os.symlink(tiny_scenes / 'scenes', path / 'scenes')
  for name, source, more in (('coco', 'coco', []),
                             ('nlvr1', 'nlvr', ['--limit', '64'])):
    prepare.main([name, '--data_dir', str(path), '--source',
                  str(shared / 'data' / source), *more])
  return str(path)


@pytest.mark.parametrize('spec', sorted(read('batches')))
def test_batches(spec, folder):
  config = cli.load_config(spec)
  config.data.dir = folder
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  for name, want in read('batches')[spec].items():
    kind, t = name.split('/')
    sources, pp = config.data.train, config.data.pp_train
    if kind != 'train':
      sources = (dict(config.evals[kind].source, weight=1.),)
      pp = config.evals[kind].pp
    data = pipeline_lib.Pipeline(
        config.data, vocabularies=vocabularies, sources=sources, pp=pp,
        seed=config.seed, batch_size=4, train=kind == 'train')
    found = digests(data.batch(int(t)))
    # There may be new keys; the old ones must be unchanged.
    assert {k: found.get(k) for k in want} == want, name


# --- Parameters -------------------------------------------------------------
def names(tree):
  return {sharding.path_name(path): [list(x.shape), str(x.dtype)]
          for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize('spec', sorted(read('parameters')))
def test_parameters(spec):
  want = read('parameters')[spec]
  config = cli.load_config(spec)
  config.batch_size = 8
  sizes = vocabularies_lib.Vocabularies.load(config.data).sizes
  example = synthetic.synthetic_batch(config.data, batch_size=2, **sizes)
  shapes = assemble.Assembly(config, models.build(config, **sizes),
                             sharding.make_mesh(config.mesh), example).shapes
  assert names(shapes.params) == want['params']
  assert names(shapes.model_state) == want['model_state']
  # The optimizer's state too, or an old run could not be continued.
  optimizer = hashlib.sha256(json.dumps(
      names(shapes.opt_state), sort_keys=True).encode()).hexdigest()
  assert optimizer == want['opt_state_sha256']


# --- Config values ----------------------------------------------------------
# Keys that did not exist, and the value that stands for what was done then.
NEW_KEYS = {'model.heads': {}, 'data.unit': 'image', 'data.exclude': [],
            'model.swin.fusion': 'v3', 'early_stop.metric': '',
            'early_stop.patience': 0}
# {key: (value then, value now)} of every config; runs go on all the same.
CHANGED = {'checkpoint.every_minutes': (0., 10.)}


def test_config_values():
  """Every other value is what it was, under today's names."""
  assert old_names.ADDED == NEW_KEYS
  for spec, old in read('configs').items():
    found = workdir_lib.to_dict(cli.load_config(spec))
    want = old_names.modernise(old)
    assert old_names.flatten(found).keys() == old_names.flatten(want).keys()
    assert workdir_lib.differences(want, found) == CHANGED, spec
    assert not workdir_lib.differences(want, found, workdir_lib.FREE_KEYS)
    assert found == old_names.modernise(found), spec


# --- Old runs ---------------------------------------------------------------
@pytest.mark.parametrize('system', OLD_RUNS)
def test_an_old_run_goes_on(system, tiny_scenes, tmp_path):
  """Stopped by the old code at step 4 of 8: the same command ends as then."""
  with tarfile.open(PINS / f'run_{system}.tar.xz') as f:
    f.extractall(tmp_path, filter='data')
  with open(tmp_path / 'config.json', encoding='utf-8') as f:
    old = json.load(f)
  spec = f'configs/{system}.py:tiny'
  config = cli.load_config(spec, [
      (key, str(value)) for key, value in changed(spec, old)])
  config.data.dir = str(tiny_scenes)
  config.mesh.update(dict(data=4, tensor=2))  # eight devices, four rows
  config.samples.count = 0
  for name in set(config.evals) - {'mlm'}:
    del config.evals[name]
  train.train(config, str(tmp_path))

  with open(tmp_path / 'metrics.jsonl', encoding='utf-8') as f:
    ours = by_step(map(json.loads, f))
  with open(tmp_path / 'all_metrics.json', encoding='utf-8') as f:
    theirs = by_step(json.load(f))
  assert list(ours) == list(theirs)
  for step, values in theirs.items():
    for key in ('train/loss', 'train/grad_norm', 'train/learning_rate'):
      np.testing.assert_allclose(ours[step][key], values[key], rtol=2e-3,
                                 err_msg=f'{key} of step {step}')
  params, state, meta = checkpoint.load(str(tmp_path))
  assert meta['step'] == 8
  found = names_to_arrays({'params': params, **state})
  with np.load(tmp_path / 'end.npz') as f:
    want = dict(f)
  assert found.keys() == want.keys()
  # Adam makes a whole step of a gradient that is rounding alone: most values
  # are equal, a few are a step apart.
  apart = np.concatenate([np.ravel(found[k] - x) for k, x in want.items()])
  print('apart: 99 % within', np.quantile(np.abs(apart), .99))
  assert np.quantile(np.abs(apart), .99) < 2e-5
  assert np.abs(apart).max() < 1e-2


def by_step(rows):
  """{step: metrics} of the training's rows."""
  return {row['step']: row for row in rows if 'train/loss' in row}


def changed(spec, old):
  """What the command line of an old run said, as (key, value)."""
  flat = old_names.flatten
  base = flat(read('configs')[spec])
  for key, value in flat(old).items():
    if value != base.get(key) and key != 'data.dir':
      yield key, tuple(value) if isinstance(value, list) else value


def names_to_arrays(tree):
  return {sharding.path_name(path): np.asarray(x)
          for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
