"""Masked-LM accuracy with the image and with a blank one."""
import numpy as np

from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.tasks import base

HEADLINES = {'accuracy': 'MLM accuracy', 'image_gain': 'MLM image gain'}
NO_CURVE = ('image_gain',)
GIVES = ('accuracy', 'accuracy_blank_image', 'image_gain')


class FillIn(base.Task):
  """The most likely token at every position of the masked texts: [B, S, L]."""
  requests = {'joint_masked': ('mlm',)}
  keys = ('image', 'image_mask', 'masked_text', 'masked_text_mask')

  def outputs(self, outputs, batch):
    del batch
    return {'tokens': outputs['joint_masked']['mlm_logits'].argmax(-1)}


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """Accuracy of the predicted tokens, with the image and with a blank one.

  The blank image has the model's mean colour, so the model can only use the
  text.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline whose pp has mlm.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'accuracy', 'accuracy_blank_image', 'image_gain' (their difference)};
    {} if the dataset has no texts.
  """
  mean = np.uint8(np.round(np.array(predictor.config.model.image_mean) * 255))
  right, count = np.zeros(2), 0
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    labels = np.where((ids >= 0)[:, None, None],
                      predictor.gather(batch, 'mlm_labels'), -1)
    blank = {**batch, 'image': np.broadcast_to(mean, batch['image'].shape)}
    for k, one in enumerate((batch, blank)):
      tokens = predictor.run(variables, one, FillIn())['tokens']
      right[k] += ((tokens == labels) & (labels >= 0)).sum()
    count += (labels >= 0).sum()
  if not count:
    return {}
  with_image, without = (right / count).tolist()
  return {'accuracy': with_image, 'accuracy_blank_image': without,
          'image_gain': with_image - without}
