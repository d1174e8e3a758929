"""Vectors of images and texts, for search (models with an ITC head)."""
import dataclasses

import jax.numpy as jnp

from e2e_vlp_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Embedded:
  """A text, its vector (length 1), and the ITC logit with the image."""
  text: str
  vector: list
  score: float


@dataclasses.dataclass(frozen=True)
class Result(base.Result):
  """`vector`: the image's, with the logit scale as length; `texts`: `Embedded`.

  The dot product of an image's and a text's vector is their ITC logit.
  """
  vector: list
  texts: list


class Task(base.Task):
  """Vectors from the ITC heads of the two trunks."""
  summary = 'vectors of the image and of texts, for search'
  requests = {'image_only': ('itc',), 'text_only': ('itc',)}
  keys = ('image', 'image_mask', 'text', 'text_mask')
  takes_text = True
  in_samples = False

  def compute(self, predictor, variables, batch):
    """{'images': [B, E]} and, where there are texts, {'texts': [B, S, E]}."""
    requests = {view: heads for view, heads in self.requests.items()
                if view != 'text_only' or 'text' in batch}
    found = predictor.model.apply(variables, batch, requests)
    image = found['image_only']
    out = {'images': image['image_embedding'] * image['itc_scale']}
    if 'text_only' in found:
      out['texts'] = found['text_only']['text_embedding']
    return {k: v.astype(jnp.float32) for k, v in out.items()}

  def result(self, predictor, arrays, size, texts):
    image = arrays['images']
    return Result(self.name, *size, image.tolist(), [
        Embedded(t, v.tolist(), float(image @ v))
        for t, v in zip(texts, arrays.get('texts', ()))])
