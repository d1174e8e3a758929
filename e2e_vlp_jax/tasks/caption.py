"""Captioning: a sentence about an image, from the image alone."""
import dataclasses

import numpy as np

from e2e_vlp_jax.models import beam_search
from e2e_vlp_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Caption:
  """A caption; its score is the geometric mean of its tokens' probability."""
  text: str
  score: float


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`caption`: a `Caption`."""
  caption: Caption


class Task(base.Task):
  """Beam search over the model's caption decoder."""
  summary = 'a sentence about the image'
  requests = {'image_only': ('captioning',)}
  options = {'beams': base.Option(1, 'width of the caption search', 1, 100,
                                  compiled=True)}
  finetuning = base.Finetuning(
      unit='image', objectives={'captioning': 1.}, train_ops='text',
      eval_ops='text', evaluator='captioning', metric='CIDEr',
      data='karpathy', splits={
          'scenes': ('train', 'test'), 'coco': ('train', 'validation'),
          'karpathy': ('train', 'validation'),
          'flickr30k': ('train', 'validation')})

  def compute(self, predictor, variables, batch, beams=1):
    tokenizer = predictor.tokenizer
    tokens, scores = beam_search.generate(
        predictor.model, variables, batch, cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id,
        mask_id=tokenizer.mask_id,
        max_length=predictor.config.data.max_text, beams=beams)
    return {'tokens': tokens, 'scores': scores}

  def result(self, predictor, arrays, size, texts):
    del texts
    tokenizer, ids = predictor.tokenizer, arrays['tokens'].tolist()
    if tokenizer.sep_id in ids[1:]:
      ids = ids[:ids.index(tokenizer.sep_id, 1)]
    return Result(self.name, *size, Caption(
        tokenizer.decode(ids), float(np.exp(arrays['scores']))))

  def draw(self, result, truth=None):
    if result is None:
      return base.Drawing()
    text, mark, references = result.caption.text, [], []
    if truth is not None:
      references = [t for t in truth.record['texts'] if t.strip()][:2]
      if truth.check_caption:
        mark = ([('✓', base.RIGHT)] if truth.check_caption(text) else
                [('✗', base.WRONG)])
    return base.Drawing(sentences=[
        [*mark, ('model:', base.FAINT), (text or '(no words)', base.INK)],
        *([('reference:', base.FAINT), (t, base.FAINT)]
          for t in references)])
