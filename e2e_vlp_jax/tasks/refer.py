"""Referring expressions: the box of the object that a text means."""
import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax.ops import boxes as box_ops
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import detect

RIGHT_IOU = .5  # with which a box counts as right


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
  """The most probable of the object queries' boxes."""
  summary = 'the box of the object that a text means'
  requests = {'grounded': ('boxes', 'refer')}
  keys = ('image', 'image_mask', 'image_size', 'text', 'text_mask')
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

  def compute(self, predictor, variables, batch, boxes=1):
    """{'boxes' [B, P, N, 4] in pixels, 'scores' [B, P, N]}, best first."""
    found = predictor.model.apply(variables, batch, self.requests)['grounded']
    wide = lambda x: x.astype(jnp.float32)
    # Only the ratios of its logits are trained; see objectives.refer.
    scores = jax.nn.softmax(wide(found['refer_logits'])[..., 0])
    scores, best = jax.lax.top_k(scores, min(boxes, scores.shape[-1]))
    corners = jnp.take_along_axis(
        box_ops.to_xyxy(wide(found['pred_boxes'])), best[..., None], 2)
    size = wide(batch['image_size'])[:, None, None, [1, 0, 1, 0]]
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
      boxes += [base.Box(p.box, colour, text if p is first else '',
                         'bold' if p is first else 'thin')
                for p in result.phrases if p.text == text]
    return base.Drawing(boxes, sentences=rows)


def _true_boxes(truth):
  """{expression: its box in pixels} of a `tasks.base.Truth`."""
  record = truth.record
  size = np.array([record['height'], record['width']] * 2)
  return {r['text']: (r['bbox'] * size)[[1, 0, 3, 2]].tolist()
          for r in record['refexps']}
