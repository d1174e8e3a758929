"""Config keys that had another name before December 2026.

Stored configs (checkpoints, WORKDIRs), sweeps and command lines may use the
old names; one table translates them all. Keys that never had an effect are
dropped from a stored config and refused on a command line.
"""
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import stages

# (old key, new key) as regular expressions; the first match wins.
_RENAMED = (
    (r'evals\.(.+)\.training_examples', r'evals.\1.examples_during_training'),
    (r'samples\.pp', r'data.pp_eval'),
    (r'(warm_start\.)?objectives\.cells', r'\1objectives.grid_classes'),
    (r'objective_options\.cells\.nothing',
     r'objective_options.grid_classes.background_weight'),
    (r'warm_start\.optim\.(schedule|learning_rate|warmup_steps|warmup_init|'
     r'decay_steps|decay_factor|final_fraction)', r'warm_start.schedule.\1'),
    (r'model\.heads', r'model.attention_heads'),
    (r'model\.itm_pool', r'model.text_pool'),
    (r'model\.text', r'model.use_text'),
    (r'model\.text\.scratch', r'model.roberta.from_scratch'),
    (r'model\.text\.(.+)', r'model.roberta.\1'),
    (r'model\.swin\.scratch', r'model.swin.from_scratch'),
    (r'model\.fuse', r'model.fused_layers'),
    (r'model\.hardness', r'model.negative_hardness'),
    (r'model\.beam_rank', r'model.beam_search'),
)

# Removed keys, and what to do instead.
_GONE = (
    (r'model\.backbone\.frozen_(bn|stages)',
     'only optim.groups decides what is frozen'),
    (r'warm_start\.optim\.(.+)',
     r'it never had an effect; set optim.\1 for both stages'),
)

# Renamed values: {new key: function of the old value}.
_VALUES = {
    'model.beam_search': lambda v: {'mean': 'released',
                                    'sum': 'standard'}.get(v, v),
    'optim.groups': lambda groups: type(groups)(
        type(group)((group[0], {_GROUP.get(k, k): v
                                for k, v in dict(group[1]).items()}))
        for group in groups),
    'data.train': lambda sources: type(sources)(
        {k: _WEIGHTS.get(v, v) if k == 'weight' else v
         for k, v in dict(source).items()} for source in sources),
}
_GROUP = {'lr': 'lr_multiplier', 'wd': 'weight_decay'}
_WEIGHTS = {'images': 'by_rows', 'texts': 'by_texts'}

# New keys, with the value that keeps the old behaviour. They are added to a
# config that has their group; those of a run to a config with `total_steps`.
ADDED = {'model.heads': {}, 'data.unit': 'image', 'data.exclude': [],
         'model.swin.fusion': 'v3', 'early_stop.metric': '',
         'early_stop.patience': 0}
_OF_RUNS = ('early_stop.',)

# Every key that an old config could have; * stands for anything.
_OLD_KEYS = '''
seed dtype accumulate ema_decay max_bad_steps init_from sharding_rules
tensorboard batch_size total_steps log_every_steps eval_every_steps
eval_batch_size mesh.* checkpoint.* profile.* objectives.*
objective_options.*.* warm_start.steps warm_start.objectives.*
warm_start.optim.* evals.* samples.count samples.source.* samples.pp
optim.schedule optim.optimizer optim.learning_rate optim.warmup_steps
optim.warmup_init optim.decay_steps optim.decay_factor optim.final_fraction
optim.b1 optim.b2 optim.eps optim.weight_decay optim.clip_norm optim.momentum
optim.groups data.dir data.train data.tokenizer.kind data.tokenizer.path
data.labels data.answers data.buckets data.max_text data.sentences
data.max_boxes data.max_attributes data.threads data.max_bad_records
data.pp_train model.name model.text model.backbone.* model.image_mean
model.image_std model.width model.heads model.ffn model.encoder_layers
model.decoder_layers model.dropout model.pre_norm model.act model.epsilon
model.num_queries model.queries model.itm_pool model.max_text model.text_types
model.remat model.neck.* model.dictionary.* model.mvm.* model.swin.*
model.text.* model.fuse model.hardness model.beam_rank model.queue
'''.split()


def rename(key):
  """The current name of a config key, which may already be current."""
  for old, new in _RENAMED:
    if re.fullmatch(old, key):
      return re.sub(old, new, key)
  return key


def gone(key):
  """Why a config key was removed, or None if it was not."""
  if rename(key) == key:
    for old, why in _GONE:
      if re.fullmatch(old, key):
        return re.sub(old, why, key)
  return None


def value(key, found):
  """The value of a key (current name), with renamed values translated."""
  return _VALUES[key](found) if key in _VALUES and found else found


def modernise(config, where='config'):
  """A stored config under current names.

  Args:
    config: dict, from a ConfigDict or from JSON. Current names stay as they
      are. Options that the chosen schedule or optimizer never reads are left
      out.
    where: where the config was found, for the error message.

  Returns:
    a new dict.

  Raises:
    UserError: a config with old names has an unknown key.
  """
  flat = flatten(config)
  if 'samples.pp' in flat:
    for key in flat:
      if not any(re.fullmatch(known.replace('.', r'\.').replace('*', '.+'),
                              key) for known in _OLD_KEYS):
        raise errors.UserError(
            f'{where}: its config has the key {key!r}, which neither this '
            'version nor its table of old names knows'
            + errors.nearest(key, _OLD_KEYS))
  found = {}
  for key, x in flat.items():
    if not gone(key):
      # Only values were renamed; {} is an empty group.
      key = key if isinstance(x, dict) else rename(key)
      found[key] = value(key, x)
  _drop_unread(found)
  for key, x in ADDED.items():
    group = key.rpartition('.')[0] + '.'
    if ((any(k.startswith(group) for k in found)
         or group in _OF_RUNS and 'total_steps' in found)
        and not any(k == key or k.startswith(key + '.') for k in found)):
      found[key] = x
  return _nest(found)


def _drop_unread(flat):
  """Removes keys that the chosen schedule, optimizers and model never read."""
  for group in ('optim', 'warm_start.schedule'):
    schedule = flat.get(f'{group}.schedule')
    if schedule is None:
      continue
    for key in stages.unread(schedule):
      flat.pop(f'{group}.{key}', None)
  if flat.get('optim.layer_decay') == 1:  # Of configs that could turn it on.
    del flat['optim.layer_decay']
  # Only a model that can also be a plain detector reads `use_text`.
  if 'model.num_queries' not in flat:
    flat.pop('model.use_text', None)
  if 'optim.momentum' in flat:
    kinds = [dict(group[1]).get('optimizer', flat.get('optim.optimizer'))
             for group in flat.get('optim.groups', ())]
    if 'sgd' not in kinds:
      del flat['optim.momentum']


def flatten(tree, prefix=''):
  """Nested dicts -> {dotted key: value}; an empty dict is a value."""
  if isinstance(tree, dict) and (tree or not prefix):
    return {k: v for name, x in tree.items()
            for k, v in flatten(x, f'{prefix}{name}.').items()}
  return {prefix[:-1]: tree}


def _nest(flat):
  """The inverse of `flatten`."""
  out = {}
  for key, x in flat.items():
    *groups, name = key.split('.')
    node = out
    for group in groups:
      node = node.setdefault(group, {})
    node[name] = x
  return out
