"""The page that shows where a detector fails."""
import json
import re

import numpy as np
import pytest

from e2e_vlp_jax import prepare
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data.datasets import base as datasets_base
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import detection_page
from e2e_vlp_jax.evaluation import details
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.evaluation import label_pictures
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import detect
from tests import own_classes

# Three boxes far apart.
HERE, THERE, AWAY = [0, 0, 10, 10], [50, 50, 70, 70], [20, 80, 30, 95]


def objects(*pairs, crowd=False):
  return [dict(class_id=c, box=b, is_crowd=crowd, area=100.) for c, b in pairs]


def found(truth, *boxes):
  """A `Found`; boxes are (class, box, score)."""
  labels, where, scores = zip(*boxes) if boxes else ((), np.zeros((0, 4)), ())
  return detection_page.Found(0, truth, np.array(where, float),
                              np.array(labels, int), np.array(scores, float))


IMAGES = [
    # One right, one of another class, one where nothing is, one too unsure.
    found(objects((0, HERE), (1, THERE)), (0, HERE, .9), (0, THERE, .8),
          (2, AWAY, .7), (1, [49, 50, 70, 70], .1)),
    # A second box on an object; an object that nobody found.
    found(objects((0, HERE), (2, AWAY)), (0, HERE, .6), (0, HERE, .55)),
    # A crowd: its boxes are no mistakes.
    found(objects((1, [0, 0, 60, 60]), crowd=True) + objects((1, AWAY)),
          (1, [5, 5, 20, 30], .9), (1, AWAY, .5)),
    found(objects())]


def test_what_becomes_of_every_box():
  judged = [sorted(map(str, detection_page.judge(f, .5))) for f in IMAGES]
  assert judged == [['(0, 0)', '(1, 0)', '(None, 2)'],
                    ['(0, 0)', '(2, None)', '(None, 0)'], ['(1, 1)'], []]
  # rows: true 0, 1, 2, nothing there; columns: found 0, 1, 2, missed.
  table = detection_page.confusion(
      [detection_page.judge(f, .5) for f in IMAGES], 3)
  assert table.tolist() == [[2, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1],
                            [1, 0, 1, 0]]
  precision, recall = detection_page.precision_recall(
      [detection_page.judge(f, .5) for f in IMAGES])
  assert (precision, recall) == (3 / 6, 3 / 5)


def test_the_best_threshold():
  """Above .55 the doubled box is gone and nothing else is lost."""
  at = {t: [detection_page.judge(f, t) for f in IMAGES[:2]]
        for t in (.05, .5, .56, .65, .95)}
  assert detection_page.best_threshold(at) == .56
  # Nothing is right: that of `predict`.
  assert detection_page.best_threshold({.5: [], .3: []}) == .5


# --- On photographs -----------------------------------------------------------
@pytest.fixture(scope='module')
def five(shared, tmp_path_factory):
  """A data folder with `five` from JSON and `yolo` from a YOLO folder."""
  path = tmp_path_factory.mktemp('five')
  for name, write in (('five', own_classes.as_coco),
                      ('yolo', own_classes.as_yolo)):
    (path / name).mkdir()
    write(shared, path / name)
    prepare.main(['own', '--name', name, '--source', str(path / name),
                  '--data_dir', str(path / 'd'), '--validation_share', '.3'])
  return path / 'd'


def read(data_dir, name, split):
  opened = records.open_split(str(data_dir), name, split)
  return [opened.get(i) for i in range(len(opened))]


def test_the_same_records_from_json_and_from_yolo(five):
  """Ids with gaps, and none at all: equal images, names and boxes."""
  key = lambda record: record['image']
  for name in ('five', 'yolo'):
    space = records.label_space(str(five), name)
    assert space.classes == list(own_classes.CATEGORIES)
  both = [sorted((r for split in ('train', 'validation')
                  for r in read(five, name, split)), key=key)
          for name in ('five', 'yolo')]
  assert len(both[0]) == len(both[1]) > 20
  for a, b in zip(*both):
    assert a['image'] == b['image']
    assert [o['label'] for o in a['objects']] == [
        o['label'] for o in b['objects']]
    np.testing.assert_allclose(np.array([o['bbox'] for o in a['objects']]),
                               np.array([o['bbox'] for o in b['objects']]),
                               atol=1e-6)


class Pictures:
  """What the page reads of a pipeline."""

  def __init__(self, data_dir, name, split):
    self._split = records.open_split(str(data_dir), name, split)
    self._name = f'{name}/{split}'

  def record(self, i):
    return self._split.get(i)

  def name(self, i):
    return f'{self._name} record {i}'

  def __len__(self):
    return len(self._split)


def guesses(pipeline, labels, seed=0):
  """A detector that is right most of the time: [Found]."""
  rng, out = np.random.default_rng(seed), []
  for i in range(len(pipeline)):
    record = pipeline.record(i)
    truth = detect.ground_truth(record, labels)
    boxes = []
    for o in truth:
      if rng.random() < .25:
        continue  # Missed.
      label = o['class_id']
      if rng.random() < .15:
        label = int(rng.integers(len(labels.classes)))
      size = np.array(o['box'])[[2, 3, 2, 3]] - np.array(o['box'])[[0, 1, 0, 1]]
      boxes.append((label, np.array(o['box']) + rng.normal(0, .04, 4) * size,
                    rng.uniform(.3, 1)))
    for _ in range(rng.integers(3)):
      x, y = rng.uniform(0, .7, 2) * (record['width'], record['height'])
      boxes.append((int(rng.integers(len(labels.classes))),
                    [x, y, x + 60, y + 60], rng.uniform(0, .6)))
    one = found(truth, *boxes)
    out.append(detection_page.Found(i, truth, one.boxes, one.labels,
                                    one.scores))
  return out


def judged_by_coco(images, count):
  """The COCOeval of a list of `Found`."""
  box = lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]
  annotations = [dict(image_id=f.example_id, category_id=o['class_id'],
                      bbox=box(o['box']), area=o['area'],
                      iscrowd=int(o['is_crowd']))
                 for f in images for o in f.objects]
  return detection.coco_run(
      {'images': [{'id': f.example_id} for f in images],
       'categories': [{'id': k} for k in range(count)],
       'annotations': [{**a, 'id': k + 1} for k, a in enumerate(annotations)]},
      [dict(image_id=f.example_id, category_id=int(c), bbox=box(b),
            score=float(s)) for f in images
       for c, b, s in zip(f.labels, f.boxes, f.scores)])


@pytest.fixture(scope='module')
def page(five):
  """(sections, images, run) of a made-up detector on the photographs."""
  pipeline = Pictures(five, 'five', 'train')
  labels = records.label_space(str(five), 'five')
  images = guesses(pipeline, labels)
  run = judged_by_coco(images, len(labels.classes))
  return detection_page.sections(images, run, labels, pipeline), images, run


def test_the_sections(page):
  (classes, curves, confusion, worst), images, run = page
  # The mean of the classes is the metric itself, and so is that of AP50.
  table = {row[0]: row[1:] for row in classes.rows}
  assert table.keys() <= set(own_classes.CATEGORIES)
  for column, value in ((2, run.stats[0]), (3, run.stats[1])):
    assert np.mean([float(r[column]) for r in table.values()]) == (
        pytest.approx(value, abs=1e-3))
  assert [float(r[3]) for r in classes.rows] == sorted(
      float(r[3]) for r in classes.rows)
  assert sum(int(r[0]) for r in table.values()) == sum(
      len(f.objects) for f in images)
  assert len(curves.charts) == 2 and 'predict --threshold' in curves.note
  assert 'recall' in curves.charts[0][1] and 'chair' in curves.charts[0][1]
  (_, svg), = confusion.charts
  assert 'missed' in svg and 'nothing there' in svg
  # The worst come first.
  number = lambda title: sum(map(int, re.findall(r'(\d+) (?:missed|nothing|of)',
                                                 title)))
  mistakes = [number(title) for title, _ in worst.pictures]
  assert len(mistakes) == 12 and mistakes == sorted(mistakes, reverse=True)
  assert mistakes[-1] > 0


def test_the_pictures_show_the_mistakes(page):
  """Green, red and dashed white lie on the worst image."""
  (*_, worst), _, _ = page
  pixels = np.asarray(worst.pictures[0][1].convert('RGB')).astype(int)
  for colour in (base.WRONG, base.TRUTH):
    rgb = [int(colour[k:k + 2], 16) for k in (1, 3, 5)]
    assert (np.abs(pixels - rgb).max(-1) < 12).sum() > 50, colour


def test_the_report_has_the_page(page, tmp_path):
  sections, *_ = page
  evaluators.write(str(tmp_path), 7, {'eval/detection/AP': .5}, {},
                   {'detection': sections})
  evaluators.write(str(tmp_path), 9, {'eval/detection/AP': .5}, {},
                   {'detection': sections[:3]})
  text = (tmp_path / 'report.html').read_text()
  assert 'detection: Average precision of each class' in text
  assert 'What is taken for what' in text and 'Step 9.' in text
  assert 'The worst images' not in text  # Of step 7, and replaced.
  assert not list((tmp_path / 'details').glob('*.png'))
  evaluators.write(str(tmp_path), 11, {}, {}, {'detection': sections})
  text = (tmp_path / 'report.html').read_text()
  assert text.count('<figcaption') == 12
  # All is embedded, and equal pages have equal bytes.
  assert not re.search(r'(src|href)\s*=\s*["\'](?!data:)', text)
  before = (tmp_path / 'details' / 'detection.json').read_bytes()
  details.write(str(tmp_path), 11, {'detection': sections})
  assert (tmp_path / 'details' / 'detection.json').read_bytes() == before
  # A file that is cut off, as of a run that was killed, is left out.
  (tmp_path / 'details' / 'detection.json').write_bytes(before[:100])
  assert details.read(str(tmp_path)) == []


def test_many_classes_and_none():
  """Only those with the most to say are shown; nothing at all is no error."""
  class Labels:
    classes = [f'c{k}' for k in range(60)]
  rng = np.random.default_rng(0)
  images = [detection_page.Found(
      i, objects(*[(int(c), [12 * k, 0, 12 * k + 10, 10])
                   for k, c in enumerate(rng.integers(0, 60, 20))]),
      np.array([[12 * k, 0, 12 * k + 10, 10] for k in range(20)], float),
      rng.integers(0, 60, 20), rng.random(20)) for i in range(20)]

  class Blank:
    def record(self, i):
      del i
      import io
      from PIL import Image
      out = io.BytesIO()
      Image.new('RGB', (240, 20)).save(out, 'PNG')
      return datasets_base.record(image=out.getvalue(), image_id='a',
                                  height=20, width=240)

    def name(self, i):
      return str(i)
  classes, _, confusion, _ = detection_page.sections(
      images, judged_by_coco(images, 60), Labels, Blank())
  assert len(classes.rows) == 40 and '40 lowest of' in classes.note
  assert '20 classes with the most mistakes' in confusion.note
  nothing = [detection_page.Found(0, [], np.zeros((0, 4)), np.zeros(0, int),
                                  np.zeros(0))]
  classes, curves, confusion, worst = detection_page.sections(
      nothing, judged_by_coco(nothing, 60), Labels, Blank())
  assert not classes.rows and not worst.pictures
  assert 'No mistake' in worst.note


# --- Labels before the first step ---------------------------------------------
@pytest.mark.parametrize('words', [False, True])
def test_boxes_of_a_batch_are_drawn_where_they_are(tmp_path, words):
  """On the image without its padding; a wrong format lies elsewhere."""
  class Labels:
    classes, attributes = ['cup', 'kite'], ['red']

  class Words:
    asked = []

    @classmethod
    def decode(cls, ids):
      cls.asked.append(ids.tolist())
      return 'red kite'
  image = np.full((1, 60, 90, 3), 128, np.uint8)
  image[0, 10:30, 20:60] = (220, 30, 30)  # x0 20, y0 10, x1 60, y1 30
  mask = np.zeros((1, 60, 90), bool)
  mask[0, :40, :80] = True
  batch = dict(image=image, image_mask=mask, valid=np.array([True]),
               boxes=np.array([[[40 / 80, 20 / 40, 40 / 80, 20 / 40]]]),
               box_mask=np.array([[True]]), box_labels=np.array([[1]]),
               box_attributes=np.array([[[0, -1]]]))
  if words:  # Names are words of a caption.
    del batch['box_labels'], batch['box_attributes']
    batch.update(text=np.array([[[7, 8, 9]]]),
                 span_mask=np.array([[[False, True, True]]]))
  assert label_pictures.write(str(tmp_path), batch, Labels, Words, 4) == 1
  assert Words.asked == ([[8, 9]] if words else [])
  picture = label_pictures.picture(batch, 0, Labels, Words)
  assert picture.size == (480, 240)  # 6 pixels a pixel, without the padding
  pixels = np.asarray(picture).astype(int)
  colour = base.COLOURS[0 if words else 1]
  rgb = [int(colour[k:k + 2], 16) for k in (1, 3, 5)]
  at = np.argwhere(np.abs(pixels - rgb).max(-1) < 12)
  at = at[at[:, 0] > 58]  # Below the tag.
  np.testing.assert_allclose(at.max(0), [30 * 6, 60 * 6], atol=4)
  np.testing.assert_allclose(at[:, 1].min(), 20 * 6, atol=4)
  del batch['boxes']
  assert label_pictures.write(str(tmp_path), batch, Labels, Words, 4) == 0


def test_report_keys_of_prepare(five):
  """Boxes of each class, counted once for all runs."""
  path = f'{records.dataset_folder(str(five), "five")}/{records.REPORT}'
  with open(path, encoding='utf-8') as f:
    splits = json.load(f)['splits']
  for split, report in splits.items():
    want = {}
    for record in read(five, 'five', split):
      for o in record['objects']:
        want[o['label']] = want.get(o['label'], 0) + 1
    assert report['classes'] == want
