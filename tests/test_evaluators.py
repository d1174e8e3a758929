"""Evaluators: exact sums over the right rows, whatever the batching."""
import jax
import numpy as np
from PIL import Image
import pytest

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import captioning
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import itm
from e2e_vlp_jax.evaluation import mlm
from e2e_vlp_jax.evaluation import pictures
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.training import sharding

SEE = 'decode|fit|boxes|text'
EVALUATORS = {'detection': (detection, SEE), 'captioning': (captioning, SEE),
              'itm': (itm, SEE + '|itm(.5)'), 'mlm': (mlm, SEE + '|mlm(.3)')}


def small_config(data_dir):
  config = config_lib.get_config('tiny')
  config.data.dir = str(data_dir)
  config.model.update(dict(width=32, heads=4, ffn=48, num_queries=5,
                           encoder_layers=1, decoder_layers=1))
  config.data.max_text = config.model.max_text = 10
  config.data.sentences = 1
  config.model.backbone.update(dict(stem=8, width=16, blocks=1))
  return config


def build(config):
  """(predictor, variables) of an untrained small model."""
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  sizes = vocabularies.sizes
  model = models.build(config, **sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), batch, model.views))
  # Compiling `init` would take longer than all the rest.
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda x: rng.normal(0, .2, x.shape).astype(x.dtype), shapes)
  return predictor_lib.Predictor(model, config, vocabularies), variables


@pytest.fixture(scope='module')
def config(tiny_scenes):
  return small_config(tiny_scenes)


@pytest.fixture(scope='module')
def built(config):
  return build(config)


def open_pipeline(config, predictor, pp, batch_size=6):
  return pipeline_lib.Pipeline(
      config.data, vocabularies=predictor.vocabularies,
      sources=[dict(name='scenes', split='test', weight=1.)], pp=pp, seed=0,
      batch_size=batch_size, train=False)


class Oracle(predictor_lib.Predictor):
  """Knows the answers: every evaluator has to give it full marks."""
  pipeline = None

  def detect(self, variables, batch):
    found = []
    for example_id in batch['example_id']:
      objects = [] if example_id < 0 else detection.ground_truth(
          self.pipeline.record(example_id), self.labels)
      n = len(objects)
      attributes = np.zeros((n, len(self.labels.attributes)))
      for row, thing in zip(attributes, objects):
        row[list(thing['attribute_ids'])] = 1
      found.append({
          'boxes': np.array([o['box'] for o in objects]).reshape(n, 4),
          'labels': np.array([o['class_id'] for o in objects], int),
          'scores': np.ones(n), 'attributes': attributes})
    return found

  def caption(self, variables, batch, beams=None):
    return [(self.pipeline.record(i)['texts'][0] if i >= 0 else 'a', 1.)
            for i in batch['example_id']]

  def match(self, variables, batch):
    return batch['itm_labels'].astype(np.float32)

  def mlm(self, variables, batch):
    return np.where(batch['image'].any((1, 2, 3))[:, None, None],
                    batch['mlm_labels'], 0)


def oracle_scores(config, built, name, batch_size, max_examples=None):
  module, pp = EVALUATORS[name]
  oracle = Oracle(built[0].model, config, built[0].vocabularies)
  oracle.pipeline = open_pipeline(config, oracle, pp, batch_size)
  done = []
  scores = module.evaluate(oracle, {}, oracle.pipeline,
                           max_examples=max_examples, progress=done.append)
  return scores, done


@pytest.mark.parametrize('name', EVALUATORS)
def test_the_truth_gets_full_marks_and_padding_none(config, built, name):
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
  for a, b in zip(predictor.detect(variables, batch),
                  other.detect(variables, batch)):
    for key in a:
      np.testing.assert_allclose(a[key], b[key], atol=1e-4, err_msg=key)


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
    found += predictor.detect(variables, batch)
  for other in found[1:]:
    np.testing.assert_allclose(found[0]['boxes'], other['boxes'], atol=.05)
    np.testing.assert_allclose(found[0]['scores'], other['scores'],
                               atol=1e-3)


def test_ap_depends_on_neither_batch_nor_bucket(config, built, monkeypatch):
  """What the model finds in one setting is the truth of all others.

  An untrained model finds nothing that is there, so that its AP would be 0
  in any setting. (On a trained one, by hand: see docs/parity.md.)
  """
  predictor, variables = built
  truth = {}
  pipeline = open_pipeline(config, predictor, SEE)
  for batch, ids in predictor_lib.batches(predictor, pipeline):
    for one, i in zip(predictor.detect(variables, batch), ids):
      truth[int(i)] = [
          {'box': one['boxes'][q], 'class_id': int(one['labels'][q]),
           'area': float(np.prod(one['boxes'][q][2:] - one['boxes'][q][:2])),
           'is_crowd': False, 'attribute_ids': set()}
          for q in np.argsort(-one['scores'])[:2]]
  records_of = {i: pipeline.record(i)['image_id'] for i in truth if i >= 0}
  by_image = {records_of[i]: objects for i, objects in truth.items() if i >= 0}
  monkeypatch.setattr(detection, 'ground_truth',
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
  for setting in ((5, ((96, 96),)), (6, ((96, 144),)), (4, ((132, 96),))):
    other = scores(*setting)
    for name, value in first.items():
      assert abs(other[name] - value) < 1e-3, (setting, name)


@pytest.mark.parametrize('pp', [SEE, 'decode|squash|text'])
@pytest.mark.parametrize('bucket', [(96, 96), (80, 70), (50, 64), (200, 131)])
def test_one_image_is_prepared_as_the_pipeline_prepares_it(config, built,
                                                           bucket, pp):
  config = config.copy_and_resolve_references()
  config.data.buckets = (bucket,)
  config.samples.pp = pp
  predictor = predictor_lib.Predictor(
      built[0].model, config, built[0].vocabularies)
  pipeline = open_pipeline(config, predictor, pp, 2)
  batch = pipeline.batch(0)
  record = pipeline.record(batch['example_id'][1])
  one = predictor.batch_of(photographs.decode_image(record['image']),
                           record['texts'][:1])
  for key in one:
    np.testing.assert_array_equal(one[key][0], batch[key][1], err_msg=key)


@pytest.mark.parametrize('size, bucket, shown', [
    ((333, 500), (96, 128), (85, 128)), ((500, 333), (128, 96), (128, 85)),
    ((600, 599), (112, 112), (112, 112)), ((1, 300), (96, 128), (1, 128))])
def test_images_go_to_the_bucket_of_the_nearest_shape(size, bucket, shown):
  buckets = ((96, 128), (128, 96), (112, 112))
  canvas, mask = predictor_lib.fit(np.full((*size, 3), 9, np.uint8), buckets)
  assert canvas.shape == (*bucket, 3) and mask.shape == bucket
  assert mask.sum() == np.prod(shown) and mask[shown[0] - 1, shown[1] - 1]
  np.testing.assert_array_equal(canvas == 9, np.repeat(mask[..., None], 3, 2))


def test_attributes_of_groups_and_alone(config, built):
  model, tokenizer = built[0].model, built[0].tokenizer
  labels = label_space.LabelSpace(
      ['thing'], ['red', 'blue', 'old', 'wet'], {'colour': ['red', 'blue']})
  predictor = predictor_lib.Predictor(
      model, config, vocabularies_lib.Vocabularies(tokenizer, labels))
  found = predictor.attributes_of(np.array([.1, .3, .05, .55]))
  assert [i for i, _ in found] == [1, 3]
  assert [s for _, s in found] == pytest.approx([.75, .55])


def test_objects_are_sorted_cut_to_the_image_and_thresholded(built):
  predictor, _ = built
  found = {'boxes': np.array([[-5., 2, 30, 99], [1, 1, 5, 5], [0, 0, 9, 9]]),
           'scores': np.array([.6, .9, .2]), 'labels': np.array([0, 1, 2]),
           'attributes': np.full((3, len(predictor.labels.attributes)), .1)}
  objects = predictor.objects_of(found, height=40, width=20)
  assert [o['score'] for o in objects] == [.9, .6]
  assert objects[1]['box'] == [0, 2, 20, 40]
  assert objects[0]['label'] == predictor.labels.classes[1]
  assert len(objects[0]['attributes']) == len(predictor.groups)


def test_sample_sheet(config, built):
  pipeline = open_pipeline(config, built[0], SEE)
  images = pictures.sample_sheet(*built, pipeline, 3)
  assert len(images) == 3
  assert all(i.width >= 384 and i.mode == 'RGB' for i in images)


def colours(picture):
  return {c for _, c in picture.getcolors(1 << 20)}


def test_pictures_show_right_wrong_and_missed():
  image = np.zeros((40, 60, 3), np.uint8)
  truth = [dict(label='cat', box=[5, 5, 25, 25], attributes=['red']),
           dict(label='dog', box=[30, 5, 55, 35], attributes=[])]
  guess = lambda label, colour, box: dict(
      label=label, score=.9, box=box,
      attributes=[dict(label=colour, score=.8)])
  rgb = lambda h: tuple(int(h[i:i + 2], 16) for i in (1, 3, 5))
  right = pictures.draw(image, [guess('cat', 'red', [5, 5, 25, 26])],
                        truth[:1])
  assert rgb(pictures.RIGHT) in colours(right)
  assert rgb(pictures.WRONG) not in colours(right)
  for wrong in (guess('dog', 'red', [5, 5, 25, 25]),
                guess('cat', 'blue', [5, 5, 25, 25]),
                guess('cat', 'red', [40, 20, 59, 39])):
    assert rgb(pictures.WRONG) in colours(
        pictures.draw(image, [wrong], truth[:1]))
  missed = pictures.draw(image, [], truth)
  assert rgb(pictures.MISSED) in colours(missed)
  assert missed.height > pictures.draw(image, None, None).height


def test_pictures_of_any_shape():
  for size in ((1, 1), (1, 900), (900, 7), (2000, 3000)):
    picture = pictures.draw(
        np.zeros((*size, 3), np.uint8),
        [dict(label='x' * 40, score=1., box=[-9, -9, 9999, 9999],
              attributes=[])],
        caption='word ' * 60, references=[''],
        matches=[dict(text='t', score=.5)])
    assert isinstance(picture, Image.Image)
    assert 384 <= picture.width <= 700
