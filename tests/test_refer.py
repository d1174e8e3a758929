"""Referring expressions: data, objective, task, score, E2E-VLP's decoder."""
import json
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import finetune
from configs.recipes import refer as refer_recipes
from e2e_vlp_jax import models
from e2e_vlp_jax import objectives
from e2e_vlp_jax import predict
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.errors import UserError
from e2e_vlp_jax.evaluation import refexp
from e2e_vlp_jax.objectives import refer as refer_objective
from e2e_vlp_jax.tasks import base as tasks_base
from e2e_vlp_jax.tasks import detect
from e2e_vlp_jax.training import optim
from tests import small_model

HEADS = {'refer': dict(kind='classifier', state='queries', views=('grounded',),
                       outputs=1)}


# --- The objective ----------------------------------------------------------
def outputs(boxes, logits, layers=1):
  """Of one image with one expression."""
  boxes = jnp.asarray(boxes, jnp.float32)[None, None]
  return {'grounded': {
      'pred_boxes': boxes,
      'aux_boxes': jnp.repeat(boxes[:, :, None], layers - 1, 2),
      'refer_logits': jnp.asarray(logits, jnp.float32)[None, None, :, None]}}


def batch(box=(.5, .5, .2, .2), shown=True, valid=True):
  return {'referred_box': jnp.asarray(box)[None, None], 'valid': jnp.asarray(
      [valid]), 'task_mask/refer': jnp.asarray([shown])}


def losses(boxes, logits, layers=1, **kwargs):
  found, metrics = refer_objective.Objective()(
      outputs(boxes, logits, layers), batch(**kwargs))
  return ({k: float(s) for k, (s, _) in found.items()},
          float(next(iter(found.values()))[1]),
          float(metrics['refer_accuracy'][0]))


FAR = (.1, .1, .1, .1)


def test_the_best_query_is_trained():
  right = (.5, .5, .2, .2)
  found, count, accuracy = losses([right, FAR], [20., 0.])
  assert count == 1 and accuracy == 1
  np.testing.assert_allclose(list(found.values()), 0, atol=1e-5)
  # The loss is that of the nearest query, whichever is the likeliest.
  found, _, accuracy = losses([right, FAR], [0., 20.])
  assert accuracy == 0 and found['box'] == 0
  np.testing.assert_allclose(found['query'], 20, rtol=1e-5)
  found, _, _ = losses([(.5, .5, .4, .2), FAR], [0., 0.])
  np.testing.assert_allclose(found['box'], 5 * .2, rtol=1e-5)
  np.testing.assert_allclose(found['giou'], 2 * .5, rtol=1e-5)
  np.testing.assert_allclose(found['query'], np.log(2), rtol=1e-5)
  # Every layer's boxes are trained; the query only once.
  again, _, _ = losses([(.5, .5, .4, .2), FAR], [0., 0.], layers=3)
  np.testing.assert_allclose(again['box'], 3 * found['box'], rtol=1e-5)
  assert again['query'] == found['query']


def test_what_is_not_there_does_not_count():
  for kwargs in (dict(shown=False), dict(valid=False)):
    found, count, accuracy = losses([FAR], [1.], **kwargs)
    assert count == accuracy == 0 and set(found.values()) == {0.}


def test_gradients_are_finite_for_a_box_without_area():
  def loss(boxes):
    found, _ = refer_objective.Objective()(outputs(boxes, [0., 0.]), batch())
    return sum(s for s, _ in found.values())
  grad = jax.grad(loss)(jnp.array([(.5, .5, .2, .2), (.3, .3, 0., 0.)]))
  assert np.isfinite(grad).all() and np.abs(grad).sum() > 0


# --- The op -----------------------------------------------------------------
def made(box, string='decode|fit|refexp', unit='refexp', seed=0):
  record = base.record(image=b'', image_id='', height=40, width=80, refexps=[
      dict(text='a dog', bbox=base.stored_box(box), spans=[], id=-1)])
  context = pp.Context(None, None, True, 1, 8, 4, 2, unit)
  return pp.build(string, context)({
      **record, 'item': 0, 'bucket': (32, 64), 'seed': seed,
      'partner_texts': (), 'has_boxes': False})


def test_the_box_of_the_expression():
  row = made((.25, .5, .75, .9))
  np.testing.assert_allclose(row['referred_box'], [[.5, .7, .5, .4]], atol=1e-6)
  assert row['task_mask/refer']
  # A crop that removes the box masks it.
  rows = [made((.0, .0, .05, .05), 'decode|random_crop|fit|refexp', seed=s)
          for s in range(40)]
  shown = [r['task_mask/refer'] for r in rows]
  assert 0 < sum(shown) < 40
  assert all(r['referred_box'].any() == r['task_mask/refer'] for r in rows)
  with pytest.raises(UserError, match="refexp needs data.unit='refexp'"):
    made((0, 0, 1, 1), unit='image')


# --- The model --------------------------------------------------------------
@pytest.fixture(scope='module')
def small():
  config = small_model.get_config(heads=HEADS)
  requests = {'grounded': ('boxes', 'refer')}
  return (*small_model.build(config, requests), requests, config)


def test_boxes_depend_on_the_text_and_not_on_padding(small):
  predictor, variables, requests, config = small
  model = predictor.model
  data = synthetic.synthetic_batch(config.data, batch_size=2,
                                   **predictor.vocabularies.sizes)
  data['text_mask'][:] = np.arange(10) < 6
  data['image_mask'][:] = (np.arange(96) < 72)[None, :, None]
  data['image'][:, 72:] = 0
  run = jax.jit(lambda b: model.apply(variables, b, requests)['grounded'])
  one = run(data)
  assert one['pred_boxes'].shape == (2, 1, 5, 4)
  assert one['aux_boxes'].shape == (2, 1, 0, 5, 4)
  assert one['refer_logits'].shape == (2, 1, 5, 1)
  text = data['text'].copy()
  text[..., 6:] = 7  # Only padding.
  image = data['image'].copy()
  image[:, 72:] = 99
  same = run({**data, 'text': text, 'image': image})
  text = data['text'].copy()
  text[..., 2] += 1
  other = run({**data, 'text': text})
  for key, value in one.items():
    np.testing.assert_allclose(value, same[key], atol=1e-5, err_msg=key)
    assert not value.size or np.abs(value - other[key]).max() > 1e-4, key


def test_detect_is_the_view(small):
  """From features, with two texts for each image."""
  predictor, variables, requests, config = small
  model = predictor.model
  config.data.sentences = 2
  data = synthetic.synthetic_batch(config.data, batch_size=2,
                                   **predictor.vocabularies.sizes)
  config.data.sentences = 1

  def detect_(m, data):
    return m.detect(m.encode_image(data),
                    m.encode_text(data['text'], data['text_mask']))
  found = model.apply(variables, data, method=detect_)
  view = model.apply(variables, data, requests)['grounded']
  np.testing.assert_allclose(found['pred_boxes'], view['pred_boxes'], atol=1e-6)
  assert found['pred_boxes'].shape == (2, 2, 5, 4)


# --- Task and score ---------------------------------------------------------
def test_task():
  task = tasks_base.load('refer')
  arrays = {'boxes': np.array([[[1., 2, 3, 4], [0, 0, 9, 9]]]),
            'scores': np.array([[.75, .25]])}
  found = task.result(None, arrays, (10, 20), ['a dog'])
  assert found.to_json() == {
      'task': 'refer', 'image': {'height': 10, 'width': 20}, 'phrases': [
          {'text': 'a dog', 'box': [1, 2, 3, 4], 'score': .75},
          {'text': 'a dog', 'box': [0, 0, 9, 9], 'score': .25}]}
  json.dumps(found.to_json())
  drawing = task.draw(found)
  assert [b.tag for b in drawing.boxes] == ['a dog', '']
  record = dict(height=10, width=20, refexps=[dict(
      text='a dog', bbox=np.array([.2, .05, .4, .15], np.float32))])
  drawing = task.draw(found, tasks_base.Truth(record, None))
  assert [b.colour for b in drawing.boxes][:2] == [tasks_base.TRUTH,
                                                   tasks_base.RIGHT]
  record['refexps'][0]['bbox'] = np.array([.5, .5, .9, .9], np.float32)
  drawing = task.draw(found, tasks_base.Truth(record, None))
  assert drawing.boxes[1].colour == tasks_base.WRONG
  records_ = [dict(image_id='1', refexps=[dict(text='x'), dict(text='y')]),
              None] * 2
  assert task.sample_texts(records_) == [['x'], [''], ['y'], ['']]


def test_precision_as_fiber_counts(shared):
  with np.load(shared / 'reference' / 'fiber_fine' / 'eval_grounding.npz') as f:
    arrays = dict(f)
  x, y, w, h = arrays['refexp/gt_xywh'].T
  order = np.argsort(-arrays['refexp/pred_scores'], 1, kind='stable')
  boxes = np.take_along_axis(arrays['refexp/pred_boxes'], order[..., None], 1)
  found = refexp.precision(boxes, np.stack([x, y, x + w, y + h], 1),
                           detect.generalised_iou)
  np.testing.assert_array_equal(list(found.values()),
                                arrays['refexp/precision_at_1_5_10'])
  np.testing.assert_allclose(
      detect.generalised_iou(arrays['giou_a'], arrays['giou_b']),
      arrays['giou_matrix'], atol=1e-6)


def test_evaluator():
  """Boxes in pixels of the original; padding does not count."""
  found = np.zeros((4, 1, 10, 4))
  found[0, 0, 0] = [10, 10, 30, 20]  # right
  found[1, 0, 4] = [10, 10, 30, 20]  # among the first five
  expected = dict(text='a dog', spans=[(2, 5)],
                  bbox=np.array([.5, .1, 1., .3], np.float32))
  record = dict(height=20, width=100, refexps=[None, expected])
  ids = np.array([0, 1, 2, -1])
  asked = []
  predictor = types.SimpleNamespace(
      task=lambda name: name, gather=lambda b, *keys: [b[k] for k in keys],
      phrase_inputs=lambda captions, count: asked.append(captions) or {
          'phrase_tokens': np.zeros((1, 2, 3), bool)},
      run=lambda variables, batch, task, boxes=1: {'boxes': found})
  pipeline = types.SimpleNamespace(
      num_examples=3, unit=lambda i: (record, 1), iterate=lambda: iter([
          (0, {'example_id': ids, 'valid': ids >= 0})]))
  scores = refexp.evaluate(predictor, None, pipeline)
  assert scores == {'accuracy': 1 / 3, 'giou_P1': 1 / 3, 'giou_P5': 2 / 3,
                    'giou_P10': 2 / 3}
  assert asked[0] == [('a dog', [[(2, 5)]])]


# --- Recipes, and a run -----------------------------------------------------
@pytest.mark.parametrize('size, data', [('r50', 'refcoco'), ('tiny', 'scenes')])
def test_recipes_fit_their_model(size, data):
  config = finetune.get_config(
      f'refer,system=e2e_vlp,size={size},data={data}')
  assert config.data.unit == 'refexp'
  kind = 'scenes' if size == 'tiny' else 'published'
  for key, value in refer_recipes.RECIPES['e2e_vlp', kind].items():
    found = config
    for name in key.split('.'):
      found = found[name]
    assert found == value, key
  vocabulary = vocabularies.Vocabularies.load(config.data)
  model = models.build(config, **vocabulary.sizes)
  requests = objectives.requests(objectives.build(config))
  data = synthetic.synthetic_batch(config.data, batch_size=1,
                                   **vocabulary.sizes)
  shapes = jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, requests), data)['params']
  assert shapes['heads_refer']['out']['kernel'].shape[-1] == 1
  optim.group_of(shapes, config.optim.groups)


def test_a_model_without_object_queries_says_what_it_can():
  with pytest.raises(UserError, match="task 'refer' .*'soho'.* can be "
                     'fine-tuned for answer'):
    finetune.get_config('refer,system=soho,size=tiny')


def test_a_run_on_scenes(tiny_scenes, tmp_path):
  """Train, evaluate and predict as a person would."""
  workdir = str(tmp_path / 'run')
  train.main([
      '--config', 'configs/finetune.py:refer,system=e2e_vlp', '--workdir',
      workdir, f'--config.data.dir={tiny_scenes}', '--config.total_steps=2',
      '--config.optim.warmup_steps=1', '--config.batch_size=8',
      '--config.eval_batch_size=8', '--config.eval_every_steps=0',
      '--config.evals.refexp.max_examples=16', '--config.samples.count=3',
      '--config.checkpoint.best='])
  scores = json.loads((tmp_path / 'run' / 'eval.json').read_text())
  assert 0 <= scores['eval/refexp/accuracy'] <= 1
  picture = next((tmp_path / 'run' / 'samples').iterdir())
  predict.main([
      '--checkpoint', workdir, '--task', 'refer', '--image', str(picture),
      '--text', 'the red ring', '--boxes', '3', '--json',
      str(tmp_path / 'refer.json'), '--picture', str(tmp_path / 'out.png')])
  found = json.loads((tmp_path / 'refer.json').read_text())
  assert [p['text'] for p in found['phrases']] == ['the red ring'] * 3
  width, height = found['image']['width'], found['image']['height']
  for p in found['phrases']:
    x0, y0, x1, y1 = p['box']
    assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
  assert found['phrases'][0]['score'] >= found['phrases'][1]['score']


# --- prepare refcoco --------------------------------------------------------
BOX = [8, 4, 24, 20]
REF = dict(image_id=7, ann_id=3, split='val', sentences=[
    dict(raw='the  dog', sent='dog', sent_id=11),
    dict(sent='left', sent_id=12)])
INSTANCES = dict(annotations=[dict(id=3, bbox=BOX)])
FORMS = {
    'refs.json': ([REF], [('the dog', 11), ('left', 12)]),
    'refcocog_subset.json': (
        [dict(image_id=7, bbox=BOX, sentence='the dog', split='google-val')],
        [('the dog', -1)]),
    'google_refexp_val_201511_coco_aligned.json': (dict(
        annotations={'3': dict(image_id=7, bbox=BOX, refexp_ids=[5])},
        refexps={'5': dict(raw='the dog')}), [('the dog', 5)]),
    'finetune_refcoco_val.json': (dict(
        images=[dict(id=4, file_name='COCO_train2014_000000000007.jpg',
                     height=40, width=80, caption='the dog', original_id=7)],
        annotations=[dict(image_id=4, bbox=BOX, tokens_positive=[[4, 7]])]),
                                  [('the dog', 4)])}


def source_of(tmp_path, name, content):
  source = tmp_path / 'source'
  (source / 'train2014').mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (80, 40)).save(
      source / 'train2014' / 'COCO_train2014_000000000007.jpg')
  (source / name).write_text(json.dumps(content))
  return source


def run(source, data_dir, *options):
  prepare.main(['refcoco', '--source', str(source), '--data_dir',
                str(data_dir), *options])
  split = records.open_split(str(data_dir), 'refcoco', 'validation')
  return [split.get(i) for i in range(len(split))]


@pytest.mark.parametrize('name', FORMS)
def test_all_forms_of_expressions(tmp_path, name):
  content, wanted = FORMS[name]
  source = source_of(tmp_path, name, content)
  (source / 'instances.json').write_text(json.dumps(INSTANCES))
  record, = run(source, tmp_path)
  assert [(r['text'], r['id']) for r in record['refexps']] == wanted
  for r in record['refexps']:
    np.testing.assert_allclose(r['bbox'], [.1, .1, .6, .4])
    assert r['spans'] == ([(4, 7)] if 'finetune' in name else [])


def test_a_pickle_is_not_read(tmp_path):
  source = source_of(tmp_path, 'x.json', {})
  (source / 'refs(unc).p').write_bytes(pickle.dumps([REF]))
  with pytest.raises(UserError, match='is a pickle, .* not read; export it'):
    run(source, tmp_path)


@pytest.mark.parametrize('name, content, words', [
    ('refs.json', [{**REF, 'split': 'dev'}], r"\[0\].split is 'dev'"),
    ('refs.json', [{**REF, 'ann_id': 9}], 'ann_id is 9, which no annotation'),
    ('google_refexp_val.json', dict(annotations={'3': dict(image_id=7)},
                                    refexps={}), "no 'bbox'.*aligned"),
    ('finetune_refcoco_val.json', dict(
        images=[dict(id=4, file_name='7.jpg', caption='x')], annotations=[]),
     'an expression with 0 boxes'),
    ('other.json', [], 'no finetune_refcoco')])
def test_bad_files(tmp_path, name, content, words):
  source = source_of(tmp_path, name, content)
  (source / 'instances.json').write_text(json.dumps(INSTANCES))
  with pytest.raises(UserError, match=words):
    run(source, tmp_path)


def test_two_sets_in_one_folder(tmp_path):
  source = source_of(tmp_path, 'finetune_refcoco_val.json',
                     FORMS['finetune_refcoco_val.json'][0])
  (source / 'finetune_refcoco+_val.json').write_text('{}')
  with pytest.raises(UserError, match='choose those of one'):
    run(source, tmp_path)
  assert run(source, tmp_path, '--expressions', 'finetune_refcoco_*.json')
