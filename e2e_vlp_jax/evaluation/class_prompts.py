"""COCO's AP of a grounding model that is asked for classes by their names."""
from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import detection_page
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import prompts
from e2e_vlp_jax.tasks import detect

HEADLINES = {'AP': 'AP by names', 'AP50': 'AP50 by names'}
NO_CURVE = detection.METRICS[3:]
GIVES = (*detection.METRICS, 'AP/*')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, details=None, names=(), most=100, most_names=0,
             per_class=False):
  """AP over the classes of the dataset.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline whose records have objects.
    max_examples: None = all.
    progress: called with the number of examples done.
    details: a list, to which the sections of the page are appended.
    names: what each class is called in the prompt, in the order of the label
      space (as in ODinW's prompts); () = its own name.
    most: boxes of a caption that are kept.
    most_names: names of a caption at most; 0 = as many as the model reads.
      Pass it where it was less in training.
    per_class: also 'AP/NAME' of each class.

  Returns:
    the metrics of `detection` that are defined; {} without any object.

  Raises:
    UserError: duplicate or empty names, or another number than the classes.
  """
  labels = pipeline.labels
  if not labels.classes:
    return {}  # The dataset has captions alone.
  names = _names(names, labels.classes)
  kept = collect(predictor, variables, pipeline, names, most,
                 most_names or None, max_examples, progress)
  if not any(one.objects for one in kept):
    return {}
  truth, found = detection.coco_files(kept, len(labels.classes))
  run = detection.coco_run(truth, found)
  if details is not None:
    details += detection_page.sections(kept, run, labels, pipeline)
  scores = {k: v for k, v in detection.named(run).items() if v >= 0}
  if per_class:
    for k, name in enumerate(labels.classes):
      if any(o['class_id'] == k for one in kept for o in one.objects):
        precision = run.eval['precision'][:, :, k, 0, -1]
        scores[f'AP/{name.replace("/", "_").replace(" ", "_")}'] = float(
            precision.mean())
  return scores


def _names(names, classes):
  names = list(names) or list(classes)
  if len(names) != len(classes):
    raise errors.UserError(
        f'evals.class_prompts.options.names: {len(names)} names for the '
        f'{len(classes)} classes of the dataset; expected one for each')
  prompts.checked_names(names)
  return names


def collect(predictor, variables, pipeline, names, most, most_names,
            max_examples, progress):
  """A `detection_page.Found` for each image.

  The names' text features are computed once, for all images.
  """
  task, labels = predictor.task('ground'), pipeline.labels
  prompt = predictor.prompt(variables, names, most_names)
  kept = []
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    arrays = predictor.run(variables, batch, task, prompt.inputs, most=most)
    for row, i in enumerate(ids.tolist()):
      if i >= 0:
        number = arrays['labels'][row].reshape(-1)
        kept.append(detection_page.Found(
            i, detect.ground_truth(pipeline.record(i), labels),
            arrays['boxes'][row].reshape(-1, 4)[number >= 0],
            number[number >= 0], arrays['scores'][row].reshape(-1)[
                number >= 0]))
  return kept
