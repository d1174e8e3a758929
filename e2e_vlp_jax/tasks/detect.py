"""Detection: the objects of an image, with class, attributes and box."""
import dataclasses

import numpy as np
import scipy.optimize

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import heads
from e2e_vlp_jax.tasks import base

# How many attributes to name that do not exclude each other.
_MIN_ATTRIBUTE, _MAX_ATTRIBUTES = .1, 4
_MANY = 8  # Beyond this many objects, tags are numbers only.


@dataclasses.dataclass(frozen=True)
class Attribute:
  """An attribute of an object and its probability."""
  label: str
  score: float


@dataclasses.dataclass(frozen=True)
class Object:
  """An object; its box is x0, y0, x1, y1 in pixels, inside the image."""
  label: str
  score: float
  box: list
  attributes: list


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`objects`: a list of `Object`s, best first."""
  objects: list


class Task(base.Task):
  """Objects of every image; see `heads.Detection.objects`."""
  summary = 'the objects, with class, attributes and box'
  requests = {'image_only': ('detection',)}
  keys = ('image', 'image_mask', 'image_size')
  options = {'threshold': base.Option(.5, 'least score of an object', 0, 1)}
  finetuning = base.Finetuning(
      unit='image', objectives={'detection': 1.}, train_ops='boxes',
      eval_ops='boxes', evaluator='detection', metric='AP', data='coco',
      splits={'scenes': ('train', 'test'), 'coco': ('train', 'validation'),
              'visual_genome': ('train', 'validation'),
              'objects365': ('train', 'validation'),
              'lvis': ('train', 'minival')}, classes=True)
  # A model that grounds phrases is asked for the classes by their names.
  alternatives = (dataclasses.replace(
      finetuning, objectives={'grounding': 1.},
      train_ops='grounding(negatives=-1)', eval_ops='grounding(negatives=-1)',
      evaluator='class_prompts',
      splits={'scenes': ('train', 'test'), 'coco': ('train', 'validation'),
              'objects365': ('train', 'validation'),
              'lvis': ('train', 'minival')}),)

  def outputs(self, outputs, batch):
    return heads.Detection.objects(outputs['image_only'], batch['image_size'])

  def result(self, predictor, arrays, size, texts, threshold=.5):
    del texts
    labels = predictor.labels
    groups, alone = attribute_groups(labels)
    limit = np.array([*size[::-1], *size[::-1]])
    best = [q for q in np.argsort(-arrays['scores'], kind='stable')
            if arrays['scores'][q] >= threshold]
    return Result(self.name, *size, [
        Object(labels.classes[int(arrays['labels'][q])],
               float(arrays['scores'][q]),
               np.clip(arrays['boxes'][q], 0, limit).tolist(),
               [Attribute(labels.attributes[i], score) for i, score in
                likely_attributes(arrays['attributes'][q], groups, alone)])
        for q in best])

  def draw(self, result, truth=None):
    """Marks right and wrong if the truth is known, else one colour per box."""
    objects = None if result is None else result.objects
    known = None
    if truth is not None and truth.record['objects']:
      known = [o for o in ground_truth(truth.record, truth.labels)
               if not o['is_crowd']]
    matched = {}
    if known is not None and objects:
      matched = dict(match_boxes(
          [o.box for o in objects], [o.score for o in objects],
          [t['box'] for t in known]))
    many = max(len(objects or ()), len(known or ())) > _MANY
    found = [_Found(k, one, known and known[matched[k]] if k in matched
                    else None, known is not None)
             for k, one in enumerate(objects or ())]
    boxes, missed = [], []
    for m, one in enumerate(known or ()):
      name = ' '.join([*one['attributes'], one['label']])
      seen = m in matched.values()
      boxes.append(base.Box(one['box'], base.TRUTH,
                            '' if seen else '–' if many else one['label'],
                            'thin' if seen else 'dashed'))
      if not seen:
        missed.append([('–', base.TRUTH), (name, base.TRUTH)])
    boxes += [f.box(many) for f in found]
    legend = []
    if objects is not None:
      legend.append(_summary(found, known is not None))
      legend += [f.row() for f in found]
    if missed:
      title = 'ground truth:' if objects is None else 'missed:'
      legend += [[(title, base.FAINT)], *missed]
    return base.Drawing(boxes, legend=legend)


@dataclasses.dataclass(frozen=True)
class _Found:
  """A found object in a picture.

  Attributes:
    number: its number, from 0.
    found: an `Object`.
    true: the object of `ground_truth` that it matches, or None.
    judged: whether the image's true objects are known.
  """
  number: int
  found: Object
  true: dict
  judged: bool

  def words(self):
    """The attributes, each in its colour."""
    known = self.true and self.true['attributes']
    return [(a.label, base.FAINT if not self.judged else base.INK if not known
             else base.RIGHT if a.label in known else base.WRONG)
            for a in self.found.attributes]

  def colours(self):
    """Colours of the whole and of the class name."""
    if not self.judged:
      return (base.COLOURS[self.number % len(base.COLOURS)],) * 2
    right = bool(self.true) and self.true['label'] == self.found.label
    whole = right and all(c != base.WRONG for _, c in self.words())
    return (base.RIGHT if whole else base.WRONG,
            base.RIGHT if right else base.WRONG)

  def box(self, many):
    number = str(self.number + 1)
    return base.Box(self.found.box, self.colours()[0],
                    number if many else f'{number} {self.found.label}')

  def row(self):
    whole, name = self.colours()
    row = [(str(self.number + 1), whole), *self.words(),
           (self.found.label, name), (f'{self.found.score:.2f}', base.FAINT)]
    if self.judged and not self.true:
      row.append(('· nothing there', base.WRONG))
    elif self.judged and whole == base.WRONG:
      true = ' '.join([*self.true['attributes'], self.true['label']])
      row.append((f'· is {true}', base.FAINT))
    return row


def _summary(found, judged):
  """The row that counts the found objects."""
  row = [(f'found {len(found)}' if found else 'found nothing', base.FAINT)]
  if judged and found:
    right = sum(f.colours()[0] == base.RIGHT for f in found)
    wrong = len(found) - right
    row += [(f'· {right} right', base.RIGHT if right else base.FAINT),
            (f'· {wrong} wrong', base.WRONG if wrong else base.FAINT)]
  return row


def attribute_groups(labels):
  """Which attributes exclude each other.

  Args:
    labels: a `label_space.LabelSpace`.

  Returns:
    ({group: [attribute ids], of which an object has one}, [ids in no group,
    of which it may have several]).
  """
  groups = {name: [labels.attribute_id(n) for n in members]
            for name, members in labels.attribute_groups.items()}
  grouped = {i for ids in groups.values() for i in ids}
  return groups, [i for i in range(len(labels.attributes))
                  if i not in grouped]


def likely_attributes(probabilities, groups, alone):
  """The attributes to name, best first among those in no group.

  Args:
    probabilities: [A].
    groups, alone: from `attribute_groups`.

  Returns:
    [(id, score)]: one of each group, scored among its members; then the most
    likely ones in no group.
  """
  chosen = []
  for ids in groups.values():
    p = probabilities[ids]
    chosen.append((ids[int(p.argmax())],
                   float(p.max() / max(p.sum(), 1e-9))))
  rest = sorted(alone, key=lambda i: -probabilities[i])[:_MAX_ATTRIBUTES]
  return chosen + [(i, float(probabilities[i])) for i in rest
                   if probabilities[i] >= _MIN_ATTRIBUTE]


def ground_truth(record, labels):
  """The objects of a record, in pixels.

  Objects whose class the label space lacks are left out, as in the input
  pipeline (which reports them).

  Returns:
    list of dicts: label, class_id, box (x0, y0, x1, y1), attributes (names),
    attribute_ids, area (pixels), is_crowd.
  """
  objects = []
  h, w = record['height'], record['width']
  for one in record['objects']:
    y0, x0, y1, x1 = map(float, one['bbox'])
    class_id = _id(labels.class_id, one['label'])
    if class_id is None or not (y1 > y0 and x1 > x0):
      continue
    ids = [_id(labels.attribute_id, a) for a in one['attributes']]
    ids = [i for i in ids if i is not None]
    objects.append({
        'label': labels.classes[class_id], 'class_id': class_id,
        'box': [x0 * w, y0 * h, x1 * w, y1 * h],
        'attributes': [labels.attributes[i] for i in ids],
        'attribute_ids': set(ids), 'area': float(one['area']),
        'is_crowd': bool(one['is_crowd'])})
  return objects


def _id(look_up, name):
  try:
    return look_up(name)
  except errors.UserError:
    return None


def iou(a, b):
  """IoU of boxes [N, 4] and [M, 4] (x0, y0, x1, y1): [N, M], float64."""
  overlap, union, _ = _areas(a, b)
  return overlap / np.maximum(union, 1e-9)


def generalised_iou(a, b):
  """GIoU (Rezatofighi et al., CVPR 2019); see `iou`."""
  overlap, union, hull = _areas(a, b)
  return (overlap / np.maximum(union, 1e-9)
          - (hull - union) / np.maximum(hull, 1e-9))


def _areas(a, b):
  """Areas of intersection, union and enclosing box, each [N, M]."""
  a, b = (np.asarray(x, float).reshape(-1, 4) for x in (a, b))
  a, b = a[:, None], b[None]
  between = lambda low, high: np.clip(high - low, 0, None).prod(-1)
  area = lambda x: (x[..., 2:] - x[..., :2]).prod(-1)
  overlap = between(np.maximum(a[..., :2], b[..., :2]),
                    np.minimum(a[..., 2:], b[..., 2:]))
  return overlap, area(a) + area(b) - overlap, between(
      np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:]))


def match_boxes(boxes, scores, truth):
  """Pairs predictions with objects, one to one.

  Maximises the sum of IoU x score (Hungarian) over pairs with IoU >= 0.5. Of
  two boxes on one object it takes the more confident one.

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
