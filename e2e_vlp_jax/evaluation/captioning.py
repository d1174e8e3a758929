"""Captions written from the image alone, compared with people's captions."""
import collections

from e2e_vlp_jax.evaluation import caption_metrics
from e2e_vlp_jax.evaluation import dataset_checks
from e2e_vlp_jax.evaluation import inputs

HEADLINES = {'CIDEr': 'CIDEr', 'facts_right': 'facts right'}
NO_CURVE = ('BLEU1', 'BLEU2', 'BLEU3')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """BLEU, ROUGE-L and CIDEr, and the dataset's own checks.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; references are all texts of a record.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'BLEU1'..'BLEU4', 'ROUGE_L', 'CIDEr'}, and means of the results of the
    dataset's `check_caption`. On scenes that is 'facts_right': the share of
    captions whose every object, attribute, count and relation is true.
  """
  task = predictor.task('caption')
  captions, references = [], []
  checks = collections.defaultdict(list)
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    found = predictor.results(variables, batch, task)
    for result, example_id in zip(found, ids.tolist()):
      record = pipeline.record(example_id) if example_id >= 0 else {}
      texts = [t for t in record.get('texts', ()) if t.strip()]
      if not texts:
        continue
      captions.append(result.caption.text)
      references.append(texts)
      for name, value in dataset_checks.check_caption(
          pipeline, example_id, captions[-1]).items():
        checks[name].append(value)
  if not captions:
    return {}
  scores, _ = caption_metrics.caption_metrics(captions, references)
  return {**scores, **{k: sum(v) / len(v) for k, v in checks.items()}}
