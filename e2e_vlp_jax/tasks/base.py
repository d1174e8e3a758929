"""The contract of a task: its inputs, its computation, its results.

A task is one file of this package with a class `Task(base.Task)`. Commands,
the Predictor and the pictures find it by the file's name.

- `compute` turns a batch into arrays. It is compiled once per shape of a batch
  and runs on the accelerator.
- `result` turns one image's arrays into a `Result`, whose fields are the keys
  of the JSON.
- `draw` puts a result into a picture.
- `finetuning` describes how a model is trained for the task.

No import of this module needs jax or TensorFlow, so that configs can read it.
"""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors

_PACKAGE = 'e2e_vlp_jax.tasks'

# Colours of a picture.
RIGHT, WRONG, TRUTH = '#2fbf5b', '#f0524d', '#ffffff'
INK, FAINT = '#e8eaed', '#9aa3ad'
# Without ground truth: one colour per box, distinct on most photographs.
COLOURS = ('#4cc2ff', '#ffb02e', '#ff6ec7', '#7ee787', '#c49bff', '#ffd84d',
           '#ff8a5c', '#5ce0d0')


def names():
  """Names of all tasks, sorted."""
  return [n for n in discovery.names(_PACKAGE, 'Task') if n != 'base']


def load(name, key='task'):
  """Finds a task by name.

  Args:
    name: name of a file of this package.
    key: argument or config key that contains `name`, for the error message.

  Raises:
    UserError: no such task; suggests the nearest name. Or a file whose class
      lacks what a task must have.
  """
  if name not in names():
    raise errors.UserError(f'{key}: no task {name!r}'
                           + errors.nearest(name, names()))
  task = discovery.load(_PACKAGE, name, 'Task', key)()
  lacking = list(_missing(type(task)))
  if not task.requests:
    lacking.insert(0, 'requests {view: (head, ...)}')
  if lacking:
    raise errors.UserError(f'tasks/{name}.py: class Task lacks '
                           + ', '.join(lacking))
  return task


def place_image(pp, ops):
  """The image's ops of a pp string, up to the one that places it, then `ops`.

  Args:
    pp: pp string.
    ops: pp string of what follows.
  """
  found = pp.split('|')
  last, = [i for i, op in enumerate(found)
           if op.partition('(')[0] in ('fit', 'squash')]
  return '|'.join([*found[:last + 1], ops])


def _missing(cls):
  """Names of the methods that a task class must override and does not."""
  own = lambda method: getattr(cls, method) is not getattr(Task, method)
  if not own('compute') and not own('outputs'):
    yield 'outputs'
  if not own('result'):
    yield 'result'
  if cls.needs_text and cls.in_samples and not own('sample_texts'):
    yield 'sample_texts (or in_samples = False)'


@dataclasses.dataclass(frozen=True)
class Finetuning:
  """How a model is trained for a task; plain data for configs.

  Attributes:
    unit: what a row of a batch shows (`config.data.unit`).
    objectives: {name: weight}.
    head: options of `config.model.heads[<task>]`, or None if the models have
      the head anyway.
    train_ops, eval_ops: pp ops that follow those of the image.
    evaluator: type of the evaluator.
    metric: the evaluator's metric that selects the best checkpoint.
    data: default dataset.
    splits: {dataset: (split to train on, split to evaluate)}.
    answers: {dataset: name of its answer list}.
    classes: whether own datasets bring their classes along.
  """
  unit: str
  objectives: Mapping[str, float]
  train_ops: str
  eval_ops: str
  evaluator: str
  metric: str
  data: str
  splits: Mapping[str, tuple[str, str]]
  head: Mapping[str, Any] | None = None
  answers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  classes: bool = False

  def evaluation(self, datasets, pp):
    """The task's evaluator, as an entry of `config.evals`.

    Args:
      datasets: names of the datasets that the model was trained on. The first
        one that the task knows is evaluated, or else the task's own default.
      pp: `data.pp_eval`.
    """
    name = next((n for n in datasets if n in self.splits), self.data)
    return dict(type=self.evaluator, unit=self.unit, max_examples=0,
                examples_during_training=0, pp=place_image(pp, self.eval_ops),
                source=dict(name=name, split=self.splits[name][1]))


@dataclasses.dataclass(frozen=True)
class Option:
  """An option of a task, in Python and on the command line (`--name`).

  Attributes:
    default: default value, of the option's type.
    help: one line.
    least, most: limits of the value; None = no limit.
    compiled: whether another value needs another compiled program.
  """
  default: Any
  help: str
  least: float | None = None
  most: float | None = None
  compiled: bool = False

  def check(self, name, value):
    """UserError unless `value` lies within the limits."""
    low, high = self.least, self.most
    # NaN is within no limits.
    if not ((low is None or value >= low) and (high is None or value <= high)):
      limits = (f'{low} to {high}' if None not in (low, high) else
                f'at least {low}' if high is None else f'at most {high}')
      raise errors.UserError(f'--{name}: {value}; expected {limits}')


@dataclasses.dataclass(frozen=True)
class CutText:
  """A text that is longer than the model reads.

  Attributes:
    text: the whole text.
    tokens: its number of tokens, with the one before and the one after it.
    max_text: how many of them the model reads.
    read: the part of the text that the model reads.
  """
  text: str
  tokens: int
  max_text: int
  read: str


@dataclasses.dataclass(frozen=True)
class Result:
  """What a task found in one image; a subclass adds the task's own fields.

  Attributes:
    task: name of the task.
    height, width: size of the upright original in pixels.
    cut_texts: `CutText`s of the request's texts, set by the Predictor.
  """
  task: str
  height: int
  width: int
  cut_texts: Sequence[CutText] = dataclasses.field(default=(), kw_only=True)

  def to_json(self):
    """A JSON-able dict: task, image, the task's own fields, any `cut_texts`."""
    fields = dataclasses.asdict(self)
    cut = {'cut_texts': list(fields.pop('cut_texts'))}
    return {'task': fields.pop('task'),
            'image': {k: fields.pop(k) for k in ('height', 'width')},
            **fields, **(cut if self.cut_texts else {})}


@dataclasses.dataclass(frozen=True)
class Truth:
  """The ground truth of an image.

  Attributes:
    record: record of a dataset, see `datasets.base`.
    labels: a `label_space.LabelSpace`.
    check_caption: function text -> whether all that it states is true of the
      image; None if the dataset cannot tell.
  """
  record: Mapping[str, Any]
  labels: Any
  check_caption: Callable[[str], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Box:
  """A box to draw.

  Attributes:
    box: x0, y0, x1, y1 in pixels of the image.
    colour: colour of its lines.
    tag: text beside it; '' = none.
    style: 'bold', 'thin' or 'dashed'.
  """
  box: Sequence[float]
  colour: str
  tag: str = ''
  style: str = 'bold'


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A task's part of a picture.

  Attributes:
    boxes: `Box`es on the image; later ones lie on top.
    sentences: rows below the image: lists of (text, colour).
    legend: rows that describe the boxes, below all tasks' sentences.
  """
  boxes: Sequence[Box] = ()
  sentences: Sequence[Any] = ()
  legend: Sequence[Any] = ()


def _check_text(text):
  """UserError unless `text` is a string that UTF-8 can hold."""
  try:
    if not isinstance(text, str):
      raise errors.UserError(f'texts: {text!r} is a {type(text).__name__}; '
                             'expected a string')
    text.encode()
  except UnicodeEncodeError as e:
    # Half of an emoji, or a command line in another encoding.
    raise errors.UserError(
        f'text {text!r} is not UTF-8: {text[e.start]!r} at {e.start}; expected '
        'whole characters (--text)') from e


class Task:
  """A task; subclasses override what differs from these defaults.

  Attributes:
    summary: one line for --help.
    requests: {view: (head, ...)} that the model must offer and runs.
    keys: keys of the batch that `compute` reads, if the batch has them.
    images: how many images a request may have: with 2, a second one is under
      `second_image` in the batch, and masked where a request has only one.
    takes_text: whether texts may be given.
    needs_text: whether texts must be given.
    options: {name: Option}.
    in_samples: whether the sample pictures of a run show the task.
    finetuning: a `Finetuning`, or None.
    alternatives: others, for models that lack the heads of `finetuning`.
  """
  summary = ''
  requests: Mapping[str, Sequence[str]] = {}
  keys: Sequence[str] = ('image', 'image_mask')
  images = 1
  takes_text = needs_text = False
  options: Mapping[str, Option] = {}
  in_samples = True
  finetuning: Finetuning | None = None
  alternatives: Sequence[Finetuning] = ()

  @property
  def name(self):
    """Name of the task: that of its file."""
    return type(self).__module__.rpartition('.')[2]

  @property
  def ways(self):
    """All `Finetuning`s, `finetuning` first."""
    return (self.finetuning, *self.alternatives) if self.finetuning else ()

  def lacks(self, model):
    """Heads that the task needs and the model does not offer, sorted."""
    return sorted({head for view, heads in self.requests.items()
                   for head in heads if not model.offers(view, head)})

  def train_command(self, checkpoint):
    """The command that trains the task's head, from a checkpoint.

    Args:
      checkpoint: its path.

    Returns:
      'python -m ...', or '' if no command of ours can train it.
    """
    if self.finetuning is None:
      return ''
    return (f'python -m e2e_vlp_jax.train --config configs/finetune.py:'
            f'{self.name},from={checkpoint} --workdir W')

  def full_options(self, options):
    """`options` and the defaults of the others.

    Raises:
      UserError: an unknown option, or a value beyond its limits.
    """
    for name, value in options.items():
      if name not in self.options:
        raise errors.UserError(
            f'--{name}: task {self.name!r} has no such option'
            + (errors.nearest(name, self.options) if self.options else ''))
      self.options[name].check(name, value)
    return {k: options.get(k, o.default) for k, o in self.options.items()}

  def check_images(self, images):
    """Each request's images as a tuple.

    Args:
      images: for each request an image, or a list or tuple of 1 to
        `self.images` images; an image is anything else.

    Raises:
      UserError: a request with too many images, or with none.
    """
    found = [tuple(i) if isinstance(i, (list, tuple)) else (i,)
             for i in images]
    for own in found:
      if not 1 <= len(own) <= self.images:
        raise errors.UserError(
            f'images: {len(own)} for one result; task {self.name!r} takes '
            + ('one' if self.images == 1 else f'1 to {self.images}'))
    return found

  def group_images(self, images):
    """A flat list of images, such as a command's, as one tuple a request.

    Up to `self.images` images are one request.

    Raises:
      UserError: more images than that, and no multiple of it.
    """
    n = min(self.images, len(images))
    if len(images) % n:
      raise errors.UserError(
          f'--image: {len(images)} images; task {self.name!r} takes '
          f'{n} of them for each result, so give 1 or a multiple of {n}')
    return [tuple(images[i:i + n]) for i in range(0, len(images), n)]

  def check_texts(self, texts, count, options=None):
    """The texts as one list of strings for each of `count` images.

    Args:
      texts: None, a list of strings for every image, or a list of `count`
        lists of strings.
      count: number of images.
      options: of the task; one of them may stand for texts.

    Raises:
      UserError: the task takes no texts, or needs one and gets none, the
        number of lists is wrong, or a text is not UTF-8.
    """
    del options
    texts = list(texts or ()) if not isinstance(texts, str) else [texts]
    each = (texts if texts and isinstance(texts[0], (list, tuple))
            else [texts] * count)
    if len(each) != count:
      raise errors.UserError(f'texts: {len(each)} lists for {count} images')
    for text in [t for own in each for t in own]:
      _check_text(text)
    if any(each) and not self.takes_text:
      raise errors.UserError(f'task {self.name!r} takes no text (--text)')
    if self.needs_text and not all(t and all(map(str.strip, t))
                                   for t in each):
      raise errors.UserError(f'task {self.name!r} needs a text (--text)')
    return each

  def plain_text(self, text):
    """What the model reads of a text; marks of the task's own are removed."""
    return text

  def text_inputs(self, predictor, texts, count):
    """The keys of a batch's row that are made of an image's texts.

    Args:
      predictor: as in `compute`.
      texts: list of strings, at most `count`.
      count: P, to which they are padded.

    Returns:
      dict of numpy arrays; their shapes depend on `count` alone.
    """
    ids, mask = predictor.tokenize(texts, count)
    return {'text': ids, 'text_mask': mask}

  def fixed_inputs(self, predictor, variables, options):
    """What is the same for all images, such as features of a fixed text.

    It is computed once for all batches of a call.

    Returns:
      dict of arrays [1, ...], which `compute` finds in its batch.
    """
    del predictor, variables, options
    return {}

  def compute(self, predictor, variables, batch, **options):
    """The computation on the accelerator; traced by jax.jit.

    Args:
      predictor: an `evaluation.predictor.Predictor`: model, config and
        vocabularies.
      variables: {'params': ..., **model_state}.
      batch: the batch's `keys`, and the `fixed_inputs`.
      **options: the compiled options.

    Returns:
      dict of arrays [B, ...].
    """
    del options
    return self.outputs(
        predictor.model.apply(variables, batch, self.requests), batch)

  def outputs(self, outputs, batch):
    """The model's outputs {view: {name: array}} -> dict of arrays [B, ...]."""
    raise NotImplementedError

  def result(self, predictor, arrays, size, texts, **options):
    """Builds the `Result` of one image.

    Args:
      predictor: as in `compute`.
      arrays: this image's numpy arrays.
      size: (height, width) of the upright original.
      texts: list of the texts in the request.
      **options: the options that are not compiled.
    """
    raise NotImplementedError

  def sample_texts(self, records):
    """Texts for sample pictures.

    Args:
      records: list of B records, None for rows of padding. `item` in a record
        is the number of the row's item in the list of `config.data.unit`.

    Returns:
      list of B lists of strings, all of the same length.
    """
    raise NotImplementedError

  def draw(self, result, truth=None):
    """A `Drawing` of a result.

    Args:
      result: a `Result`, or None to draw only the truth.
      truth: a `Truth`, or None if it is unknown.
    """
    del result, truth
    return Drawing()
