"""LVIS: the fixed AP of a grounding model that is asked for 1203 names.

An image counts for a class only if its labels name or deny the class, and
detections of a class that is not listed completely are not held against the
model if they match nothing (Gupta et al., CVPR 2019). "Fixed" (Dave et al.,
2021): of each class the 10,000 best detections of the whole set count, and
there is no limit per image, which would make classes compete.
"""
import collections

import numpy as np

from e2e_vlp_jax.data import records
from e2e_vlp_jax.evaluation import class_prompts
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.tasks import detect

HEADLINES = {'AP': 'LVIS AP', 'APr': 'rare', 'APc': 'common', 'APf': 'frequent'}
GIVES = (*HEADLINES, 'AP50', 'AP75')
_THRESHOLDS = np.linspace(.5, .95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST = 10_000  # detections of a class


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, most_names=40, most=300):
  """Fixed AP, and that of rare, common and frequent classes.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline on `lvis`.
    max_examples: None = all.
    progress: called with the number of examples done.
    most_names: names of a caption (GLIP and FIBER: 40, in 31 passes).
    most: boxes of a caption that are kept.

  Returns:
    {'AP', 'AP50', 'AP75', 'APr', 'APc', 'APf'}, those that are defined.

  Raises:
    UserError: the dataset is not LVIS.
  """
  classes = pipeline.labels.classes
  name = predictor.config.evals.lvis.source.name if (
      'lvis' in predictor.config.get('evals', {})) else 'lvis'
  federated = records.side_file(predictor.config.data.dir, name,
                                records.FEDERATED)
  kept = class_prompts.collect(predictor, variables, pipeline, list(classes),
                               most, most_names, max_examples, progress)
  truth, found = detection.coco_files(kept, len(classes))
  ids = {name: k for k, name in enumerate(classes)}
  labelled = {}
  for one in kept:
    image_id = pipeline.record(one.example_id)['image_id']
    known = federated['images'].get(image_id, {})
    labelled[one.example_id] = tuple(
        {ids[n] for n in known.get(key, ()) if n in ids}
        for key in ('absent', 'incomplete'))
  frequency = federated['frequency']
  return summary(average_precisions(truth['annotations'], found, labelled),
                 {k: frequency.get(name) for k, name in enumerate(classes)})


def summary(by_class, frequency):
  """The metrics: means over classes.

  Args:
    by_class: from `average_precisions`.
    frequency: {class: 'r' (rare), 'c' or 'f', or None if it is not known}.
  """
  groups = collections.defaultdict(list)
  for k, values in by_class.items():
    groups['AP'].append(values.mean())
    groups['AP50'].append(values[0])
    groups['AP75'].append(values[5])
    if frequency.get(k):
      groups[f'AP{frequency[k]}'].append(values.mean())
  return {k: float(np.mean(v)) for k, v in groups.items()}


def average_precisions(annotations, found, labelled):
  """AP of each class at ten thresholds of IoU.

  Args:
    annotations: dicts with image_id, category_id, bbox (x, y, w, h).
    found: likewise, and score.
    labelled: {image id: (classes that its labels deny, classes that they do
      not list completely)}.

  Returns:
    {class: float [10]} of the classes with an annotation.
  """
  true, mine = (_by_class(some) for some in (annotations, found))
  return {k: _average_precision(
      true[k], _best(mine.get(k, {})),
      lambda image, k=k: k in labelled.get(image, ((), ()))[0],
      lambda image, k=k: k in labelled.get(image, ((), ()))[1])
          for k in sorted(true)}


def _by_class(some):
  out = {}
  for a in some:
    out.setdefault(a['category_id'], {}).setdefault(
        a['image_id'], []).append(a)
  return out


def _best(by_image):
  """The `_MOST` detections of a class with the best scores."""
  every = sorted((d for some in by_image.values() for d in some),
                 key=lambda d: -d['score'])[:_MOST]
  out = {}
  for d in every:
    out.setdefault(d['image_id'], []).append(d)
  return out


def _average_precision(true, found, denied, incomplete):
  """AP of a class [10]; `true` and `found` are {image: [dict]}, best first."""
  scores, right, ignored = [], [], []
  for image, some in sorted(found.items()):  # Decides between equal scores.
    if image not in true and not denied(image):
      continue
    hits = _matches(some, true.get(image, []))
    scores += [d['score'] for d in some]
    right.append(hits)
    ignored.append(~hits & incomplete(image))
  total = sum(map(len, true.values()))
  if not scores:
    return np.zeros(len(_THRESHOLDS))
  order = np.argsort(-np.asarray(scores), kind='stable')
  right, ignored = (np.concatenate(x, 1)[:, order] for x in (right, ignored))
  return np.array([_area(r[~i], total) for r, i in zip(right, ignored)])


def _matches(found, true):
  """Which detections of an image match: bool [10, n]; each box once."""
  hits = np.zeros((len(_THRESHOLDS), len(found)), bool)
  if not true:
    return hits
  overlap = detect.iou(*([_corners(d['bbox']) for d in some]
                         for some in (found, true)))
  for row, least in zip(hits, _THRESHOLDS):
    free = np.ones(len(true), bool)
    for k in range(len(found)):
      best = np.where(free, overlap[k], -1).argmax()
      if free[best] and overlap[k, best] >= min(least, 1 - 1e-10):
        row[k], free[best] = True, False
  return hits


def _corners(xywh):
  x, y, w, h = xywh
  return x, y, x + w, y + h


def _area(right, total):
  """Area under precision-recall at 101 recalls, as in COCO's tool."""
  hits = np.cumsum(right)
  precision = hits / np.arange(1, len(hits) + 1)
  precision = np.maximum.accumulate(precision[::-1])[::-1]
  at = np.searchsorted(hits / total, _RECALLS, 'left')
  return np.where(at < len(hits), np.append(precision, 0)[
      np.minimum(at, len(hits))], 0).mean()
