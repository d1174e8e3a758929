"""COCO's AP of a grounding model that is asked for classes by their names."""
from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import detection
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import prompts
from e2e_vlp_jax.tasks import detect

HEADLINES = {'AP': 'AP by names', 'AP50': 'AP50 by names'}
NO_CURVE = detection.METRICS[3:]
GIVES = (*detection.METRICS, 'AP/*')


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, names=(), most=100, most_names=0, per_class=False):
  """AP over the classes of the dataset.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline whose records have objects.
    max_examples: None = all.
    progress: called with the number of examples done.
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
  images, annotations, found = collect(
      predictor, variables, pipeline, names, most, most_names or None,
      max_examples, progress)
  if not annotations:
    return {}
  scores = _average_precision(images, annotations, found, labels.classes)
  if per_class:
    for k, name in enumerate(labels.classes):
      mine = lambda some, k=k: [a for a in some if a['category_id'] == k]
      if mine(annotations):
        one = _average_precision(images, mine(annotations), mine(found),
                                 labels.classes)
        scores[f'AP/{name.replace("/", "_").replace(" ", "_")}'] = one['AP']
  return scores


def _names(names, classes):
  names = list(names) or list(classes)
  if len(names) != len(classes):
    raise errors.UserError(
        f'evals.class_prompts.options.names: {len(names)} names for the '
        f'{len(classes)} classes of the dataset; expected one for each')
  prompts.checked_names(names)
  return names


def _average_precision(images, annotations, found, classes):
  scores = detection.coco_metrics(
      {'images': images,
       'annotations': [{**a, 'id': k + 1} for k, a in enumerate(annotations)],
       'categories': [{'id': i} for i in range(len(classes))]}, found)
  return {k: v for k, v in scores.items() if v >= 0}


def collect(predictor, variables, pipeline, names, most, most_names,
            max_examples, progress):
  """Ground truth and detections in the form of COCO's files.

  The names' text features are computed once, for all images.

  Returns:
    (images, annotations, detections): lists of dicts; ids of images are
    example_ids, ids of categories are those of the label space.
  """
  task, labels = predictor.task('ground'), pipeline.labels
  prompt = predictor.prompt(variables, names, most_names)
  images, annotations, found = [], [], []
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    arrays = predictor.run(variables, batch, task, prompt.inputs, most=most)
    for row, i in enumerate(ids.tolist()):
      if i < 0:
        continue
      record = pipeline.record(i)
      images.append({'id': i, 'image_id': record['image_id']})
      annotations += [
          {'image_id': i, 'category_id': o['class_id'], 'area': o['area'],
           'bbox': detection.corner_and_size(o['box']),
           'iscrowd': int(o['is_crowd'])}
          for o in detect.ground_truth(record, labels)]
      found += [
          {'image_id': i, 'category_id': label, 'bbox': box, 'score': score}
          for box, label, score in zip(
              detection.corner_and_size(arrays['boxes'][row].reshape(-1, 4)),
              arrays['labels'][row].reshape(-1).tolist(),
              arrays['scores'][row].reshape(-1).tolist()) if label >= 0]
  return images, annotations, found
