"""Visual entailment: does a text follow from an image, or contradict it?"""
import dataclasses

import jax
import jax.numpy as jnp

from e2e_vlp_jax.data import pp
from e2e_vlp_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Judged:
  """A text, its likeliest label, and that label's probability."""
  text: str
  label: str
  score: float


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`entailment`: `Judged`s, in the order of the texts."""
  entailment: list


class Task(base.Task):
  """Three classes, from the pooled state of the image with the text."""
  summary = 'whether texts follow from the image, contradict it, or neither'
  requests = {'joint': ('entail',)}
  keys = ('image', 'image_mask', 'text', 'text_mask')
  takes_text = needs_text = True
  finetuning = base.Finetuning(
      unit='entailment', objectives={'entail': 1.},
      head=dict(kind='classifier', state='pooled', views=('joint',),
                outputs=3),
      train_ops="text('entailment')|entailment_labels",
      eval_ops="text('entailment')", evaluator='entailment',
      metric='accuracy', data='snli_ve',
      splits={'scenes': ('train', 'test'), 'snli_ve': ('train', 'dev')})

  @property
  def labels(self):
    """Names of the classes, as the op numbers them."""
    return dict(pp.bind('entailment_labels'))['entailment_labels']['labels']

  def outputs(self, outputs, batch):
    logits = outputs['joint']['entail_logits'].astype(jnp.float32)
    return {'scores': jax.nn.softmax(logits)}

  def result(self, predictor, arrays, size, texts):
    return Result(self.name, *size, [
        Judged(text, self.labels[scores.argmax()], float(scores.max()))
        for text, scores in zip(texts, arrays['scores']) if text.strip()])

  def sample_texts(self, records):
    """The text of the row, or the image's first one."""
    def text(record):
      items = record['entailment'] if record else ()
      return items[min(record['item'], len(items) - 1)]['text'] if items else ''
    return [[text(r)] for r in records]

  def draw(self, result, truth=None):
    """The texts, their labels, and whether those are right."""
    if result is None:
      return base.Drawing()
    known = {e['text']: e['label'] for e in truth.record['entailment']
             } if truth is not None else {}
    rows = []
    for j in result.entailment:
      row = [(j.label, base.INK), (f'{j.score:.2f}', base.FAINT)]
      if known.get(j.text) == j.label:
        row.insert(0, ('✓', base.RIGHT))
      elif known.get(j.text):
        row = [('✗', base.WRONG), *row, (f'· {known[j.text]}', base.FAINT)]
      rows += [[(j.text, base.FAINT)], row]
    return base.Drawing(sentences=rows)
