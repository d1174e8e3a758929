"""Visual entailment: how often the right one of three labels is given."""
import collections

from e2e_vlp_jax.evaluation import inputs

HEADLINES = {'accuracy': 'entailment accuracy'}
GIVES = ('accuracy', 'majority', 'accuracy/*')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """Accuracy of SNLI-VE.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline of unit 'entailment'.
    max_examples: None = all.
    progress: called with the number of examples done.

  Returns:
    {'accuracy', 'majority'} and 'accuracy/LABEL', the same of the texts with
    this label. `majority` is the accuracy of always giving the most frequent
    label. Empty without labels.
  """
  task = predictor.task('entail')
  right = collections.defaultdict(list)  # {label: [whether it was found]}
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    best = predictor.run(variables, batch, task)['scores'][:, 0].argmax(-1)
    for k, example_id in zip(best.tolist(), ids.tolist()):
      if example_id >= 0:
        record, item = pipeline.unit(example_id)
        label = record['entailment'][item]['label']
        if label:
          right[label].append(label == task.labels[k])
  count = sum(map(len, right.values()))
  if not count:
    return {}
  return {'accuracy': sum(map(sum, right.values())) / count,
          'majority': max(map(len, right.values())) / count,
          **{f'accuracy/{label}': sum(r) / len(r)
             for label, r in sorted(right.items())}}
