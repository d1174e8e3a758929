"""Evaluators: exact sums over the right rows, whatever the batching."""
import fnmatch
import importlib
import json

import jax
import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.evaluation import captioning
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import evaluators as evaluators_lib
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import itm
from e2e_vlp_jax.evaluation import mlm
from e2e_vlp_jax.evaluation import pictures
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.evaluation import variables as variables_lib
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import caption
from e2e_vlp_jax.tasks import detect
from e2e_vlp_jax.tasks import match
from e2e_vlp_jax.training import sharding
from tests import small_model

SEE = 'decode|fit|boxes|text'
EVALUATORS = {'detection': (detection, SEE), 'captioning': (captioning, SEE),
              'itm': (itm, SEE + '|itm(.5)'), 'mlm': (mlm, SEE + '|mlm(.3)')}
DETECT = base.load('detect')


@pytest.fixture(scope='module')
def built(tiny_scenes):
  return small_model.built(str(tiny_scenes))


@pytest.fixture(scope='module')
def config(built):
  return built[0].config


def open_pipeline(config, predictor, pp, batch_size=6):
  return pipeline_lib.Pipeline(
      config.data, vocabularies=predictor.vocabularies,
      sources=[dict(name='scenes', split='test', weight=1.)], pp=pp, seed=0,
      batch_size=batch_size, train=False)


class Oracle(predictor_lib.Predictor):
  """Knows the answers: every evaluator has to give it full marks."""
  pipeline = None

  def run(self, variables, batch, task, **options):
    return {'detect': self._detect, 'match': self._match,
            'mlm': self._mlm}[task.name](batch)

  def results(self, variables, batch, task, texts=None, **options):
    assert task.name == 'caption'
    return [caption.Result('caption', 1, 1, caption.Caption(
        self.pipeline.record(i)['texts'][0] if i >= 0 else 'a', 1.))
            for i in batch['example_id']]

  def _detect(self, batch):
    b, q = len(batch['example_id']), self.config.data.max_boxes
    out = {'boxes': np.zeros((b, q, 4)), 'scores': np.zeros((b, q)),
           'labels': np.zeros((b, q), int),
           'attributes': np.zeros((b, q, len(self.labels.attributes)))}
    for row, example_id in enumerate(batch['example_id']):
      objects = [] if example_id < 0 else detect.ground_truth(
          self.pipeline.record(example_id), self.labels)
      for k, one in enumerate(objects):
        out['boxes'][row, k], out['labels'][row, k] = (one['box'],
                                                       one['class_id'])
        out['scores'][row, k] = 1
        out['attributes'][row, k, list(one['attribute_ids'])] = 1
    return out

  def _match(self, batch):
    return {'scores': batch['itm_labels'].astype(np.float32)}

  def _mlm(self, batch):
    return {'tokens': np.where(batch['image'].any((1, 2, 3))[:, None, None],
                               batch['mlm_labels'], 0)}


def oracle_scores(config, built, name, batch_size, max_examples=None):
  module, pp = EVALUATORS[name]
  oracle = Oracle(built[0].model, config, built[0].vocabularies)
  oracle.pipeline = open_pipeline(config, oracle, pp, batch_size)
  done = []
  scores = module.evaluate(oracle, {}, oracle.pipeline,
                           max_examples=max_examples, progress=done.append)
  return scores, done


@pytest.mark.parametrize('name', EVALUATORS)
def test_full_marks_for_the_oracle_and_none_for_padding(config, built, name):
  # 16 examples in batches of 6: the last batch has two rows of padding.
  scores, done = oracle_scores(config, built, name, 6)
  assert done[-1] == 16
  full = {'detection': ('AP', 'AP50', 'AP75', 'AR100', 'matched',
                        'attribute_accuracy', 'attribute_accuracy/colour',
                        'attribute_accuracy/size',
                        'attribute_accuracy/texture'),
          'captioning': ('BLEU4', 'ROUGE_L', 'facts_right'),
          'itm': ('accuracy',), 'mlm': ('accuracy',)}[name]
  for metric in full:
    assert scores[metric] == pytest.approx(1), metric
  if name == 'captioning':
    assert scores['CIDEr'] > 1
  if name == 'mlm':
    assert scores['image_gain'] == pytest.approx(
        1 - scores['accuracy_blank_image'])


def test_a_sample_has_the_size_asked_for(config, built):
  for batch_size, wanted in ((6, 4), (4, 10), (6, 16), (3, 99)):
    _, done = oracle_scores(config, built, 'itm', batch_size, wanted)
    assert done[-1] == min(wanted, 16), (batch_size, wanted)


def test_scores_do_not_depend_on_the_batch_size(config, built):
  for name in ('detection', 'mlm'):
    module, pp = EVALUATORS[name]
    a, b = (module.evaluate(*built, open_pipeline(config, built[0], pp, n))
            for n in (6, 4))
    assert a.keys() == b.keys()
    for key in a:
      assert a[key] == pytest.approx(b[key], abs=1e-5), (name, key)
      assert np.isfinite(a[key])


def test_results_are_the_same_on_a_mesh(config, built):
  predictor, variables = built
  mesh = sharding.make_mesh(dict(data=4, fsdp=1, tensor=1), jax.devices()[:4])
  other = predictor_lib.Predictor(predictor.model, config,
                                  predictor.vocabularies, mesh)
  batch = open_pipeline(config, predictor, SEE, 4).batch(0)
  one = predictor.run(variables, batch, DETECT)
  for key, value in other.run(variables, batch, DETECT).items():
    np.testing.assert_allclose(one[key], value, atol=1e-4, err_msg=key)


def test_boxes_do_not_depend_on_the_padding(built):
  predictor, variables = built
  image = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
  found = []
  for bucket in ((84, 60), (96, 84)):
    batch = {'image': np.zeros((1, *bucket, 3), np.uint8),
             'image_mask': np.zeros((1, *bucket), bool),
             'image_size': np.array([[160, 120]], np.int32)}
    batch['image'][0, :80, :60] = image
    batch['image_mask'][0, :80, :60] = True
    found.append(predictor.run(variables, batch, DETECT))
  np.testing.assert_allclose(found[0]['boxes'], found[1]['boxes'], atol=.05)
  np.testing.assert_allclose(found[0]['scores'], found[1]['scores'],
                             atol=1e-3)


def test_ap_depends_on_neither_batch_nor_bucket(config, built, monkeypatch):
  """What the model finds in one setting is the truth of all others.

  An untrained model finds nothing that is there, so that its AP would be 0
  in any setting. (On a trained one, by hand: see docs/parity.md.)
  """
  predictor, variables = built
  truth = {}
  pipeline = open_pipeline(config, predictor, SEE)
  for batch, ids in inputs.batches(predictor, pipeline):
    found = predictor.run(variables, batch, DETECT)
    for row, i in enumerate(ids):
      one = {k: v[row] for k, v in found.items()}
      truth[int(i)] = [
          {'box': one['boxes'][q], 'class_id': int(one['labels'][q]),
           'area': float(np.prod(one['boxes'][q][2:] - one['boxes'][q][:2])),
           'is_crowd': False, 'attribute_ids': set()}
          for q in np.argsort(-one['scores'])[:2]]
  records_of = {i: pipeline.record(i)['image_id'] for i in truth if i >= 0}
  by_image = {records_of[i]: objects for i, objects in truth.items() if i >= 0}
  monkeypatch.setattr(detect, 'ground_truth',
                      lambda record, labels: by_image[record['image_id']])

  def scores(batch_size, buckets):
    other = config.copy_and_resolve_references()
    other.data.buckets = buckets
    found = detection.evaluate(
        predictor, variables,
        open_pipeline(other, predictor, SEE, batch_size))
    print(batch_size, buckets, found)
    return found
  first = scores(6, ((96, 96),))
  assert first['AP50'] > .3
  for setting in ((4, ((96, 96),)), (6, ((96, 144),))):
    other = scores(*setting)
    for name, value in first.items():
      assert abs(other[name] - value) < 1e-3, (setting, name)


@pytest.mark.parametrize('pp', [SEE, 'decode|squash|text'])
@pytest.mark.parametrize('bucket', [(96, 96), (80, 70), (50, 64), (200, 131)])
def test_one_image_is_prepared_as_the_pipeline_prepares_it(config, built,
                                                           bucket, pp):
  config = config.copy_and_resolve_references()
  config.data.buckets = (bucket,)
  config.data.pp_eval = pp
  predictor = predictor_lib.Predictor(
      built[0].model, config, built[0].vocabularies)
  pipeline = open_pipeline(config, predictor, pp, 2)
  batch = pipeline.batch(0)
  record = pipeline.record(batch['example_id'][1])
  one = inputs.example(predictor, record['image'], record['texts'][:1], 1)
  for key in one:
    np.testing.assert_array_equal(one[key], batch[key][1], err_msg=key)


@pytest.mark.parametrize('size, bucket, shown', [
    ((333, 500), (96, 128), (85, 128)), ((500, 333), (128, 96), (128, 85)),
    ((600, 599), (112, 112), (112, 112)), ((1, 300), (96, 128), (1, 128))])
def test_images_go_to_the_bucket_of_the_nearest_shape(size, bucket, shown):
  buckets = ((96, 128), (128, 96), (112, 112))
  canvas, mask = inputs.fit(np.full((*size, 3), 9, np.uint8), buckets)
  assert canvas.shape == (*bucket, 3) and mask.shape == bucket
  assert mask.sum() == np.prod(shown) and mask[shown[0] - 1, shown[1] - 1]
  np.testing.assert_array_equal(canvas == 9, np.repeat(mask[..., None], 3, 2))


def test_likely_attributes_of_groups_and_alone():
  found = detect.likely_attributes(np.array([.1, .3, .05, .55]),
                                   {'colour': [0, 1]}, [2, 3])
  assert [i for i, _ in found] == [1, 3]
  assert [s for _, s in found] == pytest.approx([.75, .55])


def test_objects_are_sorted_cut_to_the_image_and_thresholded(built):
  predictor, _ = built
  found = {'boxes': np.array([[-5., 2, 30, 99], [1, 1, 5, 5], [0, 0, 9, 9]]),
           'scores': np.array([.6, .9, .2]), 'labels': np.array([0, 1, 2]),
           'attributes': np.full((3, len(predictor.labels.attributes)), .1)}
  objects = DETECT.result(predictor, found, (40, 20), ()).objects
  assert [o.score for o in objects] == [.9, .6]
  assert objects[1].box == [0, 2, 20, 40]
  assert objects[0].label == predictor.labels.classes[1]
  groups, _ = detect.attribute_groups(predictor.labels)
  assert len(objects[0].attributes) == len(groups)


def test_sample_sheet(config, built):
  pipeline = open_pipeline(config, built[0], SEE)
  images = pictures.sample_sheet(*built, pipeline, 3)
  assert len(images) == 3
  assert all(i.width >= 384 and i.mode == 'RGB' for i in images)


def colours(picture):
  return {c for _, c in picture.getcolors(1 << 20)}


def truth(*objects, texts=(), check=None):
  """A Truth of a 40x60 image; objects: (label, attributes, xyxy box)."""
  labels = label_space.LabelSpace(['cat', 'dog'], ['red', 'blue'], {})
  relative = lambda x0, y0, x1, y1: (y0 / 40, x0 / 60, y1 / 40, x1 / 60)
  return base.Truth(dict(
      height=40, width=60, texts=list(texts), objects=[
          dict(label=label, attributes=attributes, bbox=relative(*box),
               area=1., is_crowd=False)
          for label, attributes, box in objects]), labels, check)


def detected(*objects):
  """A Result of detection; objects: (label, colour, box)."""
  return detect.Result('detect', 40, 60, [
      detect.Object(label, .9, box, [detect.Attribute(colour, .8)])
      for label, colour, box in objects])


def test_pictures_show_right_wrong_and_missed():
  image = np.zeros((40, 60, 3), np.uint8)
  cat, dog = ('cat', ['red'], [5, 5, 25, 25]), ('dog', [], [30, 5, 55, 35])
  rgb = lambda h: tuple(int(h[i:i + 2], 16) for i in (1, 3, 5))
  right = pictures.draw(image, [detected(('cat', 'red', [5, 5, 25, 26]))],
                        truth(cat))
  assert rgb(base.RIGHT) in colours(right)
  assert rgb(base.WRONG) not in colours(right)
  for wrong in (('dog', 'red', [5, 5, 25, 25]), ('cat', 'blue', [5, 5, 25, 25]),
                ('cat', 'red', [40, 20, 59, 39])):
    assert rgb(base.WRONG) in colours(
        pictures.draw(image, [detected(wrong)], truth(cat)))
  missed = pictures.draw(image, [detected()], truth(cat, dog))
  assert rgb(base.TRUTH) in colours(missed)
  assert missed.height > pictures.draw(image).height


def test_what_a_text_is_judged_by():
  """Captions by the dataset's check, matches by the record's own texts."""
  written = caption.Result('caption', 40, 60, caption.Caption('a cat', .5))
  matched = match.Result('match', 40, 60, [match.Scored('a cat', .9),
                                           match.Scored('a dog', .9)])
  marks = lambda result, *args: [
      row[0][0] for row in base.load(result.task).draw(
          result, *args).sentences]
  assert marks(written) == ['model:'] and marks(matched) == ['match 0.90:'] * 2
  known = truth(texts=['a cat', 'one cat', 'cats'], check='a cat'.__eq__)
  assert marks(written, known) == ['✓', 'reference:', 'reference:']
  assert marks(matched, known) == ['✓', '✗']
  assert marks(written, truth(check='a dog'.__eq__)) == ['✗']


def test_pictures_of_any_shape():
  for size in ((1, 1), (1, 900), (900, 7), (2000, 3000)):
    picture = pictures.draw(np.zeros((*size, 3), np.uint8), [
        detected(('x' * 40, 'red', [-9, -9, 9999, 9999])),
        caption.Result('caption', *size, caption.Caption('word ' * 60, 1.)),
        match.Result('match', *size, [match.Scored('t', .5)])])
    assert isinstance(picture, Image.Image)
    assert 384 <= picture.width <= 700


# --- The command ------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoint(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  config = config.copy_and_resolve_references()
  config.data.dir = 'not here'
  return small_model.save(folder, config)


def test_evaluate_needs_no_config(checkpoint, tiny_scenes, tmp_path, capsys):
  evaluate.main(['--checkpoint', checkpoint, '--workdir', str(tmp_path),
                 '--data_dir', str(tiny_scenes), '--tasks', 'itm,mlm_unseen',
                 '--limit', '3'])
  found = json.loads((tmp_path / 'eval.json').read_text())
  assert found['step'] == 7
  assert {k.split('/')[1] for k in found if '/' in k} == {'itm', 'mlm_unseen'}
  assert len(list((tmp_path / 'samples').glob('*.png'))) == 3
  assert (tmp_path / 'report.html').exists()
  assert 'eval/itm/accuracy' in capsys.readouterr().out


@pytest.mark.parametrize('options, part', [
    ([], '--data_dir'), (['--tasks', 'detectoin'], "did you mean 'detection'"),
    (['--tasks', 'retrieval'], 'it has captioning, '),
    (['--tasks', ''], "no evaluator or task ''"),
    (['--limit', '0'], 'at least 1')])
def test_evaluate_refuses_in_one_line(checkpoint, tiny_scenes, tmp_path,
                                      options, part, capsys):
  data = ['--data_dir', str(tiny_scenes)] if options else []
  with pytest.raises(SystemExit):
    evaluate.main(['--checkpoint', checkpoint, '--workdir', str(tmp_path),
                   *data, *options])
  message = capsys.readouterr().err
  assert part in message and message.count('\n') == 1


def test_samples_without_a_split_fail_before_training(config, built):
  other = config.copy_and_resolve_references()
  other.evals = {}
  other.samples = dict(count=1, source=dict(name='scenes', split='tset'))
  with pytest.raises(errors.UserError, match='tset'):
    evaluators_lib.Evaluators(other, built[0].model, built[0].vocabularies)


def test_tasks_select_evaluators(config):
  def left(*tasks):
    other = config.copy_and_resolve_references()
    evaluate.select(other, tasks, 5)
    assert {o.max_examples for o in other.evals.values()} == {5}
    return set(other.evals)
  assert left('detect') == {'detection', 'detection_unseen'}
  assert left('detection', 'mlm_unseen') == {'detection', 'mlm_unseen'}
  assert left('caption', 'match') == {'captioning', 'captioning_unseen',
                                      'itm', 'itm_unseen'}
  with pytest.raises(errors.UserError, match='no evaluator or task'):
    left('everything')


@pytest.mark.parametrize('name', evaluators_lib.names())
def test_an_evaluator_says_what_it_gives(name):
  """What it gives beyond that fails every test in which it runs."""
  module = importlib.import_module(f'e2e_vlp_jax.evaluation.{name}')
  given = evaluators_lib.gives(name)
  assert given
  for metric in (*getattr(module, 'HEADLINES', ()),
                 *getattr(module, 'NO_CURVE', ())):
    assert any(fnmatch.fnmatchcase(metric, g) for g in given), metric


def test_a_metric_that_an_evaluator_does_not_name(config, built, monkeypatch):
  config = config.copy_and_resolve_references()
  config.evals, config.samples.count = {'itm': config.evals.itm}, 0
  monkeypatch.setattr(itm, 'evaluate', lambda *a, max_examples, progress: {
      'accuracy': 1., 'recall': 1.})
  evaluators = evaluators_lib.Evaluators(config, built[0].model,
                                         built[0].vocabularies)
  with pytest.raises(UserWarning, match="itm: GIVES lacks 'recall'"):
    evaluators.run({})


@pytest.mark.parametrize('options, says', [
    (dict(top_kk=3), "evals.some.options.top_kk: no such option.*'top_k'"),
    (dict(top_k='many'), "evals.some.options.top_k: found 'many', expected "
                         'int such as 32'),
    (dict(itc_weight=1, protocol='dual', texts=5), None)])
def test_options_of_an_evaluator(config, built, options, says):
  """Their names and types are those of its arguments."""
  changed = config.copy_and_resolve_references()
  changed.evals = dict(some=dict(
      type='retrieval', source=dict(name='scenes', split='test'),
      pp='decode|fit', max_examples=0, examples_during_training=0,
      options=options))
  changed.samples.count = 0
  open_them = lambda: evaluators_lib.Evaluators(
      changed, built[0].model, built[0].vocabularies)
  if says is None:
    open_them()
    return
  with pytest.raises(errors.UserError, match=says):
    open_them()


def test_a_decoder_that_has_learnt_captions_alone(config, built):
  """Its detection heads are missing; a layer must not be."""
  model, sizes = built[0].model, built[0].vocabularies.sizes
  trained = {'image_only': ('captioning',)}
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
  found = jax.eval_shape(
      lambda: model.init(jax.random.key(0), batch, trained))
  check = lambda requests: variables_lib.check(
      model, config, sizes, found, 'W', {}, requests)
  check(trained)
  with pytest.raises(errors.UserError, match='lacks params/decoder/box_head'):
    check(model.views)
  del found['params']['decoder']['layer0']
  with pytest.raises(errors.UserError, match='lacks params/decoder/layer0'):
    check(trained)


def test_evaluate_accepts_a_run_on_captions_alone(config, tiny_scenes, tmp_path,
                                                  capsys):
  changed = config.copy_and_resolve_references()
  changed.objectives = dict(captioning=1.)
  changed.samples.count = 0
  path = small_model.save(tmp_path / 'run', changed,
                          {'image_only': ('captioning',)})
  evaluate.main(['--checkpoint', path, '--workdir', str(tmp_path), '--data_dir',
                 str(tiny_scenes), '--tasks', 'captioning', '--limit', '2'])
  assert 'eval/captioning/CIDEr' in capsys.readouterr().out
