"""Captions as a task: recipes, the results file, a run."""
import json
import types

import jax
import numpy as np
import pytest

from configs import finetune
from configs.recipes import caption as recipes
from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.evaluation import captioning
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import caption
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import stages

SIZES = {'e2e_vlp': 'r50', 'fiber': 'base'}


# --- Recipes ----------------------------------------------------------------
@pytest.mark.parametrize('system, data', sorted(recipes.RECIPES))
def test_recipes_fit_their_models(system, data):
  """Every key is one of the config; every stage has what it asks for."""
  size = 'tiny' if data == 'scenes' else SIZES[system]
  named = 'coco' if data == 'published' else data
  config = finetune.get_config(
      f'caption,system={system},size={size},data={named}')
  for key, value in recipes.RECIPES[system, data].items():
    found = config
    for name in [] if key == 'side' else key.split('.'):
      found = found[name]
    found = found.to_dict() if hasattr(found, 'to_dict') else found
    assert key == 'side' or found == value, key
  evaluators._function('captioning', config.evals.captioning)  # pylint: disable=protected-access
  sizes = vocabularies.Vocabularies.load(config.data).sizes
  model = models.build(config, **sizes)
  found = [objectives.build(config, weights=s.objectives)
           for s in stages.stages(config)]
  for built in found:
    objectives.check(built, model, config)
  batch = synthetic.synthetic_batch(config.data, batch_size=2, **sizes)
  shapes = jax.eval_shape(lambda b: model.init(
      jax.random.key(0), b, objectives.requests(found[0])), batch)['params']
  optim.group_of(shapes, config.optim.groups)


def test_the_stages_of_recipes():
  """E2E-VLP's figures are of cross-entropy alone; FIBER's of three stages."""
  config = finetune.get_config('caption,system=e2e_vlp')
  assert config.last_stage.steps == 0
  assert [s.key for s in stages.stages(config)] == ['optim']
  config = cli.load_config('configs/finetune.py:caption,system=fiber,size=base')
  found = stages.stages(config)
  assert [(s.end, s.schedule.learning_rate, s.objectives) for s in found] == [
      # 10 epochs of 439,123 captions at 512, each.
      (8577, 5e-5, {'captioning': 1.}),
      (2 * 8577, 1e-5, {'captioning': 0., 'gold': 1.}),
      (3 * 8577, 1e-6, {'self_critical': 1.})]
  assert config.objective_options.self_critical.baseline == 'constant'
  assert config.data.train[0]['name'] == 'karpathy'


def test_a_model_without_a_decoder():
  """It says what can be done instead."""
  with pytest.raises(errors.UserError) as e:
    finetune.get_config('caption,system=soho,size=r18')
  assert all(part in str(e.value) for part in (
      "task 'caption' needs the head 'captioning'", "model 'soho' does not",
      'it can be fine-tuned for', 'retrieve'))


# --- The results file -------------------------------------------------------
def run_of(records, written, rows=3):
  """(predictor, pipeline) that writes these captions, in this order."""
  def batches():
    for t, start in enumerate(range(0, len(records), rows)):
      numbers = np.arange(start, start + rows)
      valid = numbers < len(records)
      yield t, {'example_id': np.where(valid, numbers, -1), 'valid': valid}
  asked = []

  def results(variables, batch, task, beams):
    asked.append(beams)
    return [caption.Result('caption', 1, 1, caption.Caption(
        written[i] if i >= 0 else 'padding', 1.))
            for i in batch['example_id'].tolist()]
  pipeline = types.SimpleNamespace(
      num_examples=len(records), iterate=batches, record=lambda i: records[i],
      name='karpathy/test record {}'.format, checks={})
  predictor = types.SimpleNamespace(
      task=base.load, results=results,
      gather=lambda batch, *keys: [batch[k] for k in keys])
  return predictor, pipeline, asked


def read_as_coco(path, image_ids):
  """An independent reader: what pycocotools' loadRes and COCOEvalCap ask for.

  Returns:
    {image id: caption}.
  """
  with open(path, encoding='utf-8') as f:
    found = json.load(f)
  assert isinstance(found, list)
  for one in found:
    assert set(one) == {'image_id', 'caption'}
    assert type(one['image_id']) is int and isinstance(one['caption'], str)  # pylint: disable=unidiomatic-typecheck
  ids = [one['image_id'] for one in found]
  assert len(set(ids)) == len(ids) and set(ids) == set(image_ids)
  return {one['image_id']: one['caption'] for one in found}


def test_results_file_of_real_captions(shared, tmp_path, monkeypatch):
  """Read again, scored again: the scores that the evaluator gave."""
  from e2e_vlp_jax.evaluation import caption_metrics  # pylint: disable=import-outside-toplevel
  from e2e_vlp_jax.evaluation import dataset_checks  # pylint: disable=import-outside-toplevel
  monkeypatch.setattr(dataset_checks, 'check_caption', lambda *_: {})
  path = shared / 'data' / 'coco' / 'annotations' / 'captions_train2017.json'
  content = json.loads(path.read_text(encoding='utf-8'))
  held = {}
  for a in content['annotations']:
    held.setdefault(a['image_id'], []).append(a['caption'])
  ids = sorted(held, reverse=True)
  records = [dict(image_id=str(i), texts=held[i][1:]) for i in ids]
  predictor, pipeline, asked = run_of(records, [held[i][0] for i in ids])
  scores = captioning.evaluate(
      predictor, None, pipeline, beams=3,
      submission=str(tmp_path / 'deeper' / 'results.json'))
  assert set(asked) == {3}
  found = read_as_coco(tmp_path / 'deeper' / 'results.json', ids)
  assert found == {i: held[i][0] for i in ids}
  again, _ = caption_metrics.caption_metrics(
      [found[i] for i in ids], [held[i][1:] for i in ids])
  assert scores == again


@pytest.mark.parametrize('found', [(.25, [.2, .3]), None])
def test_meteor_on_request_and_where_it_runs(monkeypatch, found):
  from e2e_vlp_jax.evaluation import caption_metrics  # pylint: disable=import-outside-toplevel
  from e2e_vlp_jax.evaluation import dataset_checks  # pylint: disable=import-outside-toplevel
  monkeypatch.setattr(dataset_checks, 'check_caption', lambda *_: {})
  asked = []
  monkeypatch.setattr(caption_metrics, 'meteor',
                      lambda *args: asked.append(args) or found)
  written, texts = ['a dog runs', 'a cat'], [['the dog runs'], ['two cats']]
  predictor, pipeline, _ = run_of(
      [dict(image_id=str(i), texts=t) for i, t in enumerate(texts)], written)
  assert 'METEOR' not in captioning.evaluate(predictor, None, pipeline)
  assert not asked
  scores = captioning.evaluate(predictor, None, pipeline, meteor=True)
  assert scores.get('METEOR') == (found and found[0])
  assert asked == [(written, texts)]


def test_results_without_references_and_bad_ids(tmp_path, caplog):
  records = [dict(image_id='7', texts=[]), dict(image_id='5', texts=[])]
  predictor, pipeline, _ = run_of(records, ['a', 'b'])
  path = tmp_path / 'results.json'
  assert captioning.evaluate(predictor, None, pipeline,
                             submission=str(path)) == {}
  assert read_as_coco(path, [5, 7]) == {7: 'a', 5: 'b'}
  pipeline.num_examples = 3
  captioning.evaluate(predictor, None, pipeline, submission=str(path))
  assert 'captions of 2 of 3 images' in caplog.text
  records[1]['image_id'] = 'test-5'
  with pytest.raises(errors.UserError, match="karpathy/test record 1 has the "
                     "id 'test-5'.*expected a number"):
    captioning.evaluate(predictor, None, pipeline, submission=str(path))
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot be written'):
    captioning.evaluate(predictor, None, pipeline,
                        submission=str(tmp_path / 'file' / 'results.json'))
