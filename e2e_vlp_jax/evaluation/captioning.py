"""Captions written from the image alone, compared with people's captions."""
import collections
import json
import logging
import os

import jax

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.evaluation import caption_metrics
from e2e_vlp_jax.evaluation import dataset_checks
from e2e_vlp_jax.evaluation import inputs

HEADLINES = {'CIDEr': 'CIDEr', 'facts_right': 'facts right'}
NO_CURVE = ('BLEU1', 'BLEU2', 'BLEU3')
GIVES = (*caption_metrics.METRICS, 'METEOR', 'facts_*')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, beams=1, submission='', meteor=False):
  """BLEU, ROUGE-L and CIDEr, and the dataset's own checks.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; references are all texts of a record.
    max_examples: None = all.
    progress: called with the number of examples done.
    beams: width of the search; 1 = the likeliest token each time.
    submission: path of COCO's results file to write; '' = none.
    meteor: also METEOR, which takes some seconds, where Java and the extra
      `meteor` are installed.

  Returns:
    {'BLEU1'..'BLEU4', 'ROUGE_L', 'CIDEr', 'METEOR'}, and means of the results
    of the dataset's `check_caption`. On scenes that is 'facts_right': the share
    of captions whose every object, attribute, count and relation is true. Empty
    if there are no captions to compare with, as in test splits.

  Raises:
    UserError: the model has no decoder of captions; a submission for images
      without numbers as ids, or a file that cannot be written.
  """
  task = predictor.task('caption')
  if submission and not jax.process_index():
    # Now, as captioning takes long.
    files.check_folder('submission',
                       os.path.dirname(os.path.abspath(submission)))
  captions, references, results = [], [], []
  checks = collections.defaultdict(list)
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    found = predictor.results(variables, batch, task, beams=beams)
    for result, example_id in zip(found, ids.tolist()):
      record = pipeline.record(example_id) if example_id >= 0 else {}
      if record and submission:
        results.append({'image_id': _number(record, pipeline, example_id),
                        'caption': result.caption.text})
      texts = [t for t in record.get('texts', ()) if t.strip()]
      if not texts:
        continue
      captions.append(result.caption.text)
      references.append(texts)
      for name, value in dataset_checks.check_caption(
          pipeline, example_id, captions[-1]).items():
        checks[name].append(value)
  if submission:
    write_submission(submission, results, pipeline.num_examples)
  if not captions:
    return {}
  scores, _ = caption_metrics.caption_metrics(captions, references)
  found = meteor and caption_metrics.meteor(captions, references)
  if found:
    scores['METEOR'], _ = found
  return {**scores, **{k: sum(v) / len(v) for k, v in checks.items()}}


def _number(record, pipeline, example_id):
  """The image's official id, a number."""
  image_id = record['image_id']
  if not (image_id.isascii() and image_id.isdigit()):
    raise errors.UserError(
        f'submission: {pipeline.name(example_id)} has the id {image_id!r}; '
        "COCO's results file expected a number")
  return int(image_id)


def write_submission(path, results, expected):
  """Writes the results file of COCO's caption evaluation.

  Args:
    path: path of the file.
    results: list of {'image_id', 'caption'}.
    expected: number of images of the split. If some are missing, it warns,
      because the official tools want a caption for each.

  Raises:
    UserError: the file cannot be written.
  """
  if len(results) < expected:
    logging.warning('%s: captions of %d of %d images', path, len(results),
                    expected)
  if not jax.process_index():
    files.write(path, json.dumps(
        sorted(results, key=lambda r: r['image_id'])))
