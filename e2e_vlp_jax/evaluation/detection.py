"""Boxes, classes and attributes: COCO's AP, and attributes of found boxes.

What its numbers do not tell is in `detection_page.py`.
"""
import contextlib
import io

import numpy as np
from pycocotools import coco as coco_lib
from pycocotools import cocoeval

from e2e_vlp_jax.evaluation import detection_page
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.tasks import detect

METRICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100',
           'ARs', 'ARm', 'ARl')
HEADLINES = {'AP50': 'AP50', 'AP75': 'AP75',
             'attribute_accuracy': 'attributes'}
NO_CURVE = METRICS[3:]
GIVES = (*METRICS, 'matched', 'attribute_accuracy', 'attribute_accuracy/*')


def coco_metrics(ground_truth, detections):
  """{name: value} for METRICS, see `coco_run`; -1 (as in pycocotools) if there
  is no ground truth of that size."""
  return named(coco_run(ground_truth, detections))


def named(run):
  """{name: value} for METRICS of a `coco_run`."""
  return dict(zip(METRICS, map(float, run.stats)))


def coco_run(ground_truth, detections):
  """The judgement of pycocotools on boxes, with its twelve numbers.

  Args:
    ground_truth: dict in the form of an official instances JSON: images (id),
      annotations (id, image_id, category_id, bbox x, y, w, h in pixels, area,
      iscrowd), categories (id).
    detections: list of {image_id, category_id, bbox, score}.

  Returns:
    a COCOeval, accumulated and summarised.
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
  return run


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, details=None):
  """AP over all classes, and accuracy of attributes on matched boxes.

  The ground truth is the record's, in pixels of the upright original. Crowds
  are treated as in pycocotools, and boxes beyond the batch's M count, too.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline.
    max_examples: None = all.
    progress: called with the number of examples done.
    details: a list, to which the sections of the page are appended.

  Returns:
    those of METRICS that are defined, 'matched': the share of objects with a
    box of IoU 0.5 or more and, where objects have attributes,
    'attribute_accuracy/<group>' and their mean 'attribute_accuracy'.
  """
  task, labels = predictor.task('detect'), predictor.labels
  kept, attributes = [], _AttributeAccuracy(labels)
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    usable = predictor.gather(batch, 'task_mask/detection')
    found = predictor.run(variables, batch, task)
    for row, example_id in enumerate(np.where(usable, ids, -1).tolist()):
      if example_id < 0:
        continue
      one = {k: v[row] for k, v in found.items()}
      objects = detect.ground_truth(pipeline.record(example_id), labels)
      attributes.add(one, [o for o in objects if not o['is_crowd']])
      kept.append(detection_page.Found(example_id, objects, *(
          one[k] for k in ('boxes', 'labels', 'scores'))))
  if not kept:
    return {}
  run = coco_run(*coco_files(kept, len(labels.classes)))
  if details is not None:
    details += detection_page.sections(kept, run, labels, pipeline)
  return {**{k: v for k, v in named(run).items() if v >= 0},
          **attributes.result()}


def coco_files(found, classes):
  """Truth and detections in the form of COCO's files, for `coco_run`.

  Args:
    found: list of `detection_page.Found`.
    classes: number of classes.
  """
  annotations = [
      {'image_id': one.example_id, 'category_id': o['class_id'],
       'bbox': corner_and_size(o['box']), 'area': o['area'],
       'iscrowd': int(o['is_crowd'])} for one in found for o in one.objects]
  return {
      'images': [{'id': one.example_id} for one in found],
      'annotations': [{'id': k + 1, **a} for k, a in enumerate(annotations)],
      'categories': [{'id': i} for i in range(classes)]}, [
          {'image_id': one.example_id, 'category_id': label, 'bbox': box,
           'score': score} for one in found for box, label, score in zip(
               corner_and_size(one.boxes), one.labels.tolist(),
               one.scores.tolist())]


def corner_and_size(boxes):
  """[..., 4] x0, y0, x1, y1 -> nested lists of x, y, w, h."""
  boxes = np.asarray(boxes)
  return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]],
                        -1).tolist()


class _AttributeAccuracy:
  """Counts matched objects whose likeliest attribute of a group is true."""

  def __init__(self, labels):
    self._groups, alone = detect.attribute_groups(labels)
    if alone:
      self._groups['other'] = alone
    self._counts = {g: [0, 0] for g in self._groups}
    self._matched = self._objects = 0

  def add(self, found, objects):
    """Counts one image.

    Args:
      found: this image's arrays of the task 'detect'.
      objects: from `detect.ground_truth`.
    """
    self._objects += len(objects)
    pairs = detect.match_boxes(found['boxes'], found['scores'],
                               [o['box'] for o in objects])
    self._matched += len(pairs)
    for q, m in pairs:
      true = objects[m]['attribute_ids']
      for group, ids in self._groups.items():
        # An object need not have an attribute of every group.
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
