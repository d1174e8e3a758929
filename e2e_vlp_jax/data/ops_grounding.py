"""A caption, the boxes that its phrases name, and which words name each box."""
import logging

import numpy as np

from e2e_vlp_jax.data import (
    class_captions, ops_boxes, ops_image, ops_text, spans)
from e2e_vlp_jax.data.keys import Key, yes
from e2e_vlp_jax.data.rng import fold, uniform
from e2e_vlp_jax.errors import UserError

_UNITS = ('image', 'text', 'refexp')


def grounding(context, negatives=85, probabilities=(0., 0., .5),
              class_share=0., merge=.95):
  """One text of the row with its boxes, for models that ground phrases.

  The text is, depending on `config.data.unit`,
  - 'text': the row's caption; its boxes are those of its phrases.
  - 'refexp': the row's expression and its box. Its words are those of the
    item's spans (MDETR's files mark the head noun), or all of them.
  - 'image': one of the captions with phrases: in training a random one, in
    evaluation the first. For an image without any, or for a share of all that
    have objects, its class names: see `class_captions`.

  Boxes are clipped to the window of `fit`, and the largest M of them are kept.
  A box none of whose words the model reads (they lie beyond L tokens, or its
  class does not fit) is left out and counted in `lost_boxes`.

  Reads texts, phrases, refexps, objects, item, has_boxes; window, flipped.

  Args:
    context: has L, M, the tokenizer, the label space and the unit.
    negatives: number of other classes to name at most; -1 = all classes, as
      in fine-tuning for COCO.
    probabilities: see `class_captions.sampled`.
    class_share: share of the rows that show class names although the image
      has captions with phrases.
    merge: boxes of one caption with this IoU or more are one box with the
      words of both (as in MDETR's Flickr30k files); 0 = never.
  """
  if context.unit not in _UNITS:
    raise UserError(f'pp: grounding needs data.unit to be one of '
                    f'{", ".join(_UNITS)}; it is {context.unit!r}')
  choose = _chooser(context, _Namer(context, negatives, probabilities),
                    class_share)
  warned = False

  def apply(example):
    nonlocal warned
    if 'window' not in example:
      raise UserError('pp: decode must stand before grounding')
    text, stored, words, lost = choose(example)
    length, most = context.max_text, context.max_boxes
    ids = np.full((1, length), context.tokenizer.pad_id, np.int32)
    row = context.tokenizer.encode(text, length) if text.strip() else []
    ids[0, :len(row)] = row
    corners, words = _merged(ops_boxes.in_window(example, stored), words,
                             merge)
    masks = spans.token_mask(context.tokenizer, text, words, length)
    read = masks.any(-1)
    lost += int((~read).sum())
    if lost and not warned:
      warned = True
      logging.warning('%d boxes of a text have no word within data.max_text=%d'
                      ' tokens and are left out, as all others will be; '
                      '`lost_boxes` counts them: %r', lost, length, text[:99])
    keep = ops_boxes.largest(corners, most, read)
    span_mask = np.zeros((most, length), bool)
    span_mask[:len(keep)] = masks[keep]
    return {**example, 'text': ids, 'lost_boxes': lost,
            'text_mask': np.arange(length)[None] < len(row),
            'boxes': ops_boxes.padded(corners[keep], most),
            'box_mask': np.arange(most) < len(keep), 'span_mask': span_mask,
            'task_mask/grounding': bool(row)}
  return apply


def _chooser(context, namer, class_share):
  """The function that chooses a row's text; see `grounding`."""
  def choose(example):
    """(text, boxes as stored, spans of each, number of lost boxes)."""
    seed, number = example['seed'], example.get('item', 0)
    if context.unit == 'refexp':
      item = example['refexps'][number]
      text, = example['texts']
      if not text:  # That of `records.nothing()`.
        return '', [], [], 0
      found = item['spans'] or [(0, len(item['text']))]
      return text, [item['bbox']], [_moved(example, text, found)], 0
    share, which = uniform(fold(seed, 1), [2]) if context.train else (1., 0.)
    if context.unit == 'text':
      text = example['texts'][0]
    else:
      found = sorted({p['text_number'] for p in example['phrases']
                      if p['text_number'] >= 0})
      if not found or share < class_share and example['has_boxes']:
        return namer(example, fold(seed, 2))
      number = found[int(which * len(found))]
      text = example['texts'][number]
    items = [p for p in example['phrases'] if p['text_number'] == number]
    return (text, [p['bbox'] for p in items],
            [_moved(example, text, p['spans']) for p in items], 0)
  return choose


class _Namer:
  """Class names as the text of an image."""

  def __init__(self, context, negatives, probabilities):
    self._context, self._negatives = context, negatives
    self._probabilities = probabilities
    self._names = [class_captions.clean_name(n)
                   for n in context.labels.classes]
    self._costs, self._within = (
        [count(context.tokenizer, n) for n in self._names]
        for count in (class_captions.cost, class_captions.cost_within))

  def __call__(self, example, seed):
    """(text, boxes, spans of each, number of lost boxes)."""
    objects = [o for o in example['objects'] if not o['is_crowd']]
    if not example['has_boxes']:
      return '', [], [], 0
    labels = [self._context.labels.class_id(o['label']) for o in objects]
    chosen = self._chosen(sorted(set(labels)), seed)
    text, where = class_captions.caption([self._names[i] for i in chosen])
    span_of = dict(zip(chosen, where))
    named = [k for k, i in enumerate(labels) if i in span_of]
    return (text, [objects[k]['bbox'] for k in named],
            [[span_of[labels[k]]] for k in named], len(objects) - len(named))

  def _chosen(self, positives, seed):
    """Ids of the classes to name, in their order."""
    context, count = self._context, len(self._names)
    everything = range(count)
    if not context.train:
      return class_captions.chunks(self._names, context.tokenizer,
                                   context.max_text)[0]
    shuffled = lambda ids, k: [ids[i] for i in np.argsort(
        uniform(fold(seed, k), [len(ids)]), kind='stable')]
    positives = shuffled(positives, 1)
    kept = positives[:class_captions.fitting(
        [self._costs[i] for i in positives], context.max_text)]
    if self._negatives < 0:
      others = shuffled(sorted(set(everything) - set(positives)), 2)
      most = class_captions.fitting(
          [self._within[i] for i in (*kept, *others)], context.max_text)
      others = others[:max(most - len(kept), 0)]
    else:
      others = class_captions.sampled(
          set(positives), everything, self._costs.__getitem__,
          context.max_text - 2 - sum(self._costs[i] for i in kept),
          self._negatives, uniform(fold(seed, 2), [2 + count]),
          self._probabilities)
    return shuffled(kept + others, 3)


def _moved(example, text, found):
  """Spans in a text whose left and right `flip(swap_words=True)` has swapped.
  """
  swap = ops_image.swap_left_right
  if not example['flipped'] or swap(text) == text:
    return list(found)
  before = swap(text)
  return [(len(swap(before[:first])), len(swap(before[:end])))
          for first, end in found]


def _merged(corners, words, least):
  """Boxes [n, 4] and their spans, those that overlap so much made one."""
  kept, found = [], []
  for box, some in zip(corners, words):
    same = next((k for k, other in enumerate(kept)
                 if least and _iou(box, other) >= least), None)
    if same is None:
      kept.append(box)
      found.append(list(some))
    else:
      found[same] += some
  return np.array(kept, float).reshape(-1, 4), found


def _iou(a, b):
  """IoU of two boxes x0, y0, x1, y1; 0 without area."""
  sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
  shared = np.prod(np.maximum(sides, 0))
  union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
  return shared / union if union > 0 else 0.


def _draw_spans(draw):
  """One to four tokens for every box, between the special tokens."""
  b, m, l = draw.shape
  words = np.maximum(draw.batch['text_mask'][:, 0].sum(-1) - 2, 1)[:, None]
  first = 1 + (draw.rng.random((b, m)) * words).astype(int)
  end = np.minimum(first + draw.rng.integers(1, 5, (b, m)), 1 + words)
  place = np.arange(l)
  return ((place >= first[..., None]) & (place < end[..., None])
          & draw.batch['box_mask'][..., None])


def _of(keys, *names):
  return tuple(key for key in keys if key.name in names)


OPS = {'grounding': grounding}
SIZES = {'grounding': lambda **_: {'S': 1}}
KEYS = {'grounding': (
    *_of(ops_text.KEYS['text'], 'text_mask', 'text'),
    *_of(ops_boxes.KEYS['boxes'], 'box_mask', 'boxes'),
    Key('span_mask', bool, 'ML', False,
        'True on the tokens of the text that name the box', _draw_spans),
    Key('lost_boxes', np.int32, '', 0,
        'boxes left out because the model reads none of their words',
        lambda draw: np.zeros(draw.shape)),
    Key('task_mask/grounding', bool, '', False, 'whether there is a text',
        yes),
)}
