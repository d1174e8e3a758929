"""Visual entailment: data, metric, loss, task."""
import json
import types

import jax
import numpy as np
from PIL import Image
import pytest

from configs import finetune
from configs.recipes import entail as recipes
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax import predict
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import ops_entailment
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.data.datasets import snli_ve
from e2e_vlp_jax.evaluation import entailment
from e2e_vlp_jax.objectives import entail as entail_objective
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import entail
from e2e_vlp_jax.training import optim

LABELS = ops_entailment.LABELS


def read(path):
  with open(path, encoding='utf-8') as f:
    return json.load(f)


# --- Labels, loss, metric ---------------------------------------------------
def label_row(label):
  op = pp.build('entailment_labels', types.SimpleNamespace(unit='entailment'))
  return op({'item': 1, 'seed': 0, 'entailment': [None, {'label': label}]})


def test_labels_and_loss():
  """The op's labels; cross-entropy and gradient in float64 by hand."""
  rows = [label_row(label) for label in (*LABELS, '')]
  assert [r['entailment_labels'].tolist() for r in rows] == [
      [0], [1], [2], [-1]]
  assert [r['task_mask/entail'] for r in rows] == [True] * 3 + [False]
  assert LABELS == ('entailment', 'neutral', 'contradiction')
  with pytest.raises(errors.UserError, match="'nuetral'.*mean 'neutral'"):
    label_row('nuetral')
  with pytest.raises(errors.UserError, match="needs data.unit='entailment'"):
    pp.build('entailment_labels', types.SimpleNamespace(unit='text'))

  labels = np.array([[2], [0], [1], [-1]])
  logits = np.random.default_rng(0).normal(0, 2, (4, 1, 3))
  batch = {'entailment_labels': labels,
           'task_mask/entail': np.array([True, True, False, True])}

  def loss(x):
    losses, metrics = entail_objective.Objective()(
        {'joint': {'entail_logits': x}}, batch)
    total, weight = losses['entail']
    return total / weight, (weight, metrics['entail_accuracy'])
  (value, (weight, accuracy)), gradient = jax.value_and_grad(
      loss, has_aux=True)(np.float32(logits))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  assert weight == 2  # One is masked, one has no label.
  np.testing.assert_allclose(
      value, -(np.log(p[0, 0, 2]) + np.log(p[1, 0, 0])) / 2, rtol=1e-6)
  wanted = np.zeros_like(p)
  wanted[:2] = (p[:2] - np.eye(3)[labels[:2, 0]][:, None]) / 2
  np.testing.assert_allclose(gradient, wanted, atol=1e-6)
  assert accuracy[0] == sum(p[i, 0].argmax() == labels[i, 0] for i in (0, 1))


def test_accuracy():
  """Against a plain count; the last batch is padded."""
  rng = np.random.default_rng(0)
  true, said = rng.integers(0, 3, (2, 50))
  items = [{'label': LABELS[k]} for k in true] + [{'label': ''}]
  scores = np.eye(3)[[*said, 0]]

  def batches():
    for t in range(7):
      numbers = np.arange(8) + 8 * t
      valid = numbers < len(items)
      yield t, {'example_id': np.where(valid, numbers, -1), 'valid': valid}
  pipeline = types.SimpleNamespace(
      num_examples=len(items), iterate=batches,
      unit=lambda i: ({'entailment': items}, i))
  predictor = types.SimpleNamespace(
      task=base.load, gather=lambda batch, *keys: [batch[k] for k in keys],
      run=lambda variables, batch, task: {
          'scores': scores[batch['example_id']][:, None]})
  found = entailment.evaluate(predictor, None, pipeline)
  assert found == {
      'accuracy': np.mean(true == said),
      'majority': np.bincount(true).max() / 50,
      **{f'accuracy/{name}': np.mean(said[true == k] == k)
         for k, name in enumerate(LABELS)}}
  items[:] = [{'label': ''}]
  assert entailment.evaluate(predictor, None, pipeline) == {}


# --- The task ---------------------------------------------------------------
def test_task():
  task = entail.Task()
  assert task.labels == LABELS
  scores = np.float32([[.5, .25, .25], [.2, .2, .6], [0, .25, .75]])
  found = task.result(None, {'scores': scores}, (4, 6),
                      ['it is red', ' ', 'it is blue'])
  assert found.to_json() == {
      'task': 'entail', 'image': {'height': 4, 'width': 6}, 'entailment': [
          {'text': 'it is red', 'label': 'entailment', 'score': .5},
          {'text': 'it is blue', 'label': 'contradiction', 'score': .75}]}
  json.dumps(found.to_json())
  words = lambda drawing: [' '.join(t for t, _ in row)
                           for row in drawing.sentences]
  assert words(task.draw(found)) == ['it is red', 'entailment 0.50',
                                     'it is blue', 'contradiction 0.75']
  record = {'entailment': [dict(text='it is red', label='neutral'),
                           dict(text='it is blue', label='contradiction')]}
  assert words(task.draw(found, base.Truth(record, None)))[1::2] == [
      '✗ entailment 0.50 · neutral', '✓ contradiction 0.75']
  assert task.sample_texts([
      {**record, 'item': 1}, None, {'entailment': [], 'item': 0},
      {**record, 'item': 7}]) == [['it is blue'], [''], [''], ['it is blue']]


@pytest.mark.parametrize('system, size, data, steps, head', [
    ('e2e_vlp', 'r50', 'snli_ve', 10342, {'hidden', 'norm', 'out'}),
    ('soho', 'r18', 'snli_ve', 10342, {'hidden', 'out'}),
    ('soho', 'tiny', 'scenes', 2000, {'hidden', 'norm', 'out'})])
def test_recipes_fit_their_models(system, size, data, steps, head):
  """Every key is one of the config; every group has its parameters."""
  config = finetune.get_config(
      f'entail,system={system},size={size},data={data}')
  assert config.total_steps == steps and config.data.unit == 'entailment'
  kind = 'scenes' if data == 'scenes' else 'published'
  for key, value in recipes.RECIPES[system, kind].items():
    if key != 'side':
      found = config
      for name in key.split('.'):
        found = found[name]
      assert found == value or found.to_dict() == value, key
  sizes = vocabularies.Vocabularies.load(config.data).sizes
  model = models.build(config, **sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=2, **sizes)
  requests = objectives.requests(objectives.build(config))
  shapes = jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, requests), batch)['params']
  assert set(shapes['heads_entail']) == head
  optim.group_of(shapes, config.optim.groups)


def test_a_run_on_scenes(tiny_scenes, tmp_path):
  """Train, evaluate and predict as a person would."""
  workdir = str(tmp_path / 'run')
  train.main([
      '--config', 'configs/finetune.py:entail,system=e2e_vlp', '--workdir',
      workdir, f'--config.data.dir={tiny_scenes}', '--config.total_steps=2',
      '--config.optim.warmup_steps=1', '--config.batch_size=8',
      '--config.eval_batch_size=8', '--config.eval_every_steps=0',
      '--config.evals.entailment.max_examples=16', '--config.samples.count=2',
      '--config.model.heads.entail.hidden=16', '--config.checkpoint.best=',
      '--config.model.width=32', '--config.model.ffn=48',
      '--config.model.encoder_layers=1', '--config.model.backbone.stem=8',
      '--config.model.backbone.width=16', '--config.model.backbone.blocks=1'])
  scores = read(tmp_path / 'run' / 'eval.json')
  assert 0 <= scores['eval/entailment/accuracy'] <= 1
  assert .3 < scores['eval/entailment/majority'] < .5
  pictures = sorted((tmp_path / 'run' / 'samples').iterdir())
  assert len({p.read_bytes() for p in pictures}) == 2
  predict.main([
      '--checkpoint', workdir, '--task', 'entail', '--image',
      str(pictures[0]), '--text', 'a red ring is large', '--text',
      'a red ring is heavy', '--json', str(tmp_path / 'out.json')])
  found = read(tmp_path / 'out.json')
  assert set(found) == {'task', 'image', 'entailment'}
  assert [j['text'] for j in found['entailment']] == [
      'a red ring is large', 'a red ring is heavy']
  assert all(j['label'] in LABELS and 1 / 3 <= j['score'] <= 1
             for j in found['entailment'])


# --- prepare snli_ve --------------------------------------------------------
def example(image, number, text='A man rests.', label='neutral', **more):
  return {'annotator_labels': [label], 'captionID': f'{image}.jpg#0',
          'gold_label': label, 'pairID': f'{image}.jpg#{number}',
          'sentence1': 'A man sleeps.', 'sentence2': text,
          'Flickr30K_ID': image, **more}


def write(source, images=None, **splits):
  """A --source of some splits and images, all of those named by default."""
  (source / 'flickr30k-images').mkdir(parents=True, exist_ok=True)
  for split, examples in splits.items():
    (source / f'snli_ve_{split}.jsonl').write_text(
        '\n'.join(map(json.dumps, examples)))
    for e in examples:
      if images is None or e.get('Flickr30K_ID') in images:
        Image.new('RGB', (8, 6)).save(
            source / 'flickr30k-images' / f'{e["Flickr30K_ID"]}.jpg')
  return source


def prepared(source, data_dir, *options):
  """({split: [records]}, report) of `prepare snli_ve`."""
  prepare.main(['snli_ve', '--source', str(source), '--data_dir',
                str(data_dir), *options])
  report = read(f'{records.dataset_folder(str(data_dir), "snli_ve")}/'
                f'{records.REPORT}')
  found = {}
  for split in report['splits']:
    opened = records.open_split(str(data_dir), 'snli_ve', split)
    found[split] = [opened.get(i) for i in range(len(opened))]
  return found, report['splits']


def test_prepare(tmp_path, capsys):
  """What is kept, in order; what is left out is counted and named."""
  source = write(
      tmp_path / 'source', ['20', '10', '50', 70], train=[
          example('20', 'a', 'A  man\nrests.', 'entailment'),
          example('10', 'a'), example('20', 'b', label='contradiction'),
          example('20', 'c', label='-'), example('20', 'd', ' '),
          example('30', 'a'), example('50', 'a', label='-')],
      test=[example(70, 'a', label='entailment')])  # an id may be a number
  found, report = prepared(source, tmp_path / 'data')
  assert {k: [(r['image_id'], r['entailment']) for r in v]
          for k, v in found.items()} == {
              'train': [
                  ('10', [dict(text='A man rests.', label='neutral')]),
                  ('20', [dict(text='A man rests.', label='entailment'),
                          dict(text='A man rests.', label='contradiction')])],
              'test': [('70', [dict(text='A man rests.',
                                    label='entailment')])]}
  assert {k: v['names'] for k, v in report['train']['skipped'].items()} == {
      'hypothesis without a gold label': ['20.jpg#c', '50.jpg#a'],
      'hypothesis without words': ['20.jpg#d'],
      'image: no such image file': ['30.jpg'],
      'hypothesis about an image that is left out': ['30.jpg#a'],
      'image: no hypothesis left': ['50.jpg']}
  assert report['train']['hypotheses'] == 3
  assert ('train: 7 hypotheses, 4 images; published: 529,527 and 29,783'
          in capsys.readouterr().err)
  found, _ = prepared(source, tmp_path / 'less', '--limit', '1')
  assert [r['image_id'] for r in found['train']] == ['10']


@pytest.mark.parametrize('change, message', [
    (dict(gold_label='natural'), "dev.jsonl:2: .*'natural'.*mean 'neutral'"),
    (dict(sentence2=None), 'sentence2 is None; expected text'),
    (dict(Flickr30K_ID=True), 'Flickr30K_ID is True; expected a whole numb'),
    (dict(pairID='1.jpg#a', sentence2='B.'), "another .* pair '1.jpg#a'")])
def test_prepare_refuses(tmp_path, change, message):
  source = write(tmp_path, [], dev=[example('1', 'a'),
                                    {**example('2', 'a'), **change}])
  with pytest.raises(errors.UserError, match=message):
    prepared(source, tmp_path / 'data')


def test_prepare_refuses_another_split(tmp_path, monkeypatch):
  """Named by what it holds: the published numbers, or the same images."""
  source = write(tmp_path, dev=[example('1', 'a'), example('1', 'b')])
  monkeypatch.setitem(snli_ve._SPLITS, 'test', (2, 1))
  with pytest.raises(errors.UserError, match=r'snli_ve_dev.jsonl: it holds '
                     r'test \(2 hypotheses about 1 images\), and not dev'):
    prepared(source, tmp_path / 'data')
  monkeypatch.undo()
  write(source, train=[example('1', 'c'), example('2', 'a')])
  with pytest.raises(errors.UserError, match=r'snli_ve_train.jsonl and .*dev'
                     r'.jsonl share 1 image\(s\), such as 1; expected none'):
    prepared(source, tmp_path / 'data')


def test_prepare_refuses_what_is_no_source(tmp_path):
  with pytest.raises(errors.UserError, match='--source should be the folder'):
    prepared(tmp_path, tmp_path / 'data')
  (tmp_path / 'snli_ve_dev.jsonl').write_text(json.dumps(example('1', 'a')))
  with pytest.raises(errors.UserError, match='expected flickr30k-images/ or'):
    prepared(tmp_path, tmp_path / 'data')
