"""Image-text retrieval: which of some texts belong to an image, best first.

`match` judges each text on its own, in the order in which they are given;
`embed` gives vectors for an index of one's own. Recall over a whole split is
the evaluator `retrieval`.
"""
import dataclasses

from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import match


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`texts`: `match.Scored`s, the best first."""
  texts: list


class Task(match.Task):
  """Texts ordered by the ITM head."""
  summary = 'the texts that fit the image best, in order'
  options = {'best': base.Option(5, 'texts to list', 1)}
  # The rows of `match` show the same head.
  in_samples = False
  finetuning = base.Finetuning(
      unit='image', objectives={'itm': 1.}, train_ops='text|itm(.5)',
      eval_ops='text', evaluator='retrieval', metric='mean', data='karpathy',
      splits={'scenes': ('train', 'test'), 'coco': ('train', 'validation'),
              'karpathy': ('train', 'validation'),
              'flickr30k': ('train', 'validation')})

  def result(self, predictor, arrays, size, texts, best=5):
    found = super().result(predictor, arrays, size, texts).match
    return Result(self.name, *size, sorted(
        found, key=lambda m: -m.score)[:best])

  def draw(self, result, truth=None):
    """Numbered texts; right or wrong where the image's own are known."""
    if result is None:
      return base.Drawing()
    own = [t.strip() for t in truth.record['texts']] if truth else None
    rows = []
    for k, found in enumerate(result.texts, 1):
      mark = [] if own is None else [
          ('✓', base.RIGHT) if found.text.strip() in own else
          ('✗', base.WRONG)]
      rows.append([*mark, (f'{k}. {found.score:.2f}', base.FAINT),
                   (found.text, base.INK)])
    return base.Drawing(sentences=rows)
