"""Fine-tunes any system for any task that has a head for it.

  python -m e2e_vlp_jax.train --config configs/finetune.py:TASK,from=W \
      --workdir W2

Argument: TASK,from=CHECKPOINT or TASK,system=NAME[,size=SIZE]; then key=value
  TASK    a file of e2e_vlp_jax/tasks
  from    a WORKDIR or one of its steps, with model, vocabulary and parameters
  system  a config of this folder, from scratch; size is its argument (tiny)
  data    any prepared dataset, or several joined by '+'; by default scenes if
          the checkpoint was trained on them or the size is tiny, else the
          task's default
  side    image side in pixels, as in the system's config

The task defines objectives, data and evaluator. Steps and learning rate come
from configs/recipes/TASK.py, or else from `_schedule` here. Every value can be
overridden: --config.total_steps=500. Measured results: README.
"""
import importlib

import ml_collections

from configs import common
from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import old_names
from e2e_vlp_jax.training import stages

KEYS = {'from': str, 'system': str, 'size': str, 'data': str, 'side': int}


def get_config(arg=None):
  name, *pairs = (arg or '').split(',')
  if not name:
    raise ValueError('no task; expected TASK,from=CHECKPOINT with one of '
                     + ', '.join(_tasks()))
  how = base.load(name, 'TASK').finetuning
  options = common.parse_options(pairs, KEYS)
  if how is None:
    raise ValueError(f'task {name!r} cannot be fine-tuned; those that can: '
                     + ', '.join(_tasks()))
  if ('from' in options) == ('system' in options):
    raise ValueError('expected from=CHECKPOINT, or system=NAME to start from '
                     'scratch, and not both')
  given, data = _start(how, options)
  recipe = _recipe(name, given.model.name, data)
  side = options.get('side', recipe.pop('side', None))

  config = common.run_defaults()
  for key in ('seed', 'dtype', 'sharding_rules', 'model', 'data'):
    config[key] = given[key]
  config.init_from = options.get('from')
  config.model.heads = {name: dict(how.head)} if how.head else {}
  config.objectives = dict(how.objectives)
  config.objective_options = {
      k: given.objective_options.get(k, {}) for k in how.objectives}
  _input(config, how, data, side)
  _schedule(config, given, data, recipe)
  for key, value in recipe.items():
    common.put(config, key, value)
  _drop_unread(config.optim)
  _check(config, name)
  return config


def _tasks():
  """Names of the tasks that can be fine-tuned."""
  return [n for n in base.names() if base.load(n).finetuning is not None]


def _start(how, options):
  """(config of the checkpoint or of the system from scratch, dataset)."""
  if 'from' in options:
    meta = checkpoint_files.meta(options['from'])
    config = ml_collections.ConfigDict(old_names.modernise(
        meta['config'], f'from={options["from"]}'))
    scenes = [s['name'] for s in config.data.train] == ['scenes']
    # The checkpoint's tokenizer, and its labels unless the config has others.
    if 'tokenizer' in config.data:
      del config.data['tokenizer']
    config.data.vocabularies = paths.absolute(options['from'])
    config.data.labels = ''
  else:
    scenes = options.get('size', 'tiny') == 'tiny'
  data = options.get('data') or (
      'scenes' if scenes and 'scenes' in how.splits else how.data)
  names = common.dataset_names(data)
  own = set(names) - set(common.SHIPPED)
  for name in names:
    if name not in how.splits and name not in own:
      raise ValueError(f'data: {name!r} is not a dataset of this task'
                       + errors.nearest(name, how.splits))
  if 'from' not in options:
    config = _system(options['system']).get_config(
        f'{options.get("size", "tiny")},data='
        + ('scenes' if data == 'scenes' else data if own else 'coco'))
  elif own and 'boxes' in how.train_ops:
    config.data.labels = common.labels(names, 'joint')
  return config, data


def _system(name):
  """The config module of a system."""
  systems = discovery.names('configs', 'resize')
  if name not in systems:
    raise ValueError(f'no system {name!r}' + errors.nearest(name, systems))
  return importlib.import_module(f'configs.{name}')


def _recipe(task, system, data):
  """{dotted key: value} of configs/recipes/<task>.py, {} without one."""
  if task not in discovery.names('configs.recipes', 'RECIPES'):
    return {}
  module = importlib.import_module(f'configs.recipes.{task}')
  kind = 'scenes' if data == 'scenes' else 'published'
  return dict(module.RECIPES.get((system, kind), {}))


def _input(config, how, data, side):
  """Sets data and evaluator; images are placed as for the checkpoint."""
  names = data.split('+')
  splits = {name: how.splits.get(name, ('train', 'validation'))
            for name in names}
  config.data.train = tuple(
      dict(name=name, split=splits[name][0],
           weight='by_rows' if names[1:] else 1.) for name in names)
  config.data.dir = 'data'
  config.data.unit = how.unit
  config.data.answers = how.answers.get(data, '')
  if how.unit != 'image':
    config.data.sentences = 1    # the unit's own text
  if side:
    _system(config.model.name).resize(config, side)
  # Keep the ops up to the one that places the image on the canvas.
  ops = config.data.pp_eval.split('|')
  last, = [i for i, op in enumerate(ops)
           if op.partition('(')[0] in ('fit', 'squash')]
  image = '|'.join(ops[:last + 1])
  config.data.pp_train = f'{image}|{how.train_ops}'
  config.data.pp_eval = f'{image}|{how.eval_ops}'
  source = dict(name=names[0], split=splits[names[0]][1])
  examples = (1000, 128) if data == 'scenes' else (0, 1000)
  config.evals = {how.evaluator: common.evaluator(
      how.evaluator, source, config.data.pp_eval, *examples)}
  config.samples = dict(count=12, source=source)
  config.checkpoint.best = f'eval/{how.evaluator}/{how.metric}'


def _schedule(config, given, data, recipe):
  """Our choice without a recipe: linear decay after 10 % warm-up."""
  config.batch_size = given.batch_size
  config.eval_batch_size = given.eval_batch_size
  config.total_steps = recipe.get('total_steps',
                                  2000 if data == 'scenes' else 20_000)
  config.eval_every_steps = max(1, config.total_steps // 5)
  config.checkpoint.every_steps = config.eval_every_steps
  optim = {k: v for k, v in given.optim.items()
           if k not in stages.SCHEDULE_KEYS}
  config.optim = dict(
      optim, schedule='linear', warmup_init=0., final_fraction=0.,
      learning_rate=given.optim.learning_rate / 2,
      warmup_steps=config.total_steps // 10)


def _drop_unread(optim):
  """Removes options that the chosen schedule does not read."""
  for key in stages.unread(optim.schedule):
    if key in optim:
      del optim[key]


def _check(config, task):
  """UserError unless the model can be trained for the task."""
  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax import models
  from e2e_vlp_jax import objectives
  from e2e_vlp_jax.data import vocabularies
  # pylint: enable=g-import-not-at-top
  # Any label space will do, and the data's folder is not yet known.
  data = config.data.copy_and_resolve_references()
  data.labels = 'coco'
  sizes = vocabularies.Vocabularies.load(data).sizes

  def lacking(name):
    """Why the model cannot be trained for the task, '' if it can."""
    how = base.load(name).finetuning
    trial = config.copy_and_resolve_references()
    trial.model.heads = {name: dict(how.head)} if how.head else {}
    try:
      views = models.build(trial, **sizes).views
      asked = objectives.requests(
          objectives.build(trial, weights=how.objectives))
    except errors.UserError as e:
      return f'cannot be trained: {e}'
    return '; '.join(
        f'needs the head {head!r} of the view {view!r}'
        for view, heads in asked.items() for head in heads
        if head not in views.get(view, ()))
  why = lacking(task)
  if why:
    able = [name for name in _tasks() if not lacking(name)]
    raise errors.UserError(
        f'task {task!r} {why}, which model {config.model.name!r} does not '
        f'have; it can be fine-tuned for {", ".join(able) or "no task"}')
