"""COCO's twelve numbers, and the matching behind attribute accuracy."""
import gzip
import json
import pathlib

import numpy as np
import pytest

from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.tasks import detect

DATA = pathlib.Path(__file__).parent / 'data' / 'coco_detection.json.gz'


def test_twelve_numbers_of_a_published_result(record_property, capsys):
  with gzip.open(DATA, 'rt') as f:
    data = json.load(f)
  found = detection.coco_metrics(data['ground_truth'], data['detections'])
  assert list(found) == list(detection.METRICS)
  record_property('parity', (
      'Detection, 100 images: 12 bbox numbers', 'COCO\'s published result',
      max(abs(found[k] - v) for k, v in data['expected'].items()), 1e-11))
  for name, value in data['expected'].items():
    assert found[name] == pytest.approx(value, abs=1e-11), name
  assert not capsys.readouterr().out  # pycocotools prints; we do not


def test_twelve_numbers_of_the_shared_goldens(shared):
  folder = shared / 'data' / 'goldens' / 'coco_detection'
  read = lambda name: json.loads((folder / name).read_text())
  expected = read('expected_full_precision.json')
  found = detection.coco_metrics(
      read('instances_val2014_100.json'),
      read('instances_val2014_fakebbox100_results.json'))
  assert [found[n] for n in expected['order']] == pytest.approx(
      expected['bbox'], abs=1e-11)


def _truth(boxes):
  return {'images': [{'id': 0}], 'categories': [{'id': 0}],
          'annotations': [
              {'id': k + 1, 'image_id': 0, 'category_id': 0, 'bbox': b,
               'area': b[2] * b[3], 'iscrowd': 0}
              for k, b in enumerate(boxes)]}


def test_no_detections_and_no_objects():
  truth = _truth([[0, 0, 50, 50]])
  assert detection.coco_metrics(truth, [])['AP'] == 0
  nothing = detection.coco_metrics(_truth([]), [
      dict(image_id=0, category_id=0, bbox=[0, 0, 9, 9], score=.5)])
  assert nothing['AP'] == -1


def test_iou():
  a = [[0, 0, 10, 10], [0, 0, 0, 0]]
  b = [[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]]
  np.testing.assert_allclose(detect.iou(a, b),
                             [[1, 1 / 3, 0], [0, 0, 0]])
  assert detect.iou(a, []).shape == (2, 0)


def test_matching_prefers_the_box_the_model_believes_in():
  truth = [[0, 0, 10, 10], [20, 0, 30, 10]]
  boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 8], [90, 90, 99, 99]]
  scores = [.1, .9, .8, .99]
  pairs = detect.match_boxes(boxes, scores, truth)
  assert sorted(pairs) == [(1, 0), (2, 1)]
  assert detect.match_boxes(boxes, scores, []) == []
  # Less than half covered is no match.
  assert detect.match_boxes([[0, 0, 10, 4]], [1.], truth) == []
