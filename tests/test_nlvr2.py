"""Statements about two images: data, metric, submission, loss, task."""
import csv
import gzip
import json
import pathlib
import types

import jax
import numpy as np
from PIL import Image
import pytest

from configs import finetune
from configs.recipes import reason as recipes
from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax import predict
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.evaluation import nlvr2
from e2e_vlp_jax.objectives import reason as reason_objective
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import reason
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import optim
from tests import small_model


def read(path):
  with open(path, encoding='utf-8') as f:
    return json.load(f)


@pytest.fixture(scope='module')
def dev(shared):
  """The 6,982 official examples of dev."""
  with gzip.open(shared / 'data' / 'text' / 'nlvr2_dev.json.gz', 'rt',
                 encoding='utf-8') as f:
    return [json.loads(line) for line in f]


# --- The evaluator ----------------------------------------------------------
def official(path, examples):
  """Accuracy and consistency of a predictions file, as the tool defines them.

  An independent reader: identifier, comma, prediction; a sentence counts as
  consistent if it is right for all pairs of its set.
  """
  with open(path, encoding='utf-8') as f:
    said = dict(line.strip().split(',') for line in f)
  assert len(said) == len(examples)
  right, sentences = 0, {}
  for e in examples:
    split, group, _, sentence = e['identifier'].split('-')
    ok = said[e['identifier']].lower() == e['label'].lower()
    right += ok
    sentences.setdefault((split, group, sentence), []).append(ok)
  return (right / len(examples),
          sum(map(all, sentences.values())) / len(sentences))


def fake_run(statements, said, rows=64):
  """(predictor, pipeline) where statement i is given said[i]."""
  scores = np.where(said, .9, .1)

  def batches():
    for t, start in enumerate(range(0, len(statements), rows)):
      numbers = np.arange(start, start + rows)
      valid = numbers < len(statements)
      yield t, {'example_id': np.where(valid, numbers, -1), 'valid': valid}

  pipeline = types.SimpleNamespace(
      num_examples=len(statements), iterate=batches,
      unit=lambda i: ({'statements': statements}, i), name='s {}'.format)
  predictor = types.SimpleNamespace(
      task=lambda name: name,
      gather=lambda batch, *keys: [batch[k] for k in keys],
      run=lambda variables, batch, task: {
          'scores': scores[batch['example_id']][:, None]})
  return predictor, pipeline


def stored(examples):
  """The statements of official examples, as `prepare` stores them."""
  return [dict(statement=e['sentence'], label=e['label'] == 'True',
               has_label=True, identifier=e['identifier'],
               group='{0}-{1}--{3}'.format(*e['identifier'].split('-')))
          for e in examples]


@pytest.mark.parametrize('name', ['all_true', 'human_validator'])
def test_goldens(name, shared, dev, tmp_path):
  """Equal to the official tool; the file is that which it scored."""
  folder = shared / 'data' / 'goldens' / 'nlvr2'
  wanted = read(folder / 'dev_expected.json')[name]
  with gzip.open(folder / f'dev_{name}_predictions.csv.gz', 'rt') as f:
    said = {i: word == 'True' for i, word in csv.reader(f)}
  path = tmp_path / 'deeper' / 'predictions.csv'
  scores = nlvr2.evaluate(*[(fake := fake_run(
      stored(dev), [said[e['identifier']] for e in dev]))[0], None, fake[1]],
                          submission=str(path))
  assert scores == {**wanted, 'majority': 3551 / 6982}
  assert official(path, dev) == (wanted['accuracy'], wanted['consistency'])
  with open(path, encoding='utf-8') as f:
    assert {i: word == 'True' for i, word in csv.reader(f)} == said


def test_without_labels_groups_or_identifiers(tmp_path, caplog):
  plain = dict(statement='s', label=True, has_label=True, identifier='',
               group='')
  hidden = {**plain, 'has_label': False, 'identifier': 'test1-0-0-0',
            'group': 'test1-0--0'}
  run = lambda statements, said, **more: nlvr2.evaluate(
      (fake := fake_run(statements, said))[0], None, fake[1], **more)
  # Of one sentence no consistency is known; of no label no score.
  assert run([plain, {**plain, 'label': False}, plain],
             [True, True, False]) == {'accuracy': 1 / 3, 'majority': 2 / 3}
  path = tmp_path / 'p.csv'
  assert run([hidden], [False], submission=str(path)) == {}
  assert path.read_text() == 'test1-0-0-0,False\n' and not caplog.text
  with pytest.raises(errors.UserError, match='s 0 has no official identifier'):
    run([plain], [True], submission=str(path))
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot be written'):
    nlvr2.evaluate(None, None, None,  # Before anything is predicted.
                   submission=str(tmp_path / 'file' / 'p.csv'))
  nlvr2.write_submission(str(path), [('a', True)], 2)
  assert 'predictions for 1 of 2 statements' in caplog.text


# --- Labels and loss --------------------------------------------------------
def test_labels_and_loss():
  """The op's labels; cross-entropy and gradient in float64 by hand."""
  context = types.SimpleNamespace(unit='statement')
  label = pp.build('statement_labels', context)
  rows = [label({'item': 1, 'seed': 0, 'statements': [None, dict(
      label=said, has_label=known)]}) for said, known in (
          (True, True), (False, True), (False, False))]
  assert [r['statement_labels'].tolist() for r in rows] == [[1], [0], [-1]]
  assert [r['task_mask/reason'] for r in rows] == [True, True, False]
  with pytest.raises(errors.UserError, match="needs data.unit='statement'"):
    pp.build('statement_labels', types.SimpleNamespace(unit='image'))

  batch = {'statement_labels': np.stack([r['statement_labels'] for r in rows]),
           'task_mask/reason': np.array([True, True, True])}
  logits = np.random.default_rng(0).normal(0, 2, (3, 1, 2))

  def loss(x):
    losses, metrics = reason_objective.Objective()(
        {'pair': {'reason_logits': x}}, batch)
    total, weight = losses['reason']
    return total / weight, (weight, metrics['reason_accuracy'])
  (value, (weight, accuracy)), gradient = jax.value_and_grad(
      loss, has_aux=True)(np.float32(logits))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  assert weight == 2  # The third has no label.
  np.testing.assert_allclose(
      value, -(np.log(p[0, 0, 1]) + np.log(p[1, 0, 0])) / 2, rtol=1e-6)
  truth = np.array([[[0, 1]], [[1, 0]], [[0, 0]]])
  np.testing.assert_allclose(gradient, (p - truth) / 2 * np.array(
      [1, 1, 0])[:, None, None], atol=1e-6)
  assert accuracy[0] == sum(p[i, 0].argmax() == 1 - i for i in (0, 1))


# --- The task ---------------------------------------------------------------
def test_task():
  task = reason.Task()
  found = task.result(None, {'scores': np.float32([.75, .5, .2])}, (4, 6),
                      ['both are red', ' ', 'none is'])
  assert found.to_json() == {
      'task': 'reason', 'image': {'height': 4, 'width': 6}, 'statements': [
          {'text': 'both are red', 'label': True, 'score': .75},
          {'text': 'none is', 'label': False,
           'score': pytest.approx(.2, abs=1e-6)}]}
  json.dumps(found.to_json())
  words = lambda drawing: [' '.join(t for t, _ in row)
                           for row in drawing.sentences]
  assert words(task.draw(found)) == ['both are red', 'true 0.75', 'none is',
                                     'false 0.80']
  record = {'statements': [
      dict(statement='both are red', label=False, has_label=True),
      dict(statement='none is', label=False, has_label=True)]}
  truth = base.Truth(record, None)
  assert words(task.draw(found, truth))[1::2] == ['✗ true 0.75',
                                                  '✓ false 0.80']
  record['statements'][0]['has_label'] = False
  assert words(task.draw(found, truth))[1] == 'true 0.75'
  # A row shows the statement of its second image.
  assert task.sample_texts([{**record, 'item': 1}, None, {
      'statements': [], 'item': 0}]) == [['none is'], [''], ['']]


def test_images_of_a_request():
  task, detect = reason.Task(), base.load('detect')
  assert task.group_images(list('abcd')) == [('a', 'b'), ('c', 'd')]
  assert task.group_images(['a']) == [('a',)]
  assert detect.group_images(['a', 'b']) == [('a',), ('b',)]
  assert task.check_images(['a', ('b', 'c'), ['d']]) == [
      ('a',), ('b', 'c'), ('d',)]
  with pytest.raises(errors.UserError, match="--image: 3 images; task 'reason' "
                     'takes 2 of them for each result, so give 1 or a mult'):
    task.group_images(list('abc'))
  for asked, images, message in ((task, [()], "0 .* 'reason' takes 1 to 2"),
                                 (task, [list('abc')], '3 for one result'),
                                 (detect, [('a', 'b')], "'detect' takes one")):
    with pytest.raises(errors.UserError, match=message):
      asked.check_images(images)


# --- Recipes ----------------------------------------------------------------
@pytest.mark.parametrize('system, size, data, steps, head', [
    ('e2e_vlp', 'r50', 'nlvr2', 6748, {'hidden', 'norm', 'out'}),
    ('soho', 'r18', 'nlvr2', 6748, {'hidden', 'out'}),
    ('fiber', 'base', 'nlvr2', 1687, {'hidden', 'norm', 'out'}),
    ('fiber', 'tiny', 'scenes', 2000, {'hidden', 'norm', 'out'}),
    ('e2e_vlp', 'tiny', 'nlvr1', 500, {'hidden', 'norm', 'out'})])
def test_recipes_fit_their_models(system, size, data, steps, head):
  """Every key is one of the config; every group has its parameters."""
  config = finetune.get_config(
      f'reason,system={system},size={size},data={data}')
  assert config.total_steps == steps and config.data.unit == 'statement'
  assert (config.data.train[0]['split'],
          config.evals.nlvr2.source.split) == {
              'nlvr2': ('train', 'dev'), 'nlvr1': ('dev', 'test'),
              'scenes': ('train', 'test')}[data]
  if data == 'nlvr1':  # Three drawings side by side.
    assert config.data.buckets == ((96, 384),)
  kind = data if data != 'nlvr2' else 'published'
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
  assert set(shapes['heads_reason']) == head
  optim.group_of(shapes, config.optim.groups)


# --- prepare nlvr2 ----------------------------------------------------------
def example(identifier, sentence='Both are red.', **more):
  return {'identifier': identifier, 'sentence': sentence, 'label': 'True',
          'left_url': '', 'right_url': '', **more}


def write(source, split, examples, images=None, folder=None):
  """A --source of one split; each image has its own colour and size."""
  (source / 'data').mkdir(parents=True, exist_ok=True)
  (source / 'data' / f'{split}.json').write_text(
      ''.join(json.dumps(e) + '\n' for e in examples))
  folder = source / (folder or split)
  folder.mkdir(exist_ok=True, parents=True)
  pairs = dict.fromkeys(e['identifier'].rpartition('-')[0] for e in examples)
  names = [f'{p}-img{k}.png' for p in pairs for k in (0, 1)]
  for n, name in enumerate(names):
    if images is None or name in images:
      Image.new('RGB', (8 + n, 6), (n, 0, 0)).save(folder / name)
  return source


def prepared(source, data_dir, *options):
  """({split: [records]}, report) of `prepare nlvr2`."""
  prepare.main(['nlvr2', '--source', str(source), '--data_dir',
                str(data_dir), *options])
  report = read(f'{records.dataset_folder(str(data_dir), "nlvr2")}/'
                f'{records.REPORT}')
  found = {}
  for split in report['splits']:
    opened = records.open_split(str(data_dir), 'nlvr2', split)
    found[split] = [opened.get(i) for i in range(len(opened))]
  return found, report['splits']


def test_prepare_real_sentences(dev, tmp_path, capsys):
  """Official examples, each image file once; drawn images in their place."""
  examples = dev[:40]
  source = write(tmp_path / 'source', 'dev', examples)
  found, report = prepared(source, tmp_path / 'data')
  assert 'dev: 40 statements; published: 6,982' in capsys.readouterr().err
  images = [r['image_id'] for r in found['dev']]
  pairs = {e['identifier'].rpartition('-')[0] for e in examples}
  assert len(images) == len(set(images)) == 2 * len(pairs) == report['dev'][
      'images']
  seen = {}
  for record in found['dev']:
    for s in record['statements']:
      other = found['dev'][s['second_record']]
      pair = s['identifier'].rpartition('-')[0]
      assert (record['image_id'], other['image_id']) == (f'{pair}-img0',
                                                         f'{pair}-img1')
      assert s['second_image'] == b'' and s['has_label']
      seen[s['identifier']] = s
  assert len(seen) == 40
  for e, s in zip(examples, stored(examples)):
    assert seen[e['identifier']].items() >= s.items()
  assert (report['dev']['statements'], report['dev']['unlabelled']) == (40, 0)


def test_prepare_counts_and_names_what_is_missing(tmp_path):
  pair = lambda p, s=0, **more: example(f'train-7-{p}-{s}', **more)
  images = [f'train-7-{p}-img{k}.png' for p in (0, 1, 3) for k in (0, 1)]
  images.remove('train-7-1-img1.png')
  source = write(tmp_path / 'source', 'train', [
      pair(0, directory=5), pair(0, 1, sentence=' ', directory=5),
      pair(1, directory=5), pair(1, 1, directory=5), pair(2, directory=6),
      pair(3, label='False', directory=6)], images, 'images/train')
  found, report = prepared(source, tmp_path / 'data')
  # The images lie in images/train and not in its folders 5 and 6.
  assert [r['image_id'] for r in found['train']] == [
      'train-7-0-img1', 'train-7-0-img0', 'train-7-3-img1', 'train-7-3-img0']
  assert [s['second_record'] for r in found['train']
          for s in r['statements']] == [0, 2]
  assert {k: v['names'] for k, v in report['train']['skipped'].items()} == {
      'statement without words': ['train-7-0-1'],
      'image: no such image file': ['train-7-1-img1.png',
                                    'train-7-2-img0.png',
                                    'train-7-2-img1.png'],
      'image: the other one of its pair is left out': ['train-7-1-img0.png'],
      'statement about an image that is left out': [
          'train-7-1-0', 'train-7-1-1', 'train-7-2-0']}
  assert report['train']['statements'] == 2


def test_prepare_without_labels_and_of_some_splits(tmp_path):
  source = write(tmp_path / 'source', 'test2', [example('test2-0-0-0',
                                                        label='')])
  source = write(source, 'test1', [example('test1-0-0-0')])
  del (unlabelled := example('test2-0-1-0'))['label']
  write(source, 'test2', [example('test2-0-0-0', label=''), unlabelled])
  found, report = prepared(source, tmp_path / 'data')
  assert list(found) == ['test1', 'test2']
  assert [(s['has_label'], s['identifier']) for r in found['test2']
          for s in r['statements']] == [(False, 'test2-0-0-0'),
                                        (False, 'test2-0-1-0')]
  assert (report['test1']['unlabelled'], report['test2']['unlabelled']) == (
      0, 2)
  found, _ = prepared(source, tmp_path / 'more', '--splits', 'test2',
                      '--limit', '1')
  assert {k: len(v) for k, v in found.items()} == {'test2': 2}


@pytest.mark.parametrize('examples, message', [
    ([example('test1-0-0-0')],
     "dev.json:1: .*'test1-0-0-0': the file holds test1, and not dev"),
    ([example('dev-0-0-0'), example('dev-0-0')],
     "dev.json:2: .*'dev-0-0'; expected 'dev-SET-PAIR-SENTENCE'"),
    ([example('dev-0-0-0'), example('dev-0-0-0', 'Other.')],
     "dev.json:2: .*another example has the same identifier 'dev-0-0-0'"),
    ([example('dev-0-0-0', label='maybe')], "'maybe'; expected true or false"),
    ([example('dev-0-0-0', sentence=3)], 'sentence is 3; expected text'),
    ([{}], 'dev.json:1: not an example of NLVR2 dev'), ([], 'is empty')])
def test_prepare_refuses(tmp_path, examples, message):
  (tmp_path / 'dev').mkdir()
  (tmp_path / 'dev.json').write_text(
      '\n'.join(json.dumps(e) for e in examples))
  with pytest.raises(errors.UserError, match=message):
    prepared(tmp_path, tmp_path / 'data')


def test_prepare_refuses_what_is_no_source(tmp_path):
  with pytest.raises(errors.UserError, match='--source should be the folder'):
    prepared(tmp_path, tmp_path / 'data')
  (tmp_path / 'dev.json').write_text(json.dumps(example('dev-0-0-0')))
  for options, message in (
      (('--splits', 'tset1'), "no split 'tset1'; did you mean 'test1'"),
      (('--splits', 'test1'), 'no test1.json'),
      ((), 'expected images/dev/ or images/dev.zip or dev/')):
    with pytest.raises(errors.UserError, match=message):
      prepared(tmp_path, tmp_path / 'data', *options)


# --- Whole commands ---------------------------------------------------------
@pytest.fixture(scope='module')
def runs(tiny_scenes, tmp_path_factory):
  """(checkpoint with a head for questions, run of `reason` from it)."""
  folder = tmp_path_factory.mktemp('runs')
  config = small_model.get_config()
  config.data.answers = 'scenes'
  config.model.heads = {'answer': {**base.load('answer').finetuning.head,
                                   'hidden': 8}}
  config.optim.groups = (('heads_answer/.*', dict(lr_multiplier=2.)),
                         *config.optim.groups)
  first = small_model.save(folder / 'first', config)
  train.main([
      '--config', f'configs/finetune.py:reason,from={first}', '--workdir',
      str(folder / 'run'), f'--config.data.dir={tiny_scenes}',
      '--config.total_steps=2', '--config.optim.warmup_steps=1',
      '--config.batch_size=8', '--config.eval_batch_size=8',
      '--config.eval_every_steps=0', '--config.evals.nlvr2.max_examples=16',
      '--config.samples.count=2', '--config.model.heads.reason.hidden=16',
      '--config.checkpoint.best='])
  return first, str(folder / 'run')


def test_a_run_on_scenes(runs, tmp_path):
  """Train, evaluate and predict as a person would."""
  _, workdir = runs
  scores = read(f'{workdir}/eval.json')
  assert 0 <= scores['eval/nlvr2/accuracy'] <= 1
  assert 'eval/nlvr2/consistency' not in scores  # one statement a sentence
  photos = sorted(map(str, pathlib.Path(workdir, 'samples').iterdir()))
  assert len(photos) == 2

  def ask(*images):
    predict.main([
        '--checkpoint', workdir, '--task', 'reason',
        *[x for i in images for x in ('--image', i)], '--text',
        'both images contain a ring', '--json', str(tmp_path / 'out.json'),
        '--picture', str(tmp_path / 'out.png')])
    return read(tmp_path / 'out.json')
  one, two = (ask(*photos[:n]) for n in (1, 2))
  assert set(two) == {'task', 'image', 'statements'}
  assert one['statements'][0]['score'] != two['statements'][0]['score']
  # Two images share the width of one.
  assert Image.open(tmp_path / 'out.png').width <= 640
  found = ask(*photos, *photos[::-1])
  assert len(found) == 2 and found[0]['statements'][0][
      'score'] == pytest.approx(two['statements'][0]['score'], abs=1e-5)


def test_tasks_together(runs, tiny_scenes, tmp_path, capsys):
  """A checkpoint keeps the heads of other tasks; all are evaluated at once.

  Questions and statements are other rows of the same records.
  """
  first, run = runs
  before, after = (checkpoint.load(path)[0] for path in runs)
  assert set(after) - set(before) == {'heads_reason'}
  jax.tree.map(np.testing.assert_array_equal, before['heads_answer'],
               after['heads_answer'])
  ask = lambda path: evaluate.main([
      '--checkpoint', path, '--workdir', str(tmp_path), '--data_dir',
      str(tiny_scenes), '--tasks', 'answer,reason', '--limit', '8'])
  ask(run)
  scores = read(tmp_path / 'eval.json')
  assert {'eval/vqa/accuracy', 'eval/nlvr2/accuracy'} <= set(scores)
  assert 'eval/nlvr2/majority' in capsys.readouterr().out
  # A head that is not there is named with the command that trains it.
  with pytest.raises(SystemExit):
    ask(first)
  assert capsys.readouterr().err.endswith(
      f'configs/finetune.py:reason,from={first} --workdir W\n')


def test_heads_of_other_tasks_in_a_config(runs):
  """The head of `reason` is kept, its group does not freeze the new head."""
  config = finetune.get_config(f'answer,from={runs[1]}')
  assert set(config.model.heads) == {'answer', 'reason'}
  assert [p for p, _ in config.optim.groups if p.startswith('heads_')] == [
      'heads_(reason)/.*']
  assert not finetune.get_config(f'detect,from={runs[1]}').model.heads
