"""Image-text matching: how well each of some texts fits an image."""
import dataclasses

from e2e_vlp_jax.models import heads
from e2e_vlp_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Scored:
  """A text and the probability that it belongs to the image."""
  text: str
  score: float


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`match`: a list of `Scored`, in the order of the texts."""
  match: list


class Task(base.Task):
  """The probability of a match, from the ITM head."""
  summary = 'how well each text fits the image'
  requests = {'joint': ('itm',)}
  keys = ('image', 'image_mask', 'text', 'text_mask')
  takes_text = needs_text = True
  finetuning = base.Finetuning(
      unit='image', objectives={'itm': 1.}, train_ops='text|itm(.5)',
      eval_ops='text|itm(.5)', evaluator='itm', metric='accuracy',
      data='coco', splits={'scenes': ('train', 'test'),
                           'coco': ('train', 'validation')})

  def outputs(self, outputs, batch):
    return {'scores': heads.Matching.probability(outputs['joint'])}

  def result(self, predictor, arrays, size, texts):
    return Result(self.name, *size, [
        Scored(t, float(s)) for t, s in zip(texts, arrays['scores'])])

  def sample_texts(self, records):
    """An image's own first text and its neighbour's."""
    first = [([t for t in (r or {}).get('texts', ()) if t.strip()] or [''])[0]
             for r in records]
    return [list(pair) for pair in zip(first, first[1:] + first[:1])]

  def draw(self, result, truth=None):
    """Right or wrong where the image's own texts are known."""
    if result is None:
      return base.Drawing()
    if truth is None:
      return base.Drawing(sentences=[
          [(f'match {m.score:.2f}:', base.FAINT), (m.text, base.INK)]
          for m in result.match])
    own = [t.strip() for t in truth.record['texts'] if t.strip()]
    rows, seen = [], set()
    for m in result.match:
      if not m.text.strip() or not own or m.text in seen:
        continue
      seen.add(m.text)
      true = m.text.strip() in own
      mark = (('✓', base.RIGHT) if (m.score > .5) == true else
              ('✗', base.WRONG))
      rows.append([mark, (f'{"own" if true else "other"} text {m.score:.2f}:',
                          base.FAINT), (m.text, base.INK)])
    return base.Drawing(sentences=rows)
