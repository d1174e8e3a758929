"""Captions written from the image alone, against the human ones."""
import json

from e2e_vlp_jax.data.datasets.scenes import facts as scene_facts
from e2e_vlp_jax.evaluation import caption_metrics
from e2e_vlp_jax.evaluation import predictor as predictor_lib


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """BLEU, ROUGE-L and CIDEr; on scenes also whether captions are true.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; references are all texts of a record.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'BLEU1'..'BLEU4', 'ROUGE_L', 'CIDEr'}, and 'facts_right' where records
    have a scene graph: the share of captions whose every stated object,
    attribute, count and relation is true of the scene.
  """
  captions, references, truths = [], [], []
  for batch, ids in predictor_lib.batches(predictor, pipeline, max_examples,
                                          progress):
    for (text, _), example_id in zip(predictor.caption(variables, batch),
                                     ids):
      record = pipeline.record(example_id) if example_id >= 0 else {}
      texts = [t for t in record.get('texts', ()) if t.strip()]
      if texts:
        captions.append(text)
        references.append(texts)
        if record['scene_json']:
          truths.append(scene_facts.check_caption(
              text, json.loads(record['scene_json']))['right'])
  if not captions:
    return {}
  scores, _ = caption_metrics.caption_metrics(captions, references)
  if truths:
    scores['facts_right'] = sum(truths) / len(truths)
  return scores
