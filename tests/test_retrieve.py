"""The task `retrieve`: recipes, a run, what predict gives."""
import json

import jax
import numpy as np
import pytest

from configs import finetune
from configs.recipes import retrieve as recipes
from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax import predict
from e2e_vlp_jax import train
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import match
from e2e_vlp_jax.training import optim

SIZES = {'e2e_vlp': 'r50', 'soho': 'r18', 'fiber': 'base'}


def plain(value):
  return value.to_dict() if hasattr(value, 'to_dict') else value


@pytest.mark.parametrize('system, data', sorted(recipes.RECIPES))
def test_recipes_fit_their_models(system, data):
  """Every key is one of the config; the model has what the losses ask for."""
  size = 'tiny' if data == 'scenes' else SIZES[system]
  config = finetune.get_config(
      f'retrieve,system={system},size={size},data={data}')
  for key, value in recipes.RECIPES[system, data].items():
    found = config
    for name in [] if key == 'side' else key.split('.'):
      found = found[name]
    assert key == 'side' or plain(found) == value, key
  assert {s['name'] for s in config.data.train} == {data}
  assert config.evals.retrieval.source.name == data
  evaluators._function('retrieval', config.evals.retrieval)  # pylint: disable=protected-access
  sizes = vocabularies.Vocabularies.load(config.data).sizes
  model = models.build(config, **sizes)
  built = objectives.build(config)
  objectives.check(built, model, config)
  assert set(built) == {'itm', 'itc'} if system == 'fiber' else {'itm'}
  batch = synthetic.synthetic_batch(config.data, batch_size=2, **sizes)
  shapes = jax.eval_shape(lambda b: model.init(
      jax.random.key(0), b, objectives.requests(built)), batch)['params']
  optim.group_of(shapes, config.optim.groups)


@pytest.mark.parametrize('system, data, steps', [
    # 10 epochs of 439,123 captions at 1,024, of 145,000 at 256; 20 of 566,747.
    ('fiber', 'karpathy', 4288), ('e2e_vlp', 'flickr30k', 5664),
    ('soho', 'karpathy', 11_069)])
def test_epochs_are_over_captions(system, data, steps):
  assert recipes.RECIPES[system, data]['total_steps'] == steps


def test_other_data_have_no_recipe_of_another():
  """Own photographs are not replaced by COCO's."""
  config = finetune.get_config('retrieve,system=soho,size=r18,data=mine')
  assert [dict(s) for s in config.data.train] == [
      dict(name='mine', split='train', weight=1.)]
  assert config.total_steps == 20_000


@pytest.mark.slow
def test_a_run_on_scenes(tiny_scenes, tmp_path):
  """Train, evaluate and predict as a person would."""
  workdir = str(tmp_path / 'run')
  train.main([
      '--config', 'configs/finetune.py:retrieve,system=e2e_vlp', '--workdir',
      workdir, f'--config.data.dir={tiny_scenes}', '--config.total_steps=2',
      '--config.optim.warmup_steps=1', '--config.batch_size=8',
      '--config.eval_batch_size=8', '--config.eval_every_steps=1',
      '--config.evals.retrieval.max_examples=16',
      '--config.evals.retrieval.examples_during_training=8',
      '--config.evals.retrieval.options.folds=2', '--config.samples.count=1'])
  scores = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  for name in ('TR1', 'IR10', 'TR1_folds', 'mean'):
    assert 0 <= scores[f'eval/retrieval/{name}'] <= 1
  evaluate.main(['--checkpoint', workdir, '--workdir', str(tmp_path / 'again'),
                 '--tasks', 'retrieve', '--limit', '4'])
  again = json.loads((tmp_path / 'again' / 'eval.json').read_text())
  assert 'eval/retrieval/TR1' in again

  texts = ['a ring', 'a small red ring', 'two stars', 'a blue star']
  predict.main(['--checkpoint', workdir, '--task', 'retrieve', '--image',
                str(next((tmp_path / 'run' / 'samples').iterdir())),
                *(w for t in texts for w in ('--text', t)), '--best', '3',
                '--json', str(tmp_path / 'found.json'), '--picture',
                str(tmp_path / 'found.png')])
  found = json.loads((tmp_path / 'found.json').read_text())
  assert found['task'] == 'retrieve' and len(found['texts']) == 3
  ranked = [t['score'] for t in found['texts']]
  assert ranked == sorted(ranked, reverse=True)
  predict.main(['--checkpoint', workdir, '--task', 'match', '--image',
                str(next((tmp_path / 'run' / 'samples').iterdir())),
                *(w for t in texts for w in ('--text', t)), '--json',
                str(tmp_path / 'match.json')])
  each = json.loads((tmp_path / 'match.json').read_text())['match']
  best = sorted(each, key=lambda m: -m['score'])[:3]
  assert [t['text'] for t in found['texts']] == [m['text'] for m in best]
  np.testing.assert_allclose(ranked, [m['score'] for m in best], rtol=1e-5)


def test_its_picture():
  task = base.load('retrieve')
  result = type(task.result(None, {'scores': []}, (4, 6), []))(
      'retrieve', 4, 6, [match.Scored('a cat', .9), match.Scored('a dog', .2)])
  words = lambda drawing: [' '.join(t for t, _ in row)
                           for row in drawing.sentences]
  assert words(task.draw(result)) == ['1. 0.90 a cat', '2. 0.20 a dog']
  truth = base.Truth({'texts': ['a dog ']}, None)
  assert words(task.draw(result, truth)) == ['✗ 1. 0.90 a cat',
                                             '✓ 2. 0.20 a dog']
  assert not task.draw(None).sentences


@pytest.mark.parametrize('arg, wanted', [
    ('retreive,system=soho', "did you mean 'retrieve'"),
    ('retrieve,system=fiber,data=vqav2', "'vqav2' is not a dataset of this")])
def test_arguments(arg, wanted):
  with pytest.raises((errors.UserError, ValueError), match=wanted):
    finetune.get_config(arg)
