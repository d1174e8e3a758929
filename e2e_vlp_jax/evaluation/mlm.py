"""Masked words: how many are found, and how many of them by looking."""
import numpy as np

from e2e_vlp_jax.evaluation import predictor as predictor_lib


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """Accuracy of the predicted words, with the image and with a blank one.

  The blank image is the model's mean colour, so that what is left is the
  words' own statistics.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline whose pp has mlm.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'accuracy', 'accuracy_blank_image', 'image_gain' (their difference)}.
  """
  mean = np.uint8(np.round(np.array(predictor.config.model.image_mean) * 255))
  right, words = np.zeros(2), 0
  for batch, ids in predictor_lib.batches(predictor, pipeline, max_examples,
                                          progress):
    labels = np.where((ids >= 0)[:, None, None],
                      predictor.gather(batch, 'mlm_labels'), -1)
    blank = {**batch, 'image': np.broadcast_to(mean, batch['image'].shape)}
    right += [((predictor.mlm(variables, b) == labels) & (labels >= 0)).sum()
              for b in (batch, blank)]
    words += (labels >= 0).sum()
  seen, unseen = (right / max(words, 1)).tolist()
  return {'accuracy': seen, 'accuracy_blank_image': unseen,
          'image_gain': seen - unseen}
