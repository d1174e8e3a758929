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

Heads that the checkpoint has for other tasks are kept as they are, frozen. What
they read changes under them: `evaluate --tasks OTHER,TASK` shows by how much.
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
  task = base.load(name, 'TASK')
  options = common.parse_options(pairs, KEYS)
  if not task.ways:
    raise ValueError(f'task {name!r} cannot be fine-tuned; those that can: '
                     + ', '.join(_tasks()))
  if ('from' in options) == ('system' in options):
    raise ValueError('expected from=CHECKPOINT, or system=NAME to start from '
                     'scratch, and not both')
  given, data, how = _start(task, options)
  recipe = _recipe(name, given.model.name, data)
  side = options.get('side', recipe.pop('side', None))

  config = common.run_defaults()
  for key in ('seed', 'dtype', 'sharding_rules', 'model', 'data'):
    config[key] = given[key]
  config.init_from = options.get('from')
  kept = _other_heads(name, given) if 'from' in options else {}
  config.model.heads = {**kept, **({name: dict(how.head)} if how.head else {})}
  config.objectives = dict(how.objectives)
  config.objective_options = {
      k: given.objective_options.get(k, {}) for k in how.objectives}
  _input(config, how, data, side)
  _schedule(config, given, data, recipe)
  for key, value in recipe.items():
    common.put(config, key, value)
  _drop_unread(config.optim)
  if kept:
    config.optim.groups = (
        (rf'heads_({"|".join(kept)})/.*', dict(freeze=True)),
        *config.optim.groups)
  _check(config, name)
  return config


def _other_heads(name, given):
  """{name: options} of the checkpoint's heads for other tasks.

  Those of tasks whose rows have the keys of this task's rows, but for a second
  image, so that the model can be built from either's.
  """
  read = lambda task: {k for k in base.load(task).keys
                       if not k.startswith('second_')}
  heads = given.model.get('heads', {})
  return {other: dict(options) for other, options in heads.items()
          if other != name and other in base.names()
          and read(other) == read(name)}


def _tasks():
  """Names of the tasks that can be fine-tuned."""
  return [n for n in base.names() if base.load(n).ways]


def _start(task, options):
  """Config of the checkpoint or of the system from scratch, dataset, and the
  first way to fine-tune for the task that the model has heads for."""
  size = options.get('size', 'tiny')
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
    config = _system(options['system']).get_config(size)
    scenes = size == 'tiny'
  how = _fitting(config, task.name) or task.finetuning
  data = options.get('data') or (
      'scenes' if scenes and 'scenes' in how.splits else how.data)
  names = common.dataset_names(data)
  # Those of some task; any other name is a dataset of one's own.
  known = {dataset for name in _tasks() for way in base.load(name).ways
           for dataset in way.splits}
  for name in names:
    if name in known and name not in how.splits:
      raise ValueError(f'data: {name!r} is not a dataset of this task'
                       + errors.nearest(name, how.splits))
  # For classes, also those whose names are in no shipped label space.
  own = set(names) - set(common.SHIPPED if how.classes else known)
  if 'from' not in options:
    kind = data if own or data == 'scenes' else 'coco'
    config = _system(options['system']).get_config(f'{size},data={kind}')
  elif own and how.classes:
    config.data.labels = common.labels(names, 'joint')
  return config, data, how


def _system(name):
  """The config module of a system."""
  systems = discovery.names('configs', 'resize')
  if name not in systems:
    raise ValueError(f'no system {name!r}' + errors.nearest(name, systems))
  return importlib.import_module(f'configs.{name}')


def _recipe(task, system, data):
  """{dotted key: value} of configs/recipes/<task>.py, {} without one.

  A recipe is of a dataset. Own datasets take the recipe 'own'; 'published' is
  for all but scenes that have none.
  """
  if task not in discovery.names('configs.recipes', 'RECIPES'):
    return {}
  recipes = importlib.import_module(f'configs.recipes.{task}').RECIPES
  own = set(data.split('+')) - set(common.SHIPPED)
  kinds = [data] + ['own'] * bool(own) + ['published'] * (data != 'scenes')
  return dict(next((recipes[system, kind] for kind in kinds
                    if (system, kind) in recipes), {}))


def _input(config, how, data, side):
  """Sets data and evaluator; images are placed as for the checkpoint."""
  names = data.split('+')
  splits = {name: how.splits.get(name, ('train', 'validation'))
            for name in names}
  config.data.train = tuple(
      dict(name=name, split=splits[name][0],
           weight='by_rows' if names[1:] else 1.) for name in names)
  config.data.dir = 'data'
  config.data.exclude = ()
  config.data.unit = how.unit
  config.data.answers = how.answers.get(data, '')
  if how.unit != 'image':
    config.data.sentences = 1    # the unit's own text
  if side:
    _system(config.model.name).resize(config, side)
  see = config.data.pp_eval
  config.data.pp_train = base.place_image(see, how.train_ops)
  config.data.pp_eval = base.place_image(see, how.eval_ops)
  source = dict(name=names[0], split=splits[names[0]][1])
  examples = (1000, 128) if data == 'scenes' else (0, 1000)
  config.evals = {how.evaluator: common.evaluator(
      how.evaluator, source, config.data.pp_eval, *examples)}
  config.samples = dict(count=12, source=source)
  config.checkpoint.best = f'eval/{how.evaluator}/{how.metric}'
  config.early_stop.metric = config.checkpoint.best


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
  # Groups of heads belong to the checkpoint's own task.
  optim['groups'] = tuple(group for group in given.optim.groups
                          if not group[0].startswith('heads_'))
  config.optim = dict(
      optim, schedule='linear', warmup_init=0., final_fraction=0.,
      learning_rate=given.optim.learning_rate / 2,
      warmup_steps=config.total_steps // 10,
      layer_decay=1.)            # 1 = none; training/optim.py explains it


def _drop_unread(optim):
  """Removes options that the chosen schedule does not read."""
  for key in stages.unread(optim.schedule):
    if key in optim:
      del optim[key]


def _fitting(config, task):
  """The first way to fine-tune for a task that the model has heads for."""
  return next((how for how in base.load(task).ways
               if not _lacking(config, task, how)), None)


def _lacking(config, name, how):
  """Why the model cannot be trained for a task in this way, '' if it can."""
  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax import models
  from e2e_vlp_jax import objectives
  from e2e_vlp_jax.data import vocabularies
  # pylint: enable=g-import-not-at-top
  # Any label space will do, and the data's folder is not yet known.
  data = config.data.copy_and_resolve_references()
  data.labels = 'coco'
  sizes = vocabularies.Vocabularies.load(data).sizes
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


def _check(config, task):
  """UserError unless the model can be trained for the task."""
  why = _lacking(config, task, base.load(task).finetuning)
  if why and not _fitting(config, task):
    able = [name for name in _tasks() if _fitting(config, name)]
    raise errors.UserError(
        f'task {task!r} {why}, which model {config.model.name!r} does not '
        f'have; it can be fine-tuned for {", ".join(able) or "no task"}')
