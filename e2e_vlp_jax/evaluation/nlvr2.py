"""Statements about two images: accuracy and consistency of NLVR2."""
import collections
import csv
import io
import logging
import os

import jax

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.evaluation import inputs

HEADLINES = {'accuracy': 'statements judged rightly',
             'consistency': 'sentences judged rightly throughout'}
GIVES = ('accuracy', 'consistency', 'majority')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, submission=''):
  """Accuracy and consistency, equal to those of the official tool.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline of unit 'statement'.
    max_examples: None = all.
    progress: called with the number of examples done.
    submission: path of the official predictions file to write; '' = none.

  Returns:
    {'accuracy', 'majority', 'consistency'}. `majority` is the accuracy of
    always giving the more frequent label. `consistency` is the share of
    sentences with all their images judged rightly, and is there if the dataset
    says which statements are the same sentence. Empty without labels.

  Raises:
    UserError: a submission for statements without official identifiers, or a
      file that cannot be written.
  """
  if submission and not jax.process_index():
    # Now, as judging takes long.
    files.check_folder('submission',
                       os.path.dirname(os.path.abspath(submission)))
  task = predictor.task('reason')
  predictions, labels, right, groups = [], [], [], []
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    scores = predictor.run(variables, batch, task)['scores'][:, 0]
    for score, example_id in zip(scores.tolist(), ids.tolist()):
      if example_id < 0:
        continue
      record, k = pipeline.unit(example_id)
      statement, said = record['statements'][k], score > .5
      if submission and not statement['identifier']:
        raise errors.UserError(f'submission: {pipeline.name(example_id)} has '
                               'no official identifier')
      predictions.append((statement['identifier'], said))
      if statement['has_label']:
        labels.append(statement['label'])
        right.append(said == statement['label'])
        groups.append(statement['group'])
  if submission:
    write_submission(submission, predictions, pipeline.num_examples)
  if not labels:
    return {}
  scores = {'accuracy': sum(right) / len(right),
            'majority': max(collections.Counter(labels).values())
                        / len(labels)}
  if all(groups):
    scores['consistency'] = consistency(right, groups)
  return scores


def consistency(right, groups):
  """The share of groups of which all members are right.

  Args:
    right: list of n bools.
    groups: list of n names.
  """
  whole = {}
  for r, group in zip(right, groups, strict=True):
    whole[group] = whole.get(group, True) and r
  return sum(whole.values()) / len(whole)


def write_submission(path, predictions, expected):
  """Writes the file that the official tool reads: identifier,True or False.

  Args:
    path: path of the file.
    predictions: list of (identifier, bool).
    expected: number of statements of the split. If some are missing, it warns,
      because the tool then gives no score.

  Raises:
    UserError: the file cannot be written.
  """
  if len(predictions) < expected:
    logging.warning('%s: predictions for %d of %d statements', path,
                    len(predictions), expected)
  if not jax.process_index():
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(predictions)
    files.write(path, out.getvalue())
