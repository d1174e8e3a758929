"""Visual reasoning: is a statement about two images, or one, true?"""
import dataclasses

import jax
import jax.numpy as jnp

from e2e_vlp_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Statement:
  """A statement, whether the model takes it for true, and the probability."""
  text: str
  label: bool
  score: float


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`statements`: `Statement`s, in the order of the texts."""
  statements: list


class Task(base.Task):
  """Two classes, from the pooled states of both images with the text."""
  summary = 'whether statements about two images (left, right) or one are true'
  requests = {'pair': ('reason',)}
  keys = ('image', 'image_mask', 'second_image', 'second_image_mask', 'text',
          'text_mask')
  images = 2
  takes_text = needs_text = True
  finetuning = base.Finetuning(
      unit='statement', objectives={'reason': 1.},
      head=dict(kind='classifier', state='pooled', views=('pair',), outputs=2),
      train_ops="second_image|text('statements')|statement_labels",
      eval_ops="second_image|text('statements')", evaluator='nlvr2',
      metric='accuracy', data='nlvr2',
      splits={'scenes': ('train', 'test'), 'nlvr2': ('train', 'dev'),
              # Its train split is no part of the public images.
              'nlvr1': ('dev', 'test')})

  def outputs(self, outputs, batch):
    logits = outputs['pair']['reason_logits'].astype(jnp.float32)
    return {'scores': jax.nn.softmax(logits)[..., 1]}

  def result(self, predictor, arrays, size, texts):
    return Result(self.name, *size, [
        Statement(text, bool(score > .5), float(score))
        for text, score in zip(texts, arrays['scores']) if text.strip()])

  def sample_texts(self, records):
    """The statement of the row, which has its second image."""
    return [[r['statements'][r['item']]['statement']]
            if r and r['statements'] else [''] for r in records]

  def draw(self, result, truth=None):
    """The statements, what the model says, and whether that is right."""
    if result is None:
      return base.Drawing()
    known = {s['statement']: s['label'] for s in truth.record['statements']
             if s['has_label']} if truth is not None else {}
    rows = []
    for s in result.statements:
      row = [('true' if s.label else 'false', base.INK),
             (f'{s.score if s.label else 1 - s.score:.2f}', base.FAINT)]
      if s.text in known:
        right = known[s.text] == s.label
        row.insert(0, ('✓', base.RIGHT) if right else ('✗', base.WRONG))
      rows += [[(s.text, base.FAINT)], row]
    return base.Drawing(sentences=rows)
