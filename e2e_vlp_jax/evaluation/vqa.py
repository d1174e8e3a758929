"""Visual question answering: the official accuracy, and the results file."""
import json
import logging
import os

import jax

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.data import vqa_answers
from e2e_vlp_jax.evaluation import inputs

HEADLINES = {'accuracy': 'VQA accuracy'}
GIVES = ('accuracy', 'accuracy/*')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, question_types=False, submission=''):
  """Accuracy of VQA v2, with the official normalisation.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline of unit 'question'.
    max_examples: None = all.
    progress: called with the number of examples done.
    question_types: also the accuracy of each official question type.
    submission: path of the official results file to write; '' = none.

  Returns:
    {'accuracy'}, 'accuracy/KIND' of each kind of question ('yes_no', 'number',
    'other' in VQA v2) and, if asked for, 'accuracy/type/BEGINNING' (such as
    'what_color_is_the'). Empty if there are no answers, as in test splits.

  Raises:
    UserError: a submission for questions without official ids, or a file that
      cannot be written.
  """
  if submission and not jax.process_index():
    # Now, as answering takes long.
    files.check_folder('submission',
                       os.path.dirname(os.path.abspath(submission)))
  task = predictor.task('answer')
  names = predictor.vocabularies.answers.answers
  accuracies, kinds, types, results = [], [], [], []
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    found = predictor.run(variables, batch, task, answers=1)['ids'][:, 0, 0]
    for answer_id, example_id in zip(found.tolist(), ids.tolist()):
      if example_id < 0:
        continue
      record, k = pipeline.unit(example_id)
      question, answer = record['questions'][k], names[answer_id]
      if submission and question['id'] < 0:
        raise errors.UserError(f'submission: {pipeline.name(example_id)} has '
                               'no official id')
      results.append({'question_id': question['id'], 'answer': answer})
      if question['answers']:
        accuracies.append(vqa_answers.accuracy(answer, question['answers']))
        kinds.append(question['kind'])
        types.append(vqa_answers.question_type(question['question']))
  if submission:
    write_submission(submission, results, pipeline.num_examples)
  if not accuracies:
    return {}
  scores = {'accuracy': sum(accuracies) / len(accuracies),
            **means(accuracies, kinds, 'accuracy/')}
  if question_types:
    scores |= means(accuracies, types, 'accuracy/type/')
  return scores


def means(values, groups, prefix):
  """Mean of each group.

  Args:
    values: list of n numbers.
    groups: list of n names; '' = in no group.
    prefix: prefix of the metrics' names.

  Returns:
    {prefix + name: mean}, sorted; names without spaces and slashes.
  """
  found = {}
  for value, group in zip(values, groups, strict=True):
    if group:
      name = prefix + group.replace(' ', '_').replace('/', '_')
      found.setdefault(name, []).append(value)
  return {name: sum(v) / len(v) for name, v in sorted(found.items())}


def write_submission(path, results, expected):
  """Writes the results file for the official evaluation server.

  Args:
    path: path of the file.
    results: list of {'question_id', 'answer'}.
    expected: number of questions of the split. If some are missing, it warns,
      because the server refuses such a file.

  Raises:
    UserError: the file cannot be written.
  """
  if len(results) < expected:
    logging.warning('%s: answers to %d of %d questions', path, len(results),
                    expected)
  if not jax.process_index():
    files.write(path, json.dumps(
        sorted(results, key=lambda r: r['question_id'])))
