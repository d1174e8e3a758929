"""Boxes, classes and attributes: COCO's AP, and attributes of found boxes."""
import contextlib
import io

import numpy as np
from pycocotools import coco as coco_lib
from pycocotools import cocoeval
import scipy.optimize

from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import predictor as predictor_lib

METRICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100',
           'ARs', 'ARm', 'ARl')


def coco_metrics(ground_truth, detections):
  """The twelve numbers of pycocotools for boxes.

  Args:
    ground_truth: dict as an official instances JSON: images (id),
      annotations (id, image_id, category_id, bbox x, y, w, h in pixels, area,
      iscrowd), categories (id).
    detections: list of {image_id, category_id, bbox, score}.

  Returns:
    {name: value} for METRICS; -1 (as pycocotools prints) where there is no
    ground truth of that size.
  """
  with contextlib.redirect_stdout(io.StringIO()):  # It prints tables.
    truth = coco_lib.COCO()
    truth.dataset = {'info': {}, **ground_truth}
    truth.createIndex()
    found = coco_lib.COCO()
    # `loadRes` fails on an empty list; a model may well find nothing.
    if detections:
      found = truth.loadRes([dict(d) for d in detections])
    else:
      found.dataset = {**truth.dataset, 'annotations': []}
      found.createIndex()
    run = cocoeval.COCOeval(truth, found, 'bbox')
    run.evaluate()
    run.accumulate()
    run.summarize()
  return dict(zip(METRICS, map(float, run.stats)))


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """AP over all classes, and accuracy of attributes on matched boxes.

  The ground truth is the record's, in pixels of the upright original: crowds
  count as in pycocotools, and what a batch has no room for counts too.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    those of METRICS that are defined, 'matched': the share of objects with a
    box of IoU 0.5 or more and, where objects have attributes,
    'attribute_accuracy/<group>' and their mean 'attribute_accuracy'.
  """
  labels = predictor.labels
  images, annotations, detections = [], [], []
  attributes = _AttributeAccuracy(predictor)
  for batch, ids in predictor_lib.batches(predictor, pipeline, max_examples,
                                          progress):
    usable = predictor.gather(batch, 'task_mask/detection')
    found = predictor.detect(variables, batch)
    for one, example_id in zip(found, np.where(usable, ids, -1)):
      if example_id < 0:
        continue
      record = pipeline.record(example_id)
      objects = ground_truth(record, labels)
      images.append({'id': int(example_id)})
      for thing in objects:
        x0, y0, x1, y1 = thing['box']
        annotations.append({
            'id': len(annotations) + 1, 'image_id': int(example_id),
            'category_id': thing['class_id'],
            'bbox': [x0, y0, x1 - x0, y1 - y0], 'area': thing['area'],
            'iscrowd': int(thing['is_crowd'])})
      corner, size = one['boxes'][:, :2], one['boxes'][:, 2:]
      for box, label, score in zip(
          np.concatenate([corner, size - corner], -1).tolist(),
          one['labels'].tolist(), one['scores'].tolist()):
        detections.append({'image_id': int(example_id), 'bbox': box,
                           'category_id': label, 'score': score})
      attributes.add(one, [o for o in objects if not o['is_crowd']])
  if not images:
    return {}
  scores = coco_metrics(
      {'images': images, 'annotations': annotations,
       'categories': [{'id': i} for i in range(len(labels.classes))]},
      detections)
  return {**{k: v for k, v in scores.items() if v >= 0},
          **attributes.result()}


def ground_truth(record, labels):
  """The objects of a record in pixels: what a perfect model would find.

  Objects whose class the label space lacks are left out, as in the input
  pipeline (which reports them).

  Returns:
    list of dicts: label, class_id, box (x0, y0, x1, y1), attributes (names),
    attribute_ids, area (pixels), is_crowd.
  """
  objects = []
  for thing in record['objects']:
    y0, x0, y1, x1 = map(float, thing['bbox'])
    class_id = _id(labels.class_id, thing['label'])
    if class_id is None or not (y1 > y0 and x1 > x0):
      continue
    h, w = record['height'], record['width']
    ids = [_id(labels.attribute_id, a) for a in thing['attributes']]
    objects.append({
        'label': labels.classes[class_id], 'class_id': class_id,
        'box': [x0 * w, y0 * h, x1 * w, y1 * h],
        'attributes': [labels.attributes[i] for i in ids if i is not None],
        'attribute_ids': {i for i in ids if i is not None},
        'area': float(thing['area']), 'is_crowd': bool(thing['is_crowd'])})
  return objects


def _id(look_up, name):
  try:
    return look_up(name)
  except errors.UserError:
    return None


def iou(a, b):
  """IoU of boxes [N, 4] and [M, 4] (x0, y0, x1, y1): [N, M]."""
  a, b = (np.asarray(x, float).reshape(-1, 4) for x in (a, b))
  corner = np.maximum(a[:, None, :2], b[None, :, :2])
  overlap = np.clip(np.minimum(a[:, None, 2:], b[None, :, 2:]) - corner, 0,
                    None).prod(-1)
  area = lambda x: (x[:, 2:] - x[:, :2]).prod(-1)
  union = area(a)[:, None] + area(b)[None] - overlap
  return overlap / np.maximum(union, 1e-9)


def match_boxes(boxes, scores, truth):
  """Which prediction stands for which object, one to one.

  Maximises the sum of IoU x score (Hungarian) over pairs of IoU >= 0.5: of
  two boxes on one object, the one that the model believes in.

  Args:
    boxes: [Q, 4] predictions.
    scores: [Q].
    truth: [M, 4].

  Returns:
    list of (prediction, object).
  """
  overlap = iou(boxes, truth)
  overlap[overlap < .5] = 0
  rows, columns = scipy.optimize.linear_sum_assignment(
      overlap * np.asarray(scores, float)[:, None], maximize=True)
  return [(int(q), int(m)) for q, m in zip(rows, columns)
          if overlap[q, m] > 0]


class _AttributeAccuracy:
  """Counts matched objects whose likeliest attribute of a group is true."""

  def __init__(self, predictor):
    self._groups = dict(predictor.groups)
    if predictor.ungrouped:
      self._groups['other'] = predictor.ungrouped
    self._counts = {g: [0, 0] for g in self._groups}
    self._matched = self._objects = 0

  def add(self, found, objects):
    """`found`: an item of Predictor.detect; `objects`: of ground_truth."""
    self._objects += len(objects)
    pairs = match_boxes(found['boxes'], found['scores'],
                        [o['box'] for o in objects])
    self._matched += len(pairs)
    for q, m in pairs:
      true = objects[m]['attribute_ids']
      for group, ids in self._groups.items():
        # An object may not say anything of this group.
        if true & set(ids):
          best = ids[int(found['attributes'][q][ids].argmax())]
          self._counts[group][0] += best in true
          self._counts[group][1] += 1

  def result(self):
    share = {g: right / n for g, (right, n) in self._counts.items() if n}
    out = {'matched': self._matched / max(self._objects, 1)}
    if share:
      out['attribute_accuracy'] = sum(share.values()) / len(share)
      if set(share) != {'other'}:
        out.update({f'attribute_accuracy/{g}': v for g, v in share.items()})
    return out
