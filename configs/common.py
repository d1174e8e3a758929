"""Parts shared by all training configs: arguments, run keys, data, evaluators.

Every key is explained where it is set, here or in the system's config.
"""
import re

import ml_collections
from ml_collections.config_dict import placeholder

from e2e_vlp_jax import errors

# Datasets whose objects have names of a shipped label space, or that have no
# objects. All others bring their own names.
SHIPPED = ('scenes', 'coco', 'visual_genome', 'nlvr1', 'vqav2', 'refcoco',
           'flickr30k_entities')
_NO_OBJECTS = ('sbu', 'cc3m', 'karpathy', 'flickr30k')


def parse_argument(arg, sizes, published, **more):
  """'r50,data=coco,side=512' -> ('r50', 'coco', {'side': 512}).

  Args:
    arg: 'SIZE[,key=value...]' with the keys data, side, exclude and probe (see
      `finish`) and those of `more`; None or '' = the first size.
    sizes: names of the sizes, 'tiny' first. The default of `data` is scenes
      for tiny, coco for the other sizes.
    published: datasets for which data=published stands.
    **more: {key: its type}.

  Raises:
    ValueError: anything else; suggests the nearest choice.
  """
  size, *pairs = (arg or sizes[0]).split(',')
  if size not in sizes:
    raise ValueError(f'no size {size!r}' + errors.nearest(size, sizes))
  options = parse_options(pairs, {'data': str, 'side': int, 'exclude': str,
                                  'probe': int, **more})
  data = options.pop('data', 'scenes' if size == 'tiny' else 'coco')
  if data == 'published':
    data = published
  dataset_names(data)
  return size, data, options


def dataset_names(data):
  """'coco+mine' -> ['coco', 'mine'].

  Raises:
    ValueError: not of that form. Whether the datasets are prepared is checked
      when their folder is known.
  """
  names = data.split('+')
  if not all(re.fullmatch('[a-z][a-z0-9_]*', name) for name in names):
    raise ValueError(f'data: {data!r}; expected the name of a prepared '
                     "dataset, or several joined by '+'")
  return names


def labels(names, default):
  """`data.labels` of a mixture.

  Args:
    names: datasets of the mixture.
    default: the shipped label space if `names` begins with a dataset whose
      names it has. If not, the space is the one that was prepared with the
      datasets.
  """
  known = (*SHIPPED, *_NO_OBJECTS)
  if names[0] not in known:
    return 'prepared'
  return default if set(names) <= set(known) else f'{default}+prepared'


def parse_options(pairs, keys):
  """['side=512'] -> {'side': 512}.

  Args:
    pairs: texts 'key=value'.
    keys: {key: its type}.

  Raises:
    ValueError: another key, or a value of another type.
  """
  options = {}
  for pair in pairs:
    key, _, text = pair.partition('=')
    if key not in keys:
      hint = ("; datasets are joined by '+'" if key == pair and 'data' in keys
              else '')
      raise ValueError(f'no argument {key!r}' + errors.nearest(key, keys)
                       + hint)
    try:
      options[key] = keys[key](text)
    except ValueError:
      raise ValueError(f'{key}: found {text!r}, expected a whole number'
                       ) from None
  return options


def put(config, key, value):
  """Sets a dotted key of a config, which may not have it yet."""
  *groups, name = key.split('.')
  for group in groups:
    if group not in config:
      config[group] = {}
    config = config[group]
  config[name] = value


def run_defaults():
  """The keys of every run; the systems set objectives, model and optim."""
  config = ml_collections.ConfigDict()
  config.seed = 0                # for parameters, order of examples, dropout
  config.dtype = 'float32'       # for computation; parameters are float32
  config.accumulate = 1          # micro-batches per step
  config.ema_decay = 0.          # 0 = no averaged parameters
  config.max_bad_steps = 10      # non-finite updates in a row that end a run
  config.init_from = placeholder(str)  # a checkpoint to start from
  # Devices along each axis; -1 = the rest. `data` and `fsdp` split the batch,
  # `fsdp` parameters and optimizer state, `tensor` those in sharding_rules.
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  # ((regex of a parameter, its axes), ...); others are split by fsdp if large.
  config.sharding_rules = ()
  config.checkpoint = dict(
      every_steps=1000,          # 0 = never; the last step is always saved
      # Whichever comes first, as of the next log line; 0 = never. It bounds
      # what is lost without notice: a preemption, a crash. Our choice.
      every_minutes=10.,
      keep=2,                    # how many of the newest to keep;
      keep_every=0,              # also keep its multiples (0 = none)
      best='')                   # and the best, such as 'eval/itm/accuracy'
  # End the run when so many evaluations in a row (at eval_every_steps) did not
  # improve a metric, such as 'eval/itm/accuracy'; patience 0 = never.
  config.early_stop = dict(metric='', patience=0)
  # Trace `steps` steps from step `start` on; 0 = only when the file
  # WORKDIR/profile_now is created.
  config.profile = dict(start=0, steps=5)
  config.tensorboard = True
  config.log_every_steps = 50
  config.eval_every_steps = 10_000  # 0 = only after the last step
  config.eval_batch_size = 32
  return config


def warm_start(schedule, steps=0):
  """First `steps` steps with other objectives and their own learning rate.

  The papers start from ImageNet weights. A run from scratch can instead first
  train its trunk to classify the object in each grid cell. steps=0 turns it
  off. All other settings of the optimizer are those of `optim`.

  Args:
    schedule: only the keys of a schedule.
    steps: number of steps.
  """
  return dict(steps=steps, objectives=dict(grid_classes=1.),
              schedule=schedule)


def data(names, *, tokenizer, labels, buckets, max_text, max_boxes, sentences,
         pp_train, pp_eval, weight='by_rows'):
  """The input of a training run.

  Args:
    names: datasets of the mixture.
    tokenizer: dict of kind (wordpiece | bpe | sentencepiece) and path (a
      shipped vocabulary or files).
    labels: label space: a shipped one, a JSON file, or 'prepared', those that
      were prepared with the datasets (see `e2e_vlp_jax.data.label_space`).
    buckets: (height, width) choices for the images of a batch.
    max_text, max_boxes: maximum tokens of a text, boxes of an image.
    sentences: number of texts sampled per image.
    pp_train, pp_eval: ops that make a row of a batch, in training, and for
      sample pictures and `predict`.
    weight: weight of each dataset of a mixture: 'by_rows' shows every row once
      per epoch, 'by_texts' every text; or a number.
  """
  return dict(
      dir='data',                # where `prepare` wrote
      train=tuple(dict(name=name, split='dev' if name == 'nlvr1' else 'train',
                       weight=weight if names[1:] else 1.) for name in names),
      unit='image',              # what a row shows
      tokenizer=tokenizer, labels=labels, buckets=buckets, max_text=max_text,
      sentences=sentences, max_boxes=max_boxes,
      max_attributes=4,          # per box
      # Prepared splits, such as ('karpathy/test',), whose photographs, by
      # their official ids, no training batch shows.
      exclude=(),
      threads=0,                 # of the input pipeline; 0 = as many as cores
      max_bad_records=100,       # unreadable records to skip before it ends
      pp_train=pp_train, pp_eval=pp_eval)


def held_out(name):
  """The split of a dataset on which pre-training is evaluated."""
  return dict(name=name, split='test' if name in ('scenes', 'nlvr1')
              else 'validation')


def evaluator(kind, source, pp, examples=1000, during_training=128):
  """One of `evals`.

  Args:
    kind: file of e2e_vlp_jax/evaluation.
    source: dict of name and split.
    pp: ops that make a row of a batch.
    examples: maximum number of examples at the end; 0 = all.
    during_training: the same at eval_every_steps; 0 = none.
  """
  return dict(type=kind, source=source, pp=pp, max_examples=examples,
              examples_during_training=during_training)


def evaluate(config, names, unseen=False, **pp):
  """Sets `evals` and `samples`, on the first dataset of a mixture.

  Args:
    config: is changed.
    names: datasets of the mixture.
    unseen: also evaluate on the colour-shape pairs that scenes' training never
      shows.
    **pp: {evaluator: ops that make a row of its batches}.
  """
  source = held_out(names[0])
  config.evals = {kind: evaluator(kind, source, ops)
                  for kind, ops in pp.items()}
  if unseen:
    pairs = dict(name='scenes', split='unseen')
    config.evals.update({f'{kind}_unseen': evaluator(kind, pairs, ops, 500, 0)
                         for kind, ops in pp.items()})
  # Sample pictures of predictions at each evaluation.
  config.samples = dict(count=12, source=source)


def finish(config, options):
  """Applies the arguments that all systems share.

  Args:
    config: is changed.
    options: from `parse_argument`. exclude: prepared splits, joined by '+',
      whose photographs no training batch shows. probe: also evaluate a linear
      probe of the frozen image features, on so many images.
  """
  config.data.exclude = tuple(filter(None, options.get('exclude', '').split(
      '+')))
  examples = options.get('probe', 0)
  if examples < 0:
    raise ValueError(f'probe: {examples}; expected a number of examples')
  if examples:
    config.evals.linear_probe = evaluator(
        'linear_probe', config.samples.source, config.data.pp_eval, examples,
        examples)


def tiny(config, *, no_decay, total_steps=4000, warm_steps=800,
         learning_rate=8e-4, warmup_steps=160, warmup_init=None, b2=.999,
         **optim):
  """Run and optimizer of a `tiny` size, from scratch; all our choice.

  Args:
    config: is changed.
    no_decay: regex of the parameters without weight decay.
    total_steps, warm_steps: steps of the run, including the warm start's.
    learning_rate, warmup_steps, warmup_init, b2, **optim: keys of `optim`.
  """
  config.model.update(dict(image_mean=(.4,) * 3, image_std=(.333,) * 3,
                           text_pool='mean', remat='none'))
  config.batch_size = 16
  config.eval_batch_size = 64
  config.eval_every_steps = 1000
  config.checkpoint.every_steps = 250
  config.total_steps = total_steps
  schedule = dict(schedule='cosine', final_fraction=.02)
  if warmup_init is not None:
    schedule['warmup_init'] = warmup_init
  config.optim = dict(
      schedule, learning_rate=learning_rate, warmup_steps=warmup_steps,
      b1=.9, b2=b2, eps=1e-8, weight_decay=.01, clip_norm=1.,
      groups=((no_decay, dict(weight_decay=0.)), (r'.*', dict())), **optim)
  config.warm_start = warm_start(
      dict(schedule, learning_rate=2e-3, warmup_steps=20), warm_steps)
