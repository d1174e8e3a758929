"""Grounding: scores, prompts, and the task on a small fine-stage model."""
import gzip
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from configs import common
from configs import finetune
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.data.datasets import flickr30k_entities
from e2e_vlp_jax.data.tokenizer import load_tokenizer
from e2e_vlp_jax.errors import UserError
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.evaluation import grounding
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import lvis
from e2e_vlp_jax.evaluation import prompts
from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.tasks import base as tasks_base
from e2e_vlp_jax.tasks import ground
from tests import parity
from tests import small_model
from tests import test_fiber_fine
from tests import test_own

ROBERTA = load_tokenizer('bpe', 'roberta-base')


# --- Flickr30k Entities -----------------------------------------------------
@pytest.mark.parametrize('kind', ['any_box', 'merged_box'])
def test_recall_is_that_of_fiber(shared, tmp_path, kind):
  """In all, by kind of phrase, and of all boxes (rank -1)."""
  with np.load(shared / 'reference' / 'fiber_fine' / 'eval_grounding.npz') as f:
    arrays = dict(f)
  rows = arrays['pred_rows_pred_phrase_rank_x1y1x2y2']
  found, truth = [], []
  for n, (i, k) in enumerate(zip(arrays['pred_image_id'],
                                 arrays['pred_sentence_id'])):
    path = tmp_path / f'{i}.xml'
    path.write_text(str(arrays[f'xml_{i}'][()]))
    _, _, boxes = flickr30k_entities.read_boxes(path)
    _, phrases = flickr30k_entities.read_sentence(
        str(arrays[f'sentences_{i}'][k]))
    with_boxes = [p for p in phrases if p[0] in boxes]
    for number, (entity, kinds, _, _) in enumerate(with_boxes):
      mine = rows[(rows[:, 0] == n) & (rows[:, 1] == number)]
      found.append(mine[np.argsort(mine[:, 2])][:, 3:])
      truth.append({'kinds': kinds.split('/'), 'boxes': [
          [x, y, x + w, y + h] for x, y, w, h in boxes[entity]]})
  got = grounding.recall(found, truth, merged=kind == 'merged_box')
  assert {f'{rank}/{name}': v for (rank, name), v in got.items()} == dict(zip(
      arrays[f'{kind}/recall_keys_k_category'].tolist(),
      arrays[f'{kind}/recall_values'].tolist()))


def phrase(box, spans, number, kind=''):
  return dict(bbox=np.array(box, np.float32), spans=spans, text_number=number,
              kind=kind, text='', id=-1)


def test_captions_of_a_record():
  record = dict(width=100, height=10, texts=['a', 'b', 'c'], phrases=[
      phrase([0, .1, 1, .2], [(0, 1)], 1, 'people/other'),
      phrase([0, .5, 1, .6], [(0, 1)], 1), phrase([0, 0, 1, 1], [(0, 1)], -1),
      phrase([0, 0, 1, 1], [(0, 1)], 2)])
  one, other = grounding.captions_of(record, 0, 'image')
  assert (one['text'], other['text']) == ('b', 'c')
  found, = one['phrases']
  np.testing.assert_allclose(found['boxes'], [[10, 0, 20, 10], [50, 0, 60, 10]])
  assert found['kinds'] == ['people', 'other']
  only, = grounding.captions_of(record, 2, 'text')
  assert only['text'] == other['text'] == 'c'
  assert grounding.captions_of(record, 0, 'text') == []


def test_a_caption_of_many_phrases_comes_in_parts():
  phrases = [phrase([0, 0, 1, 1], [(k, k + 1)], 0) for k in range(70)]
  record = dict(width=9, height=9, texts=['x' * 70], phrases=phrases)
  parts = grounding.captions_of(record, 0, 'text')
  assert [len(p['phrases']) for p in parts] == [32, 32, 6]
  assert [p['spans'] for part in parts for p in part['phrases']] == [
      [(k, k + 1)] for k in range(70)]


def test_evaluator():
  """Each caption is asked; what the model cannot read is not found."""
  record = dict(width=100, height=100, texts=['one two', 'three'], phrases=[
      phrase([0, 0, .1, .1], [(0, 3)], 0), phrase([.5, .5, 1, 1], [(4, 7)], 0),
      phrase([.5, .5, 1, 1], [(0, 5)], 1)])
  asked = []

  def phrase_inputs(captions, count):
    tokens = np.zeros((count, 4, 5), bool)
    for text, phrases in captions:
      asked.append(text)
      tokens[0, :len(phrases), 0] = [text != 'three' for _ in phrases]
    return {'phrase_tokens': tokens}

  boxes = np.array([[[[50, 50, 100, 100], [0, 0, 10, 10], [0, 0, 9, 9]]]] * 2)
  predictor = types.SimpleNamespace(
      task=lambda name: name, gather=lambda b, *keys: [b[k] for k in keys],
      phrase_inputs=phrase_inputs, run=lambda *_: {
          'boxes': boxes, 'scores': np.ones((2, 1, 3)),
          'labels': np.array([[[1, 0, -1]]] * 2)})
  ids = np.array([0, -1])
  pipeline = types.SimpleNamespace(
      num_examples=1, unit=lambda i: (record, 0), unit_name='image',
      iterate=lambda: iter([(0, {'example_id': ids, 'valid': ids >= 0})]))
  scores = grounding.evaluate(predictor, None, pipeline)
  assert [t for t in asked if t] == ['one two', 'three']
  # The third phrase is given the box of label 0, which is not its own.
  assert scores['R1'] == scores['merged_R10'] == pytest.approx(2 / 3)
  assert scores['lost_phrases'] == pytest.approx(1 / 3)


# --- LVIS -------------------------------------------------------------------
def drawn(rng, images=25, classes=3):
  box = lambda: [*rng.uniform(0, 60, 2), *rng.uniform(10, 40, 2)]
  true, found = [], []
  for i in range(images):
    for _ in range(rng.integers(0, 6)):
      b, c = box(), int(rng.integers(classes))
      true.append(dict(id=len(true) + 1, image_id=i, category_id=c, bbox=b,
                       area=b[2] * b[3], iscrowd=0))
      found += [dict(image_id=i, category_id=c, score=float(rng.random()),
                     bbox=(b + rng.normal(0, 3, 4)).tolist()) for _ in 'ab']
    found += [dict(image_id=i, category_id=int(rng.integers(classes)),
                   bbox=box(), score=float(rng.random())) for _ in 'abc']
  return true, found


def test_without_federation_it_is_cocos_ap():
  true, found = drawn(np.random.default_rng(0))
  wanted = detection.coco_metrics(
      dict(images=[{'id': i} for i in range(25)], annotations=true,
           categories=[{'id': k} for k in range(3)]), found)
  got = lvis.average_precisions(true, found, {
      i: ({0, 1, 2}, set()) for i in range(25)})
  got = np.array(list(got.values()))
  np.testing.assert_allclose(got.mean(), wanted['AP'], rtol=1e-9)
  np.testing.assert_allclose(got[:, 0].mean(), wanted['AP50'], rtol=1e-9)
  np.testing.assert_allclose(got[:, 5].mean(), wanted['AP75'], rtol=1e-9)


def test_federation():
  """Of an image, only classes that its labels name or deny count."""
  box = [0, 0, 10, 10]
  true = [dict(image_id=0, category_id=0, bbox=box)]
  hit = dict(image_id=0, category_id=0, bbox=box, score=.5)
  wrong = lambda image: dict(image_id=image, category_id=0, score=.9,
                             bbox=[50, 50, 10, 10])
  ap = lambda found, labelled: lvis.average_precisions(
      true, found, labelled)[0].mean()
  assert ap([hit], {}) == 1 and ap([], {}) == 0
  assert ap([hit, wrong(1)], {}) == 1                # not labelled for it
  assert ap([hit, wrong(1)], {1: ({0}, ())}) == .5   # denied
  assert ap([hit, wrong(0)], {}) == .5
  assert ap([hit, wrong(0)], {0: ((), {0})}) == 1    # not listed completely
  assert 0 < ap([hit, {**hit, 'score': .9}], {0: ((), {0})})


def test_the_official_tool(record_property):
  """40 images, 12 classes, tied scores: every class's AP at ten thresholds.

  Stored: results of lvis 0.5.3 without its limit of detections per image.
  """
  path = pathlib.Path(__file__).parent / 'data' / 'lvis.json.gz'
  with gzip.open(path, 'rt', encoding='utf-8') as f:
    case = json.load(f)
  every = {c['id'] for c in case['categories']}
  got = lvis.average_precisions(case['annotations'], case['detections'], {
      i['id']: (set(i['neg_category_ids']),
                set(i['not_exhaustive_category_ids']))
      for i in case['images']})
  wanted = {int(k): v for k, v in case['per_class'].items()}
  assert set(got) == {k for k, v in wanted.items() if v[0] >= 0} != every
  worst = max(np.abs(got[k] - wanted[k]).max() for k in got)
  scores = lvis.summary(got, {c['id']: c['frequency']
                              for c in case['categories']})
  assert set(scores) == set(lvis.GIVES)
  worst = max(worst, *(abs(v - case['results'][k]) for k, v in scores.items()))
  parity.note(record_property, 'LVIS: AP of each class, AP, AP50, AP75, APr, '
              'APc, APf', 'the official tool (stored)', worst, 1e-9)


# --- Prompts ----------------------------------------------------------------
@pytest.mark.parametrize('names, words', [
    ([], 'classes: none'), (['cat', ' '], "number 2, ' ', is empty"),
    (['cat', '(x)'], "number 2, .* is empty"),
    (['Cat', 'dog', 'cat'], "'cat' stands there as number 1 and 3"),
    (['a_cat', 'a cat'], "'a cat' stands there as number 1 and 2")])
def test_bad_class_lists(names, words):
  with pytest.raises(UserError, match=words):
    prompts.checked_names(names)


def fake_predictor(length=16):
  asked = []
  return types.SimpleNamespace(
      tokenizer=ROBERTA, asked=asked, config=types.SimpleNamespace(
          data=types.SimpleNamespace(max_text=length)),
      program=lambda key, function:
      lambda variables, ids, mask: asked.append(ids) or ids)


def test_a_prompt():
  names = label_space.LabelSpace.load('coco').classes
  predictor = fake_predictor(64)
  prompt = prompts.Prompt(predictor, None, names, most=30)
  (tokens,), (ids,) = (prompt.inputs[k] for k in ('prompt_tokens',
                                                  'prompt_ids'))
  assert sorted(ids[ids >= 0].tolist()) == list(range(80))
  assert len(prompt.captions) == len(ids) > 2
  for row, chunk, text in zip(tokens, ids, prompt.captions):
    encoded = np.array(ROBERTA.encode(text, 64))
    for mask, i in zip(row, chunk):
      if i >= 0:
        assert ROBERTA.decode(encoded[mask[:len(encoded)]]) == names[i]
      else:
        assert not mask.any()
  assert len(predictor.asked) == 1  # its features are computed once
  with pytest.raises(UserError, match='has no token that the model reads'):
    predictor.tokenizer = load_tokenizer('wordpiece', 'bert-base-uncased')
    prompts.Prompt(predictor, None, ['cat', '\u200b'])  # a letter of no width


def test_phrases_of_a_text():
  found = prompts.phrase_inputs(fake_predictor(), [
      ('a dog and a cat', [[(0, 5)], [(10, 15), (0, 1)]])], 2)
  assert found['text'].shape == (2, 16)
  tokens = found['phrase_tokens']
  assert tokens.shape == (2, prompts.MOST_PHRASES, 16)
  assert ROBERTA.decode(found['text'][0][tokens[0, 1]]) == 'a a cat'
  assert not tokens[0, 2:].any() and not tokens[1].any()
  with pytest.raises(UserError, match='33 phrases; expected at most 32'):
    prompts.phrase_inputs(fake_predictor(), [('a', [[(0, 1)]] * 33)], 1)


# --- The task ---------------------------------------------------------------
def test_phrases_in_brackets():
  assert ground.parse('[A man] walks [two dogs] .') == (
      'A man walks two dogs .', [(0, 5), (12, 20)])
  assert ground.parse('a dog') == ('a dog', [(0, 5)])
  assert ground.parse(' ') == (' ', [])
  for text, words in (('[a', 'without its other half'), ('a]', 'without'),
                      ('[a [b] c]', 'without'), ('[ ] a', 'an empty phrase')):
    with pytest.raises(UserError, match=words):
      ground.parse(text)


def test_texts_or_classes():
  task = tasks_base.load('ground')
  assert task.check_texts(['[a] b'], 2) == [['[a] b']] * 2
  assert task.check_texts(None, 2, {'classes': 'cat, dog'}) == [[], []]
  with pytest.raises(UserError, match='expected one of the two'):
    task.check_texts(['a'], 1, {'classes': 'cat'})
  with pytest.raises(UserError, match='needs a text'):
    task.check_texts(None, 1)
  with pytest.raises(UserError, match='without its other half'):
    task.check_texts(['[a'], 1)
  assert task.plain_text('[a] b') == 'a b'
  assert ground.class_list('cat, traffic light') == ['cat', 'traffic light']
  assert ground.class_list('cat,,dog') == ['cat', '', 'dog']


def test_results():
  task = tasks_base.load('ground')
  arrays = dict(
      boxes=np.array([[[0., 0, 5, 5], [1, 1, 4, 4], [2, 2, 9, 9], [0] * 4]]),
      scores=np.array([[.9, .6, .5, 0]]), labels=np.array([[1, 0, 1, -1]]))
  found = task.result(None, arrays, (10, 20), ['[a] c [b]'], boxes=2)
  assert found.to_json() == {
      'task': 'ground', 'image': {'height': 10, 'width': 20}, 'objects': [],
      'phrases': [{'text': 'a', 'box': [1, 1, 4, 4], 'score': .6},
                  {'text': 'b', 'box': [0, 0, 5, 5], 'score': .9},
                  {'text': 'b', 'box': [2, 2, 9, 9], 'score': .5}]}
  json.dumps(found.to_json())
  assert [b.style for b in task.draw(found).boxes] == ['bold', 'bold', 'thin']
  record = dict(height=10, width=20, phrases=[
      {**phrase([.1, .05, .4, .2], [(0, 1)], 0), 'text': 'a'},
      {**phrase([.5, .5, 1, 1], [(0, 1)], 0), 'text': 'b'}])
  boxes = task.draw(found, tasks_base.Truth(record, None)).boxes
  assert [b.colour for b in boxes] == [
      tasks_base.TRUTH, tasks_base.RIGHT, tasks_base.TRUTH] + [
          tasks_base.WRONG] * 2
  found = task.result(None, arrays, (10, 20), [], classes='cat, dog',
                      threshold=.55)
  assert [(o.label, o.score) for o in found.objects] == [('dog', .9),
                                                         ('cat', .6)]
  assert len(task.draw(found).boxes) == 2


def test_sample_texts():
  task = tasks_base.load('ground')
  text = 'a dog and a cat'
  record = dict(texts=['x', text], refexps=[], objects=[], phrases=[
      phrase([0] * 4, [(10, 15)], 1), phrase([0] * 4, [(0, 5)], 1),
      phrase([0] * 4, [(0, 1)], -1)])
  objects = dict(texts=[], refexps=[], phrases=[],
                 objects=[dict(label='dog'), dict(label='cat')] * 2)
  said = dict(texts=[], phrases=[], objects=[], refexps=[dict(text='[a] dog')])
  assert task.sample_texts([record, None, objects, said]) == [
      ['[a dog] and [a cat]'], [''], ['[dog]. [cat]'], ['(a) dog']]


# --- With a model -----------------------------------------------------------
@pytest.fixture(scope='module')
def small():
  """(predictor, variables) of a fine stage of some thousand parameters."""
  config = test_fiber_fine.small_config(**{'model.roberta.positions': 26})
  config.data.update(dict(buckets=((48, 48),), max_text=24, max_boxes=4))
  return small_model.build(config)


def pictures(count):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)
          for _ in range(count)]


def test_phrases_of_photographs(small):
  predictor, variables = small
  one, other = predictor.predict(
      variables, pictures(2), 'ground',
      [['[a red ring] and [a star]'], ['the cross']], boxes=2)
  assert {p.text for p in one.phrases} == {'a red ring', 'a star'}
  assert {p.text for p in other.phrases} == {'the cross'}
  for p in one.phrases + other.phrases:
    x0, y0, x1, y1 = p.box
    assert 0 <= x0 < x1 <= 48 and 0 <= y0 < y1 <= 40 and 0 < p.score < 1
  assert one.phrases[0].score >= one.phrases[1].score
  # The text may name anything; what is cut off is told.
  cut, = predictor.predict(variables, pictures(1), 'ground',
                           ['a ring ' * 12 + '[a star]'])
  assert not cut.phrases and cut.cut_texts[0].text.endswith('ring a star')


def test_text_features_of_classes_are_computed_once(small, monkeypatch):
  """And the boxes are those of the whole computation for each image."""
  predictor, variables = small
  names = label_space.LabelSpace.load('scenes').classes
  encode, encoded = prompts._encoded, []  # pylint: disable=protected-access
  monkeypatch.setattr(
      prompts, '_encoded',
      lambda *args: encoded.append(args[2].shape) or encode(*args))
  results = predictor.predict(variables, pictures(10), 'ground', classes=names,
                              threshold=0.)
  assert encoded == [(1, 24)] and len(results) == 10  # two batches
  prompt = predictor.prompt(variables, names)
  text = prompts.phrase_inputs(predictor, [(prompt.captions[0], [])], 1)
  example = inputs.example(predictor, pictures(1)[0])
  batch = {k: v[None] for k, v in (example | text).items()}

  @jax.jit
  def whole(variables, batch, tokens):
    out = predictor.model.apply(variables, batch, ground.Task.requests)['joint']
    return grounding_head.objects(
        out, tokens, grounding_head.image_size(batch['image_mask']),
        **ground.CLASSES)
  found = whole(variables, batch, prompt.inputs['prompt_tokens'])
  there = np.asarray(found['labels'][0, 0]) >= 0
  np.testing.assert_allclose(
      [o.score for o in results[0].objects],
      np.sort(np.asarray(found['scores'])[0, 0][there])[::-1], atol=1e-5)
  assert there.any() and {o.label for o in results[0].objects} <= set(names)


def test_an_expression_by_its_tokens(small):
  """The task refer works with this kind of model too."""
  predictor, variables = small
  assert {'ground', 'refer'} <= set(predictor.task_names())
  found, = predictor.predict(variables, pictures(1), 'refer',
                             ['the red ring', 'a star'], boxes=2)
  assert [p.text for p in found.phrases] == ['the red ring'] * 2 + [
      'a star'] * 2
  same, = predictor.predict(variables, pictures(1), 'ground',
                            ['[the red ring]'])
  # Both score all words; only the number of results differs.
  np.testing.assert_allclose(found.phrases[0].box, same.phrases[0].box,
                             atol=1e-3)


def test_classes_that_training_did_not_have(small, tmp_path):
  """Zero-shot: a dataset is asked for its own classes, one by one."""
  test_own.put(tmp_path / 's' / 'a.json', test_own.coco(3))
  test_own.put_pictures(tmp_path / 's', 3)
  test_own.own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0)
  predictor, variables = small
  config = predictor.config.copy_and_resolve_references()
  config.data.dir, config.eval_batch_size = str(tmp_path / 'd'), 8
  source = dict(name='mine', split='train')
  config.samples = dict(count=2, source=source)
  config.evals = {'zero_shot': dict(
      common.evaluator('class_prompts', source,
                       'decode|fit|grounding(negatives=-1)'),
      options=dict(per_class=True))}
  config.data.pp_eval = 'decode|fit|grounding'
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  assert 'kite' not in vocabularies.labels.classes
  page = {}
  scores, drawn_pictures = evaluators.Evaluators(
      config, predictor.model, vocabularies).run(variables, details=page)
  assert {k.rpartition('/')[2] for k in scores if '/AP/' in k} == {
      'cup', 'kite'}
  assert 0 <= scores['eval/zero_shot/AP'] <= 1 and len(drawn_pictures) == 2
  # Where it fails is shown as for any detector.
  assert [s.title for s in page['zero_shot']] == [
      'Average precision of each class', 'Precision and recall',
      'What is taken for what', 'The worst images']


def test_finetuning_chooses_what_the_model_has():
  config = finetune.get_config('refer,system=fiber_fine,size=tiny')
  assert dict(config.objectives) == {'grounding': 1.}
  assert (config.data.unit, config.data.pp_train) == (
      'refexp', 'decode|fit|grounding')
  assert not config.model.heads and list(config.evals) == ['refexp']
  config = finetune.get_config('ground,system=fiber_fine,size=tiny')
  assert config.checkpoint.best == 'eval/grounding/R1'
