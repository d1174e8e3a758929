"""Visual question answering: texts, accuracy, data, targets, loss, task."""
import collections
import dataclasses
import gzip
import json
import types

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
from PIL import Image
import pytest

from configs import finetune
from configs.recipes import answer as answer_recipes
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax import predict
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import answer_list
from e2e_vlp_jax.data import ops_answers
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.data import vqa_answers
from e2e_vlp_jax.data.datasets.scenes import builder as scenes
from e2e_vlp_jax.evaluation import vqa
from e2e_vlp_jax.objectives import answer as answer_objective
from e2e_vlp_jax.tasks import answer as answer_task
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import optim

GOLDENS = ('human_annotator', 'next_question_human')


def read(path):
  """A JSON file, packed or not."""
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'rt', encoding='utf-8') as f:
    return json.load(f)


@pytest.fixture(scope='module')
def official(shared):
  """{question_id: annotation with its question} of 45,172 questions."""
  name = 'vqa_v2_train2014_60k_{}.json.gz'
  text = shared / 'data' / 'text'
  questions = {q['question_id']: q['question'] for q in read(
      text / name.format('questions'))['questions']}
  return {a['question_id']: {
      **a, 'question': questions[a['question_id']],
      'people': [x['answer'] for x in a['answers']]}
          for a in read(text / name.format('annotations'))['annotations']}


# --- Texts and accuracy -----------------------------------------------------
@pytest.mark.parametrize('text, wanted', [
    ('Two', '2'), ('none', '0'), ('The cat', 'cat'), ('a', ''),
    ('dont', "don't"), ("couldntve", 'couldntve'),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
    ("somebody'd", 'somebodyd'), ('yall', "y'all"), ("'ows'at", "'ow's'at"),
    # A mark becomes a space, unless it touches one or a comma between digits
    # stands anywhere.
    ('black/white', 'black white'), ('black / white', 'black white'),
    ('t-shirt', 't shirt'), ('t-shirt - red', 'tshirt red'),
    ('1,000', '1000'), ('t-shirt 1,000', 'tshirt 1000'), ('9,', '9 '.strip()),
    # Periods go, unless a digit follows.
    ('2.5', '2.5'), ('.5', '.5'), ('p.m.', 'pm'), ('7:00 P.M.', '7:00 pm'),
    ('.' * 40, '.' * 8),  # the tool removes 32 of them
])
def test_normalise(text, wanted):
  assert vqa_answers.normalise(text) == wanted


@hypothesis.given(st.text(max_size=30))
def test_normalise_twice_is_once(text):
  once = vqa_answers.normalise(text)
  assert vqa_answers.normalise(once) == once
  assert once == ' '.join(once.split()).lower()


ANSWERS = st.sampled_from(['yes', 'no', 'Yes.', 'a yes', 'two', '2'])


@hypothesis.given(ANSWERS, st.lists(ANSWERS, min_size=2, max_size=10))
def test_accuracy_leaves_one_person_out(answer, people):
  found = vqa_answers.accuracy(answer, people)
  assert found == pytest.approx(vqa_answers.accuracy(answer, people[::-1]))
  if len(set(people)) > 1:
    answer, *people = map(vqa_answers.normalise, [answer, *people])
  ways = [min(1, (people[:k] + people[k + 1:]).count(answer) / 3)
          for k in range(len(people))]
  assert found == pytest.approx(sum(ways) / len(ways))


def test_accuracy_of_equal_people_and_of_one():
  # Nothing is normalised where all people wrote the same.
  assert vqa_answers.accuracy('Yes', ['yes'] * 10) == 0
  assert vqa_answers.accuracy('Yes', ['yes'] * 9 + ['no']) == 1
  assert vqa_answers.accuracy(' a\nb ', ['a b'] * 10) == 1
  assert vqa_answers.accuracy('zero', ['zero']) == 1
  assert vqa_answers.accuracy('one', ['zero']) == 0
  with pytest.raises(ValueError):
    vqa_answers.accuracy('yes', [])


def test_question_types(official):
  """Derived from the words, equal to all annotations."""
  wrong = [q['question'] for q in official.values()
           if vqa_answers.question_type(q['question']) != q['question_type']]
  assert not wrong
  assert len({q['question_type'] for q in official.values()}) == 65


# --- The evaluator ----------------------------------------------------------
def fake_run(questions, answers, rows=64):
  """(predictor, pipeline) where question i is answered by answers[i]."""
  names = sorted(set(answers))
  ids = np.array([names.index(a) for a in answers])

  def batches():
    for t, start in enumerate(range(0, len(questions), rows)):
      numbers = np.arange(start, start + rows)
      valid = numbers < len(questions)
      yield t, {'example_id': np.where(valid, numbers, -1), 'valid': valid}

  pipeline = types.SimpleNamespace(
      num_examples=len(questions), iterate=batches,
      unit=lambda i: ({'questions': questions}, i), name='q {}'.format)
  predictor = types.SimpleNamespace(
      vocabularies=types.SimpleNamespace(
          answers=answer_list.AnswerList(names)),
      task=lambda name: name,
      gather=lambda batch, *keys: [batch[k] for k in keys],
      run=lambda variables, batch, task, answers: {
          'ids': ids[batch['example_id']][:, None, None]})
  return predictor, pipeline


@pytest.mark.parametrize('name', GOLDENS)
def test_goldens(name, shared, official, tmp_path):
  """Overall, by type of answer and of question, and question by question."""
  folder = shared / 'data' / 'goldens' / 'vqa' / name
  results = read(folder / 'results.json.gz')
  wanted = read(folder / 'expected_accuracy.json')
  single = read(folder / 'expected_per_question.json.gz')
  assert len(results) == len(single) == 6727
  for r in results:
    found = vqa_answers.accuracy(r['answer'],
                                 official[r['question_id']]['people'])
    assert abs(100 * found - single[str(r['question_id'])]) < 1e-6
  questions = [official[r['question_id']] for r in results]
  predictor, pipeline = fake_run(
      [dict(question=q['question'], answers=q['people'],
            kind=q['answer_type'], id=q['question_id']) for q in questions],
      [r['answer'] for r in results])
  path = tmp_path / 'deeper' / 'results.json'
  scores = vqa.evaluate(predictor, None, pipeline, question_types=True,
                        submission=str(path))
  scores = {k: round(100 * v, 6) for k, v in scores.items()}
  assert scores.pop('accuracy') == wanted['overall']
  plain = lambda k: k.replace(' ', '_').replace('/', '_')
  assert scores == {
      **{f'accuracy/{plain(k)}': v
         for k, v in wanted['perAnswerType'].items()},
      **{f'accuracy/type/{plain(k)}': v
         for k, v in wanted['perQuestionType'].items()}}
  assert read(path) == sorted(results, key=lambda r: r['question_id'])


def test_without_answers_there_is_a_submission_and_no_score(tmp_path, caplog):
  question = dict(question='is it ?', answers=[], kind='', id=7)
  predictor, pipeline = fake_run([question], ['yes'])
  pipeline.num_examples = 2
  path = tmp_path / 'results.json'
  assert vqa.evaluate(predictor, None, pipeline, submission=str(path)) == {}
  assert read(path) == [{'question_id': 7, 'answer': 'yes'}]
  assert '1 of 2 questions' in caplog.text
  question['id'] = -1
  with pytest.raises(errors.UserError, match='q 0 has no official id'):
    vqa.evaluate(predictor, None, pipeline, submission=str(path))
  question['id'] = 7
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot be written'):
    vqa.evaluate(None, None, pipeline,  # Before anything is predicted.
                 submission=str(tmp_path / 'file' / 'results.json'))


# --- Targets and loss -------------------------------------------------------
def test_targets():
  known = {'yes': 0, 'no': 1, '2': 2, 'zero': 3}
  people = ['yes'] * 5 + ['two', '2', 'Yes!', 'maybe', 'no']
  assert ops_answers.targets(people, known) == [(0, 1.), (2, .6), (1, .3)]
  assert ops_answers.targets(['no'] * 3, known) == [(1, .9)]
  # As it stands first; a single person is right.
  assert ops_answers.targets(['zero'], known) == [(3, 1.)]
  assert ops_answers.targets(['maybe'], known) == []


def test_the_op_needs_a_list_and_questions():
  context = pp.Context(None, None, False, 2, 8, 1, 1, unit='question',
                       answers=answer_list.AnswerList(['no', 'yes']))
  example = {'seed': 0, 'item': 1, 'questions': [
      {'answers': ['no']}, {'answers': ['yes'] * 2 + ['no'] * 8}]}
  found = pp.build('answers', context)(example)
  assert found['answer_ids'].tolist() == [[0, 1] + [-1] * 8]
  np.testing.assert_allclose(found['answer_scores'][0, :3], [1, .6, 0])
  assert found['task_mask/answer']
  example['questions'][1]['answers'] = ['maybe'] * 10
  assert not pp.build('answers', context)(example)['task_mask/answer']
  with pytest.raises(errors.UserError, match="data.unit='question'; it is 'i"):
    pp.build('answers', dataclasses.replace(context, unit='image'))
  with pytest.raises(errors.UserError, match='data.answers: no answer list'):
    pp.build('answers', dataclasses.replace(
        context, answers=answer_list.AnswerList([])))


def test_a_synthetic_batch_has_targets():
  data = dict(buckets=((8, 8),), sentences=2, max_text=6, max_boxes=1,
              max_attributes=1, pp_train="decode|fit|text('questions')|answers")
  for count in (4, 3129):
    batch = synthetic.synthetic_batch(
        data, vocab_size=9, num_classes=2, num_attributes=0,
        num_answers=count, batch_size=3)
    ids, scores = batch['answer_ids'], batch['answer_scores']
    assert ids.shape == scores.shape == (3, 1, 10) and ids.max() < count
    assert batch['text'].shape == (3, 1, 6)
    for row in ids.reshape(-1, 10):
      assert len(set(row[row >= 0])) == (row >= 0).sum() > 0
    assert ((scores > 0) == (ids >= 0)).all()
    assert batch['task_mask/answer'].all()


def test_answer_lists(official):
  answers = answer_list.AnswerList.load('vqav2')
  assert len(answers) == 3129
  # The list is normalised; of the questions 98 % have an answer in it.
  assert all(a == vqa_answers.normalise(a) for a in answers.answers)
  share = np.mean([bool(ops_answers.targets(q['people'], answers.ids))
                   for q in official.values()])
  assert .98 < share < .982
  ours = answer_list.AnswerList.load('scenes')
  given = {a for split in ('train', 'unseen') for i in range(60)
           for q in scenes.example(0, split, i)['questions']
           for a in q['answers']}
  assert given <= set(ours.answers)


def test_objective_and_its_gradient():
  """Against the dense sum in float64; masked questions do not count."""
  rng = np.random.default_rng(0)
  b, s, a = 3, 2, 7
  ids = np.array([[[0, 3], [6, -1]], [[-1, -1], [2, 5]], [[1, 4], [0, -1]]])
  scores = np.where(ids >= 0, rng.choice([.3, .6, .9, 1.], ids.shape), .5)
  mask = np.array([True, True, False])
  logits = rng.normal(0, 3, (b, s, a))
  batch = {'answer_ids': ids, 'answer_scores': scores.astype(np.float32),
           'task_mask/answer': mask}
  objective = answer_objective.Objective()

  def loss(x):
    losses, metrics = objective({'joint': {'answer_logits': x}}, batch)
    total, weight = losses['answer']
    return total / weight, (weight, metrics['answer_accuracy'])
  (value, (weight, accuracy)), gradient = jax.value_and_grad(
      loss, has_aux=True)(np.float32(logits))

  dense = np.zeros((b, s, a))
  for i, j, k in np.argwhere(ids >= 0):
    dense[i, j, ids[i, j, k]] = scores[i, j, k]
  counts = (dense.any(-1) & mask[:, None]).astype(float)
  assert weight == counts.sum() == 3
  # As SOHO and FIBER write it: the mean over answers times their number.
  entropy = (np.logaddexp(0, logits) - dense * logits).mean(-1) * a
  np.testing.assert_allclose(value, (entropy * counts).sum() / 3, rtol=1e-6)
  np.testing.assert_allclose(
      gradient, (1 / (1 + np.exp(-logits)) - dense) * counts[..., None] / 3,
      atol=1e-6)
  right = np.take_along_axis(dense, logits.argmax(-1)[..., None], -1)[..., 0]
  np.testing.assert_allclose(accuracy, ((right * counts).sum(), 3), rtol=1e-6)


# --- The task ---------------------------------------------------------------
def test_task():
  task = answer_task.Task()
  predictor = types.SimpleNamespace(vocabularies=types.SimpleNamespace(
      answers=answer_list.AnswerList(['no', 'yes', 'red'])))
  predictor.model = types.SimpleNamespace(
      apply=lambda variables, batch, requests: {
          'joint': {'answer_logits': np.float32([[[-2, 3, 0], [1, 0, -1]]])}})
  arrays = task.compute(predictor, None, {}, answers=2)
  assert arrays['ids'].tolist() == [[[1, 2], [0, 1]]]
  one = {k: np.asarray(v)[0] for k, v in arrays.items()}
  found = task.result(predictor, one, (4, 6), ['is it ?', ' '])
  assert found.to_json() == {
      'task': 'answer', 'image': {'height': 4, 'width': 6}, 'answers': [
          {'text': 'yes', 'score': pytest.approx(.952574),
           'question': 'is it ?'},
          {'text': 'red', 'score': .5, 'question': 'is it ?'}]}
  json.dumps(found.to_json())

  record = {'questions': [dict(question='is it ?', kind='', id=1,
                               answers=['no'] * 6 + ['yes'] * 4)]}
  words = lambda drawing: [' '.join(t for t, _ in row)
                           for row in drawing.sentences]
  assert words(task.draw(found)) == ['is it ?', 'yes 0.95']
  truth = base.Truth(record, None)
  assert words(task.draw(found, truth)) == ['is it ?', '✓ yes 0.95']
  record['questions'][0]['answers'] = ['no'] * 9 + ['yes']
  assert words(task.draw(found, truth)) == [
      'is it ?', '✗ yes 0.95 · people: no']
  record = {'image_id': '3', 'questions': [
      {'question': 'is it ?'}, {'question': 'what is it ?'}]}
  empty = {'image_id': '4', 'questions': []}
  assert task.sample_texts([record, None, record, empty, record]) == [
      ['is it ?'], [''], ['what is it ?'], [''], ['is it ?']]


# --- Recipes ----------------------------------------------------------------
@pytest.mark.parametrize('system, size, steps, head', [
    ('e2e_vlp', 'r50', 25_707, {'hidden', 'norm', 'out'}),
    ('soho', 'r18', 25_707, {'hidden', 'out'}),
    ('fiber', 'base', 12_854, {'hidden', 'norm', 'out'}),
    ('e2e_vlp', 'tiny', 2000, {'hidden', 'norm', 'out'})])
def test_recipes_fit_their_models(system, size, steps, head):
  """Every key is one of the config; every group has its parameters."""
  data = 'scenes' if size == 'tiny' else 'vqav2'
  config = finetune.get_config(
      f'answer,system={system},size={size},data={data}')
  assert config.total_steps == steps and config.data.unit == 'question'
  kind = 'scenes' if size == 'tiny' else 'published'
  for key, value in answer_recipes.RECIPES[system, kind].items():
    if key != 'side':
      found = config
      for name in key.split('.'):
        found = found[name]
      assert found == value or found.to_dict() == value, key
  vocabulary = vocabularies.Vocabularies.load(config.data)
  assert len(vocabulary.answers) == (28 if size == 'tiny' else 3129)
  model = models.build(config, **vocabulary.sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=2,
                                    **vocabulary.sizes)
  requests = objectives.requests(objectives.build(config))
  shapes = jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, requests), batch)['params']
  assert set(shapes['heads_answer']) == head
  optim.group_of(shapes, config.optim.groups)


def test_a_run_on_scenes(tiny_scenes, tmp_path):
  """Train, evaluate and predict as a person would."""
  workdir = str(tmp_path / 'run')
  train.main([
      '--config', 'configs/finetune.py:answer,system=e2e_vlp', '--workdir',
      workdir, f'--config.data.dir={tiny_scenes}', '--config.total_steps=2',
      '--config.optim.warmup_steps=1', '--config.batch_size=8',
      '--config.eval_batch_size=8', '--config.eval_every_steps=0',
      '--config.evals.vqa.max_examples=16', '--config.samples.count=3',
      '--config.checkpoint.best='])
  scores = read(tmp_path / 'run' / 'eval.json')
  assert 0 <= scores['eval/vqa/accuracy'] <= 1
  pictures = [f.read_bytes() for f in (tmp_path / 'run' / 'samples').iterdir()]
  assert len(pictures) == len(set(pictures)) == 3
  predict.main([
      '--checkpoint', workdir, '--task', 'answer', '--image',
      str(next((tmp_path / 'run' / 'samples').iterdir())), '--text',
      'is there a ring ?', '--json', str(tmp_path / 'answer.json'),
      '--answers', '3'])
  found = read(tmp_path / 'answer.json')
  assert found['task'] == 'answer' and len(found['answers']) == 3
  assert {a['text'] for a in found['answers']} <= set(
      answer_list.AnswerList.load('scenes').answers)


# --- prepare vqav2 ----------------------------------------------------------
NAMES = ('v2_OpenEnded_mscoco_train2014_questions.json',
         'v2_mscoco_train2014_annotations.json')


def question(i, image=1, text='is it red?'):
  return dict(question_id=i, image_id=image, question=text)


def annotation(i, answers=('yes',) * 10, kind='yes/no'):
  return dict(question_id=i, image_id=1, answer_type=kind, question_type='is',
              multiple_choice_answer=answers[0],
              answers=[dict(answer=a, answer_id=k + 1)
                       for k, a in enumerate(answers)])


def write(source, questions, annotations, images=(1,), folder='train2014'):
  """A --source of some questions."""
  (source / folder).mkdir(parents=True, exist_ok=True)
  for name, key, items in zip(NAMES, ('questions', 'annotations'),
                              (questions, annotations)):
    (source / name).write_text(json.dumps({key: items}))
  for i in images:
    Image.new('RGB', (8, 6), (200, 30, 30)).save(
        source / folder / f'COCO_train2014_{i:012d}.jpg')
  return source


def prepared(source, data_dir, *options):
  """({split: [records]}, report) of `prepare vqav2`."""
  prepare.main(['vqav2', '--source', str(source), '--data_dir',
                str(data_dir), *options])
  folder = records.dataset_folder(str(data_dir), 'vqav2')
  with open(f'{folder}/{records.REPORT}', encoding='utf-8') as f:
    report = json.load(f)
  found = {}
  for split in report['splits']:
    opened = records.open_split(str(data_dir), 'vqav2', split)
    found[split] = [opened.get(i) for i in range(len(opened))]
  return found, report


def skipped(report, split='train'):
  """{reason: [names]}."""
  return {k: v['names'] for k, v in report['splits'][split]['skipped'].items()}


def test_prepare_real_questions(shared, tmp_path, capsys):
  """112 questions about 72 photographs of COCO 2017."""
  source = tmp_path / 'coco'
  source.mkdir()
  for name in ('vqa', 'images'):
    (source / name).symlink_to(shared / 'data' / 'coco' / name)
  found, report = prepared(source, tmp_path / 'data')
  assert list(found) == ['train'] and not skipped(report)
  assert (report['splits']['train']['questions'],
          report['splits']['train']['answers']) == (112, 1120)
  assert ('112 questions, 1,120 answers; published: 443,757 and 4,437,570'
          in capsys.readouterr().err)
  wanted = {q['question_id']: q for q in read(source / 'vqa' / NAMES[0])[
      'questions']}
  people = {a['question_id']: a for a in read(source / 'vqa' / NAMES[1])[
      'annotations']}
  assert len(found['train']) == 72
  asked = [(r, q) for r in found['train'] for q in r['questions']]
  assert {q['id'] for _, q in asked} == wanted.keys() and len(asked) == 112
  for record, q in asked:
    assert record['image_id'] == str(wanted[q['id']]['image_id'])
    assert q['question'] == wanted[q['id']]['question']
    assert q['kind'] == people[q['id']]['answer_type']
    assert q['answers'] == [a['answer'] for a in people[q['id']]['answers']]


def test_prepare_leaves_out_counts_and_names(tmp_path):
  source = write(
      tmp_path / 'source',
      [question(10), question(11, text=' '), question(12), question(13, 2),
       question(14), question(15, 3), question(16)],
      [annotation(10, ['a|b', 2, 'x\ny', None, ' no '] + ['\ud83d'] * 5),
       annotation(11), annotation(13), annotation(14, [None] * 10),
       annotation(15), annotation(16), annotation(99)], images=(1, 3))
  found, report = prepared(source, tmp_path / 'data')
  assert [r['image_id'] for r in found['train']] == ['1', '3']
  assert found['train'][0]['questions'] == [
      dict(question='is it red?', kind='yes/no', id=10,
           answers=['a b', '2', 'x y', 'no'] + ['\ufffd'] * 5),
      dict(question='is it red?', kind='yes/no', id=16,
           answers=['yes'] * 10)]
  assert skipped(report) == {
      'answers to a question that is not listed': ['99'],
      'question without words': ['11'],
      'question without answers': ['12', '14'],
      'answer that is no text': ['10'] + ['14'] * 10,
      'image: no such image file': ['COCO_train2014_000000000002.jpg'],
      'question about an image that is left out': ['13']}
  assert report['splits']['train']['changed'] == {
      "answer with '|', which became a space": 1,
      'answer that was a number, not text': 1,
      'text with half a character, which became U+FFFD': 5}


def test_prepare_tests_and_splits(tmp_path, capsys):
  source = tmp_path / 'source'
  (source / 'test2015').mkdir(parents=True)
  Image.new('RGB', (8, 6)).save(
      source / 'test2015' / 'COCO_test2015_000000000005.jpg')
  for name in ('test2015', 'test-dev2015'):
    (source / f'v2_OpenEnded_mscoco_{name}_questions.json').write_text(
        json.dumps({'questions': [question(50, 5)]}))
  found, _ = prepared(source, tmp_path / 'data')
  assert list(found) == ['test']
  wanted = [dict(question='is it red?', answers=[], kind='', id=50)]
  assert found['test'][0]['questions'] == wanted
  found, _ = prepared(source, tmp_path / 'more', '--splits', 'test_dev,test')
  assert list(found) == ['test_dev', 'test']
  assert found['test_dev'][0]['questions'] == wanted
  capsys.readouterr()
  for options, message in (
      (('--splits', 'tests'), "no split 'tests'; did you mean 'test'"),
      (('--splits', 'train'), f'train: no {NAMES[0]}')):
    with pytest.raises(errors.UserError, match=message):
      prepared(source, tmp_path / 'bad', *options)


@pytest.mark.parametrize('change, message', [
    (lambda q, a: q.append(question(10, text='is it blue?')),
     r"questions\[0\] and \[1\] have the same question_id 10, but differ: "
     "question 'is it red\\?' and 'is it blue\\?'"),
    (lambda q, a: a.append(annotation(10, ['no'] * 10)),
     r'annotations\[0\] and \[1\] have the same question_id 10, but differ'),
    (lambda q, a: q[0].update(question_id='1O'),
     r"questions\[0\].question_id is '1O'; expected a whole number"),
    (lambda q, a: q[0].update(image_id=True),
     r'questions\[0\].image_id is True; expected a whole number'),
    (lambda q, a: q[0].update(question=None),
     r'questions\[0\].question is None; expected text'),
    (lambda q, a: a[0].update(answers='yes'),
     r"annotations\[0\].answers is 'yes'; expected a list"),
    (lambda q, a: a.append(3), r'annotations\[1\] is 3; expected an obj'),
    (lambda q, a: q.clear(), 'no questions'),
    (lambda q, a: a.clear(), 'none of 1 images can be used'),
])
def test_prepare_refuses(tmp_path, change, message):
  questions, annotations = [question(10)], [annotation(10)]
  change(questions, annotations)
  source = write(tmp_path / 'source', questions, annotations)
  with pytest.raises(errors.UserError, match=message):
    prepared(source, tmp_path / 'data')


def test_prepare_refuses_what_is_no_source(tmp_path):
  with pytest.raises(errors.UserError, match='--source should be the folder'):
    prepared(tmp_path, tmp_path / 'data')
  source = write(tmp_path / 'source', [question(1)], [annotation(1)])
  (source / NAMES[0]).write_text('{"questions": [')
  with pytest.raises(errors.UserError, match='not readable JSON'):
    prepared(source, tmp_path / 'data')
  (source / NAMES[0]).write_text(json.dumps(
      {'data_subtype': 'val2014', 'questions': [question(1)]}))
  with pytest.raises(errors.UserError, match=f'{NAMES[0]}: it holds val2014 '
                     r'\(data_subtype\), and not train2014'):
    prepared(source, tmp_path / 'data')
  (source / NAMES[0]).write_text('[]')
  with pytest.raises(errors.UserError, match="no list 'questions'"):
    prepared(source, tmp_path / 'data')
  write(source, [question(1)], [annotation(1)], folder='elsewhere')
  (source / 'train2014').rename(source / 'gone')
  with pytest.raises(errors.UserError, match='no train2014/ or train2014.zip'):
    prepared(source, tmp_path / 'data')
  (source / NAMES[1]).unlink()
  with pytest.raises(errors.UserError, match=f'train: no {NAMES[1]}'):
    prepared(source, tmp_path / 'data')


def test_equal_questions_are_let_through(tmp_path):
  # A number may be written as text.
  source = write(tmp_path / 'source', [question(10), question('10')],
                 [annotation(10)] * 2)
  found, _ = prepared(source, tmp_path / 'data')
  assert len(found['train'][0]['questions']) == 1
  assert collections.Counter(found['train'][0]['questions'][0]['answers']) == {
      'yes': 10}
