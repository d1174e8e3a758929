"""Image-text matching: accuracy on true and swapped pairs."""
import numpy as np

from e2e_vlp_jax.evaluation import inputs

HEADLINES = {'accuracy': 'ITM accuracy'}
GIVES = ('accuracy',)


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """Accuracy on true and swapped pairs.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline whose pp has itm and no mlm.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'accuracy'}: the share of pairs classified correctly, at 0.5; {} if the
    dataset has no texts.
  """
  task = predictor.task('match')
  right = pairs = 0
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    scores = predictor.run(variables, {
        **batch, 'text': batch['masked_text'],
        'text_mask': batch['masked_text_mask']}, task)['scores']
    labels = np.where((ids >= 0)[:, None],
                      predictor.gather(batch, 'itm_labels'), -1)
    right += int((((scores > .5) == labels) & (labels >= 0)).sum())
    pairs += int((labels >= 0).sum())
  return {'accuracy': right / pairs} if pairs else {}
