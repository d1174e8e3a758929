"""Where a detector fails: the sections of the evaluator `detection`.

AP of each class, precision over recall, what is taken for what, and the images
with the most mistakes. A found box is right if it has the class and half of the
overlap (IoU 0.5) of an object that no other found box has.
"""
import dataclasses

import numpy as np

from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.evaluation import details
from e2e_vlp_jax.evaluation import pictures
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import detect

MISSED, NOTHING = 'missed', 'nothing there'
_WORST = 12
_CLASSES = 40  # rows of the table
_CELLS = 20    # classes of the matrix
_LINES = 7     # classes with their own curve
_THRESHOLDS = tuple(k / 20 for k in range(1, 20))
_USUAL = detect.Task.options['threshold'].default
_COLOURS = ('#2563eb', '#e8590c', '#2f9e44', '#9c36b5', '#c2255c', '#0c8599',
            '#868e96')


@dataclasses.dataclass(frozen=True)
class Found:
  """The detections of one image, beside its truth.

  Attributes:
    example_id: of the pipeline.
    objects: from `detect.ground_truth`, with crowds.
    boxes: [Q, 4] x0, y0, x1, y1 in pixels.
    labels: [Q] class ids.
    scores: [Q].
  """
  example_id: int
  objects: list
  boxes: np.ndarray
  labels: np.ndarray
  scores: np.ndarray


def sections(found, run, labels, pipeline):
  """The `details.Section`s of an evaluation.

  Args:
    found: list of `Found`.
    run: the pycocotools COCOeval that has judged them.
    labels: a `label_space.LabelSpace`.
    pipeline: the evaluation Pipeline, for the pictures.
  """
  names = labels.classes
  judged_at = {t: [judge(f, t) for f in found] for t in _THRESHOLDS}
  threshold = best_threshold(judged_at)
  judged = judged_at[threshold]
  return [
      _per_class(found, run, names, judged),
      _curves(run, names, judged_at, threshold),
      _confusion(judged, names, threshold),
      _worst(found, judged, labels, threshold, pipeline)]


# --- Right and wrong ----------------------------------------------------------
def judge(one, threshold):
  """What became of an image's objects and found boxes.

  Args:
    one: a `Found`.
    threshold: least score of a found box.

  Returns:
    [(true class id or None, found class id or None)]: an object and the box on
    it, an object that was missed, a box where nothing is. Boxes on crowds are
    left out, as in COCO's evaluation.
  """
  known = [o for o in one.objects if not o['is_crowd']]
  use = np.flatnonzero(one.scores >= threshold)
  truth = [o['box'] for o in known]
  pairs = dict(detect.match_boxes(one.boxes[use], one.scores[use], truth))
  out = [(known[m]['class_id'], int(one.labels[use[q]]))
         for q, m in pairs.items()]
  out += [(o['class_id'], None) for m, o in enumerate(known)
          if m not in pairs.values()]
  crowds = [o['box'] for o in one.objects if o['is_crowd']]
  for q in range(len(use)):
    if q not in pairs and not _on_crowd(one.boxes[use[q]], crowds):
      out.append((None, int(one.labels[use[q]])))
  return out


def _on_crowd(box, crowds):
  """Whether more than half of a box lies on one of the crowds."""
  box = np.asarray(box, float)
  for crowd in np.asarray(crowds, float).reshape(-1, 4):
    overlap = np.clip(np.minimum(box[2:], crowd[2:])
                      - np.maximum(box[:2], crowd[:2]), 0, None).prod()
    if overlap > .5 * (box[2:] - box[:2]).prod():
      return True
  return False


def precision_recall(judged):
  """(precision, recall) of all images' `judge`; 0 where nothing counts."""
  pairs = [p for one in judged for p in one]
  right = sum(a is not None and a == b for a, b in pairs)
  found = sum(b is not None for _, b in pairs)
  objects = sum(a is not None for a, _ in pairs)
  return right / max(found, 1), right / max(objects, 1)


def _f1(precision, recall):
  return 2 * precision * recall / max(precision + recall, 1e-9)


def best_threshold(judged_at):
  """The least score of {threshold: judged} with the highest F1.

  The lowest of equals; the one of `predict` while no box is right.
  """
  scores = {t: _f1(*precision_recall(judged)) for t, judged in
            judged_at.items()}
  best = max(scores, key=lambda t: (scores[t], -t))
  return best if scores[best] else _USUAL


# --- Sections -----------------------------------------------------------------
def _per_class(found, run, names, judged):
  """AP of each class that has objects here."""
  objects = np.bincount([o['class_id'] for f in found for o in f.objects
                         if not o['is_crowd']], minlength=len(names))
  right = np.bincount([a for one in judged for a, b in one
                       if a is not None and a == b], minlength=len(names))
  precision = run.eval['precision'][:, :, :, 0, -1]  # [IoU, recall, class]
  ap = lambda p: float(p[p > -1].mean()) if (p > -1).any() else None
  number = lambda v: '–' if v is None else f'{v:.3f}'
  table = [(k, ap(precision[:, :, k]), ap(precision[0, :, k]))
           for k in range(len(names)) if objects[k]]
  table.sort(key=lambda row: -1 if row[1] is None else row[1])
  note = 'The lowest come first.'
  if len(table) > _CLASSES:
    note = f'The {_CLASSES} lowest of {len(table)} classes with objects.'
  without = [n for n, count in zip(names, objects) if not count]
  if without and len(names) <= _CLASSES:
    note += f' Without an object in this split: {", ".join(without)}.'
  return details.Section(
      'Average precision of each class', note,
      ('class', 'objects', 'right', 'AP', 'AP50'),
      [[names[k], str(objects[k]), str(right[k]), number(a), number(b)]
       for k, a, b in table[:_CLASSES]])


def _curves(run, names, judged_at, threshold):
  """Precision over recall, and what the score threshold does."""
  precision = run.eval['precision'][0, :, :, 0, -1]  # IoU 0.5: [recall, class]
  there = [k for k in range(len(names)) if (precision[:, k] > -1).all()]
  recall = run.params.recThrs

  def over_recall(ax):
    if len(there) <= _LINES:
      for k, colour in zip(there, _COLOURS):
        ax.plot(recall, precision[:, k], color=colour, linewidth=1,
                label=names[k])
    if there:
      ax.plot(recall, precision[:, there].mean(1), color='#16191d',
              linewidth=2, label=f'mean of {len(there)} classes')
    _axes(ax, 'recall', 'precision')

  def over_threshold(ax):
    at = [precision_recall(judged) for judged in judged_at.values()]
    for k, (name, colour) in enumerate(zip(('precision', 'recall'), _COLOURS)):
      ax.plot(list(judged_at), [p[k] for p in at], color=colour, label=name)
    ax.plot(list(judged_at), [_f1(*p) for p in at], color='#16191d',
            linewidth=2, label='F1')
    ax.axvline(threshold, color='#adb5bd', linewidth=1, linestyle=':')
    _axes(ax, 'least score', '')
  right = precision_recall(judged_at[threshold])[0] > 0
  return details.Section(
      'Precision and recall', 'Boxes with IoU 0.5. ' + (
          f'F1 is highest at a least score of {threshold:g}: predict '
          f'--threshold {threshold:g}.' if right else 'No box is right.'),
      charts=[('precision over recall', details.figure(over_recall)),
              ('over the least score', details.figure(over_threshold))])


def _axes(ax, x, y):
  ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x, ylabel=y)
  ax.grid(True, color='#f1f3f5')
  ax.spines[['top', 'right']].set_visible(False)
  if ax.get_legend_handles_labels()[0]:
    ax.legend(frameon=False, fontsize=8)


def confusion(judged, count):
  """[C + 1, C + 1]: rows are true classes, columns found ones.

  The last column counts missed objects, the last row boxes where nothing is.

  Args:
    judged: list of `judge`'s results.
    count: C.
  """
  table = np.zeros((count + 1, count + 1), int)
  for one in judged:
    for a, b in one:
      table[count if a is None else a, count if b is None else b] += 1
  return table


def _confusion(judged, names, threshold):
  """The matrix as a chart; of many classes those with the most mistakes."""
  table = confusion(judged, len(names))
  kept = np.flatnonzero(table.sum(0)[:-1] + table.sum(1)[:-1])
  note = (f'Boxes with a score of {threshold:g} or more on objects (IoU 0.5).')
  if len(kept) > _CELLS:
    wrong = table.sum(0)[:-1] + table.sum(1)[:-1] - 2 * np.diag(table)[:-1]
    kept = np.sort(kept[np.argsort(-wrong[kept], kind='stable')[:_CELLS]])
    note += (f' The {_CELLS} classes with the most mistakes; mistakes among '
             'others are not shown.')
  at = [*kept, len(names)]
  shown = table[np.ix_(at, at)]
  rows = [names[k] for k in kept] + [NOTHING]
  columns = [names[k] for k in kept] + [MISSED]
  share = shown / np.maximum(shown.sum(1, keepdims=True), 1)

  def draw(ax):
    ax.imshow(share, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    ax.set_xticks(range(len(at)), columns, rotation=90)
    ax.set_yticks(range(len(at)), rows)
    ax.set(xlabel='found', ylabel='true')
    for i, j in np.argwhere(shown):
      ax.text(j, i, str(shown[i, j]), ha='center', va='center', fontsize=8,
              color='white' if share[i, j] > .5 else '#16191d')
    ax.spines[:].set_visible(False)
  side = 1.6 + .32 * len(at)
  return details.Section(
      'What is taken for what', note,
      charts=[('rows are true classes; colours are shares of a row',
               details.figure(draw, (max(side, 3.4), max(side * .8, 2.6))))])


def _worst(found, judged, labels, threshold, pipeline):
  """The images with the most mistakes, drawn."""
  def mistakes(one):
    wrong = sum(a != b for a, b in one)
    return wrong, wrong / max(len(one), 1)
  order = sorted(range(len(found)), key=lambda i: mistakes(judged[i]),
                 reverse=True)[:_WORST]
  drawn = []
  for i in order:
    if not mistakes(judged[i])[0]:
      continue
    missed = sum(b is None for _, b in judged[i])
    nothing = sum(a is None for a, _ in judged[i])
    taken = mistakes(judged[i])[0] - missed - nothing
    drawn.append((f'{pipeline.name(found[i].example_id)}: {missed} missed, '
                  f'{nothing} {NOTHING}, {taken} of another class',
                  _picture(found[i], labels, threshold, pipeline)))
  return details.Section(
      'The worst images',
      f'Those with the most mistakes at a least score of {threshold:g}. '
      'Green: right; red: wrong; dashed: missed.' if drawn else
      f'No mistake at a least score of {threshold:g}.', pictures=drawn)


def _picture(one, labels, threshold, pipeline):
  """An image with the found boxes and the truth, without attributes."""
  record = pipeline.record(one.example_id)
  image = photographs.decode_image(record['image'], record['image_id'])
  limit = np.array([*image.shape[1::-1]] * 2)
  best = [q for q in np.argsort(-one.scores, kind='stable')
          if one.scores[q] >= threshold]
  result = detect.Result('detect', *image.shape[:2], [
      detect.Object(labels.classes[int(one.labels[q])], float(one.scores[q]),
                    np.clip(one.boxes[q], 0, limit).tolist(), [])
      for q in best])
  plain = {**record, 'objects': [
      {**o, 'attributes': []} for o in record['objects']]}
  return pictures.draw(image, [result], base.Truth(plain, labels))
