"""Referring expressions: the box of the object that a text means."""
import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.ops import boxes as box_ops
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import detect

RIGHT_IOU = .5  # with which a box counts as right
# FIBER's settings for expressions.
_TOKENS = dict(threshold=0., candidates=3000)


@dataclasses.dataclass(frozen=True)
class Phrase:
  """A box of a phrase: x0, y0, x1, y1 in pixels, inside the image."""
  text: str
  box: list
  score: float


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`phrases`: a list of `Phrase`s, best first for each text."""
  phrases: list


class Task(base.Task):
  """The best box for a text, by either of two kinds of models.

  Models with object queries (E2E-VLP) choose one of the queries' boxes. Models
  that ground tokens (FIBER's fine stage) score boxes by the tokens of the text,
  or of its `phrase_tokens` where these are known.
  """
  summary = 'the box of the object that a text means'
  requests = {'grounded': ('boxes', 'refer')}
  keys = ('image', 'image_mask', 'image_size', 'text', 'text_mask',
          'phrase_tokens')
  takes_text = needs_text = True
  options = {'boxes': base.Option(1, 'boxes to list for each text', 1,
                                  compiled=True)}
  finetuning = base.Finetuning(
      unit='refexp', objectives={'refer': 1.},
      head=dict(kind='classifier', state='queries', views=('grounded',),
                outputs=1),
      train_ops="text('refexps')|refexp", eval_ops="text('refexps')|refexp",
      evaluator='refexp', metric='accuracy', data='refcoco',
      splits={'scenes': ('train', 'test'),
              'refcoco': ('train', 'validation')})
  alternatives = (dataclasses.replace(
      finetuning, objectives={'grounding': 1.}, head=None,
      train_ops='grounding', eval_ops='grounding'),)

  def lacks(self, model):
    """Nothing, if the model has the heads of either kind."""
    return [] if model.offers('joint', 'grounding') else super().lacks(model)

  def compute(self, predictor, variables, batch, boxes=1):
    """{'boxes' [B, P, N, 4] in pixels, 'scores' [B, P, N]}, best first."""
    by = (_by_queries if predictor.model.offers('grounded', 'refer') else
          _by_tokens)
    corners, scores = by(predictor.model, variables, batch, boxes)
    size = batch['image_size'].astype(jnp.float32)[:, None, None, [1, 0, 1, 0]]
    return {'boxes': jnp.clip(corners * size, 0, size), 'scores': scores}

  def result(self, predictor, arrays, size, texts):
    del predictor
    return Result(self.name, *size, [
        Phrase(text, box.tolist(), float(score))
        for text, boxes, scores in zip(texts, arrays['boxes'],
                                       arrays['scores']) if text.strip()
        for box, score in zip(boxes, scores)])

  def sample_texts(self, records):
    """One expression per row; rows of one image show its own in turn."""
    texts, asked = [], collections.Counter()
    for record in records:
      found = record['refexps'] if record else ()
      if found:
        k = asked[record['image_id']] % len(found)
        asked[record['image_id']] += 1
      texts.append([found[k]['text'] if found else ''])
    return texts

  def draw(self, result, truth=None):
    """Each text's boxes in one colour, or right and wrong if it is known."""
    boxes, rows = [], []
    known = _true_boxes(truth) if truth is not None else {}
    seen = dict.fromkeys(p.text for p in result.phrases) if result else ()
    for k, text in enumerate(seen):
      colour = base.COLOURS[k % len(base.COLOURS)]
      first = next(p for p in result.phrases if p.text == text)
      row = [(text, base.INK), (f'{first.score:.2f}', base.FAINT)]
      if text in known:
        right = detect.iou([first.box], [known[text]])[0, 0] >= RIGHT_IOU
        colour = base.RIGHT if right else base.WRONG
        row.insert(0, ('✓' if right else '✗', colour))
        boxes.append(base.Box(known[text], base.TRUTH, style='thin' if right
                              else 'dashed'))
      else:
        row.insert(0, ('■', colour))
      rows.append(row)
      boxes += [base.Box(p.box, colour, _short(text) if p is first else '',
                         'bold' if p is first else 'thin')
                for p in result.phrases if p.text == text]
    return base.Drawing(boxes, sentences=rows)


def _short(text, most=32):
  """A text as a box's tag; the whole stands below the image."""
  return text if len(text) <= most else text[:most - 1] + '…'


def _by_queries(model, variables, batch, most):
  """(boxes [B, P, N, 4] in [0, 1], scores [B, P, N]) of the best queries."""
  found = model.apply(variables, batch, Task.requests)['grounded']
  # Only the ratios of the queries' logits are trained; see objectives.refer.
  scores = jax.nn.softmax(found['refer_logits'].astype(jnp.float32)[..., 0])
  scores, best = jax.lax.top_k(scores, min(most, scores.shape[-1]))
  corners = box_ops.to_xyxy(found['pred_boxes'].astype(jnp.float32))
  return jnp.take_along_axis(corners, best[..., None], 2), scores


def _by_tokens(model, variables, batch, most):
  """The same of a model that scores boxes by the tokens of a text."""
  found = model.apply(variables, batch, {'joint': ('grounding',)})['joint']
  if 'phrase_tokens' in batch:
    words = batch['phrase_tokens'].any(2)
  else:
    mask = batch['text_mask']
    # Without the special tokens at both ends.
    words = mask & jnp.pad(mask, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    words = words.at[..., 0].set(False)
  found = grounding_head.objects(
      found, words[:, :, None], grounding_head.image_size(batch['image_mask']),
      most=most, **_TOKENS)
  return found['boxes'], found['scores']


def _true_boxes(truth):
  """{expression: its box in pixels} of a `tasks.base.Truth`."""
  record = truth.record
  size = np.array([record['height'], record['width']] * 2)
  return {r['text']: (r['bbox'] * size)[[1, 0, 3, 2]].tolist()
          for r in record.get('refexps', ())}
