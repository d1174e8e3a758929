"""Grounding: the boxes of the phrases of a text, or of a list of classes."""
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import detect
from e2e_vlp_jax.tasks import refer

# FIBER's settings for phrases and for classes.
PHRASES = dict(threshold=0., candidates=3000)
CLASSES = dict(threshold=.05, candidates=1000)
_MARKED = re.compile(r'\[([^\[\]]*)\]')


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`phrases`: a list of `refer.Phrase`s, in the order of the texts, best first
  for each phrase; `objects`: of classes, a list of `detect.Object`s."""
  phrases: list
  objects: list


class Task(base.Task):
  """A phrase is what stands in [brackets], or without any the whole text."""
  summary = ('the boxes of the [phrases] of a text, or of --classes, any list '
             'of names')
  requests = {'joint': ('grounding',)}
  keys = ('image', 'image_mask', 'image_size', 'text', 'text_mask',
          'phrase_tokens')
  takes_text = needs_text = True
  options = {
      'classes': base.Option('', "class names instead of texts, such as 'cat, "
                             "traffic light'"),
      'boxes': base.Option(1, 'boxes to list for each phrase', 1),
      'threshold': base.Option(.3, 'least score of an object of a class', 0, 1),
      'most': base.Option(100, 'boxes of each text, or of each caption of '
                          'classes, that are kept', 1, compiled=True)}
  finetuning = base.Finetuning(
      unit='image', objectives={'grounding': 1.}, train_ops='grounding',
      eval_ops='grounding', evaluator='grounding', metric='R1',
      data='flickr30k_entities',
      splits={'scenes': ('train', 'test'),
              'flickr30k_entities': ('train', 'validation')})

  def check_texts(self, texts, count, options=None):
    """As every task's; with classes there are no texts."""
    if not (options or {}).get('classes'):
      found = super().check_texts(texts, count, options)
      for text in (t for own in found for t in own):
        parse(text)
      return found
    if texts:
      raise errors.UserError('--text and --classes: expected one of the two')
    return [[] for _ in range(count)]

  def plain_text(self, text):
    return parse(text)[0]

  def text_inputs(self, predictor, texts, count):
    return predictor.phrase_inputs(
        [(text, [[span] for span in spans])
         for text, spans in map(parse, texts)], count)

  def fixed_inputs(self, predictor, variables, options):
    names = class_list(options.get('classes', ''))
    return predictor.prompt(variables, names).inputs if names else {}

  def compute(self, predictor, variables, batch, most=100):
    """Boxes of phrases, or of the classes of a `Prompt`.

    Returns:
      dict: boxes [B, P, K, 4] in pixels, scores [B, P, K] and labels [B, P, K]:
      the number of the phrase or of the class, -1 = nothing.
    """
    mask = batch['image_mask']
    if 'prompt_text' in batch:
      tokens, how = batch['prompt_tokens'], CLASSES
      text = jax.tree.map(
          lambda x: jnp.broadcast_to(x, (len(mask), *x.shape[1:])),
          batch['prompt_text'])
      apply = lambda *args, **kw: predictor.model.apply(variables, *args, **kw)
      out = apply(apply(batch, method='encode_image'), text, ('grounding',),
                  method='pairs')
    else:
      tokens, how = batch['phrase_tokens'], PHRASES
      out = predictor.model.apply(variables, batch, self.requests)['joint']
    found = grounding_head.objects(out, tokens, grounding_head.image_size(mask),
                                   most=most, **how)
    labels = found['labels']
    if 'prompt_ids' in batch:
      ids = jnp.broadcast_to(batch['prompt_ids'],
                             (len(mask), *batch['prompt_ids'].shape[1:]))
      labels = jnp.where(labels >= 0, jnp.take_along_axis(
          ids, jnp.maximum(labels, 0), -1), -1)
    size = batch['image_size'].astype(jnp.float32)[:, None, None, [1, 0, 1, 0]]
    return {'boxes': found['boxes'] * size, 'scores': found['scores'],
            'labels': labels}

  def result(self, predictor, arrays, size, texts, classes='', boxes=1,
             threshold=.3):
    del predictor
    names = class_list(classes)
    if names:
      return Result(self.name, *size, [], _objects(arrays, names, threshold))
    phrases = []
    for row, text in enumerate(texts):
      plain, spans = parse(text)
      for k, (first, end) in enumerate(spans):
        found = zip(range(boxes), *of_label(arrays, row, k))
        phrases += [refer.Phrase(plain[first:end], box.tolist(), float(score))
                    for _, box, score in found]
    return Result(self.name, *size, phrases, [])

  def sample_texts(self, records):
    """A caption of each record with its phrases in brackets, or an expression,
    or the names of its objects."""
    return [[_sample(r) if r else ''] for r in records]

  def draw(self, result, truth=None):
    """Each phrase in the colour of its best box; green and red if the truth is
    known, with thin white lines for true boxes."""
    if result is None:
      return base.Drawing()
    if result.objects:
      return detect.Task().draw(detect.Result(
          'detect', result.height, result.width, result.objects))
    known = _true_boxes(truth) if truth is not None else {}
    boxes, row, seen = [], [], {}
    for phrase in result.phrases:
      first = phrase.text not in seen
      if first:
        seen[phrase.text] = base.COLOURS[len(seen) % len(base.COLOURS)]
        true = known.get(phrase.text)
        if true:
          right = detect.iou([phrase.box], true).max() >= refer.RIGHT_IOU
          seen[phrase.text] = base.RIGHT if right else base.WRONG
          boxes += [base.Box(box, base.TRUTH, style='thin') for box in true]
        row += [('■', seen[phrase.text]), (phrase.text, base.INK),
                (f'{phrase.score:.2f}', base.FAINT)]
      boxes.append(base.Box(phrase.box, seen[phrase.text],
                            phrase.text if first else '',
                            'bold' if first else 'thin'))
    return base.Drawing(boxes, sentences=[row] if row else [])


def _true_boxes(truth):
  """{phrase: its boxes in pixels} of the captions of a `tasks.base.Truth`."""
  record, found = truth.record, {}
  size = np.array([record['width'], record['height']] * 2)
  for p in record['phrases']:
    if p['text_number'] >= 0:
      found.setdefault(p['text'], []).append(
          (p['bbox'][[1, 0, 3, 2]] * size).tolist())
  return found


def parse(text):
  """'[A man] walks' -> ('A man walks', [(0, 5)]); without brackets the whole
  text is a phrase.

  Raises:
    UserError: a bracket without its other half, or nothing between two.
  """
  plain, spans, at = '', [], 0
  for m in _MARKED.finditer(text):
    plain += text[at:m.start()]
    spans.append((len(plain), len(plain) + len(m[1])))
    plain += m[1]
    at = m.end()
    if not m[1].strip():
      raise errors.UserError(f'text {text!r}: an empty phrase; expected words '
                             'between [ and ]')
  plain += text[at:]
  if '[' in plain or ']' in plain:
    raise errors.UserError(f'text {text!r}: a bracket without its other half; '
                           'expected [phrase], not one within another')
  return plain, spans or ([(0, len(plain))] if plain.strip() else [])


def class_list(classes):
  """'cat, traffic light' or a list of names -> the names as given."""
  if isinstance(classes, str):
    return [n.strip() for n in classes.split(',')] if classes.strip() else []
  return list(classes)


def of_label(arrays, row, label):
  """(boxes, scores) of one phrase of text `row`, best first."""
  mine = arrays['labels'][row] == label
  return arrays['boxes'][row][mine], arrays['scores'][row][mine]


def _objects(arrays, names, threshold):
  """`detect.Object`s of all captions of a prompt, best first."""
  scores = arrays['scores'].reshape(-1)
  labels = arrays['labels'].reshape(-1)
  boxes = arrays['boxes'].reshape(-1, 4)
  return [detect.Object(names[int(labels[k])], float(scores[k]),
                        boxes[k].tolist(), [])
          for k in np.argsort(-scores, kind='stable')
          if labels[k] >= 0 and scores[k] >= threshold]


def _sample(record):
  """A text with brackets that a record can be asked for."""
  numbers = [p['text_number'] for p in record['phrases']
             if p['text_number'] >= 0]
  if numbers:
    number = min(numbers)
    text = record['texts'][number]
    spans = sorted({s for p in record['phrases']
                    if p['text_number'] == number for s in p['spans']})
    out, at = '', 0
    for first, end in spans:
      if first >= at and not set('[]') & set(text):
        out += f'{text[at:first]}[{text[first:end]}]'
        at = end
    return out + text[at:]
  if record['refexps']:
    return record['refexps'][0]['text'].translate({91: '(', 93: ')'})
  names = dict.fromkeys(o['label'] for o in record['objects'])
  return '. '.join(f'[{n}]' for n in names if not set('[]') & set(n))
