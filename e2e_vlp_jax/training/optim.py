"""Optimizer from a config: schedules, groups by regex, clipping.

`optim.groups` is one list of (regex of a parameter's path, options). The
first match wins; a parameter without a match and a regex without a parameter
are errors. Options:
  freeze         True: no update. No other key freezes anything: a BatchNorm
                 whose scale is frozen also keeps its statistics.
  lr_multiplier  multiplies the schedule's learning rate
  weight_decay   instead of optim.weight_decay
  optimizer      'adamw' | 'adamw_hf' | 'sgd', instead of optim.optimizer
                 (by default 'adamw')

`optim.layer_decay` (1 = none) multiplies the rates once more: by
layer_decay^k, where k counts from the model's output. Its last layer has k = 1,
its first one k = the number of layers, and all that is in no layer, such as
heads, k = 0. Models name their layers (`contract.BaseModel.towers`).

With `optim.weight_decay_steps`, adamw's weight decay is multiplied by
`optim.weight_decay_factor` at each of these steps.
"""
import re

import jax
import jax.numpy as jnp
import optax

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training.stages import SCHEDULES

_GROUP_KEYS = ('freeze', 'lr_multiplier', 'weight_decay', 'optimizer')
_OPTIMIZERS = ('adamw', 'adamw_hf', 'sgd')


def make_schedule(options, total_steps, start=0, key='optim'):
  """Learning rate as a function of the optimizer's own step count.

  A linear warm-up over `warmup_steps`, then one of these schedules:
    'constant'
    'cosine', 'linear': down to `final_fraction` of the rate at total_steps
    'step': multiplied by `decay_factor` at each step of `decay_steps`
  The first step has 1 / warmup_steps of the rate, or the fraction
  `warmup_init` if the config has it (transformers: 0, SOHO: 1/3).

  Args:
    options: config.optim or config.warm_start.schedule.
    total_steps: step of the run at which the schedule ends.
    start: step at which the optimizer was (re)started; counts begin at 0.
    key: config key of `options`, for error messages.

  Raises:
    UserError: an unknown schedule, or one that lacks an option.
  """
  name = options.schedule
  if name not in SCHEDULES:
    raise errors.UserError(f'{key}.schedule: {name!r}'
                           + errors.nearest(name, SCHEDULES))
  for option in SCHEDULES[name]:
    if option not in options:
      raise errors.UserError(f'{key}.schedule: {name!r} needs {key}.{option}, '
                             'which this config does not have')
  length = total_steps - start
  warmup = options.warmup_steps
  peak, final = options.learning_rate, options.get('final_fraction')
  first = options.get('warmup_init')
  if first is None:
    first, ramp = 0., lambda count: (count + 1) / warmup
  else:
    ramp = lambda count: count / warmup

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    warm = (first + (1 - first) * jnp.minimum(1., ramp(count)) if warmup
            else 1.)
    done = jnp.clip((count - warmup) / max(length - warmup, 1), 0., 1.)
    if name == 'cosine':
      factor = final + (1 - final) * .5 * (1 + jnp.cos(jnp.pi * done))
    elif name == 'linear':
      factor = 1 - (1 - final) * done
    elif name == 'step':
      passed = sum((count >= s).astype(jnp.float32)
                   for s in options.decay_steps) if options.decay_steps else 0.
      factor = options.decay_factor**passed
    else:
      factor = 1.
    return peak * warm * factor
  return schedule


def group_of(params, groups):
  """Tree of each parameter's group: its index in `groups`, as a string.

  Raises:
    UserError: a parameter without a group, or a group without parameters.
  """
  used = set()

  def label(path, _):
    name = sharding.path_name(path)
    for i, (pattern, _) in enumerate(groups):
      if re.fullmatch(pattern, name):
        used.add(i)
        return str(i)
    raise errors.UserError(f'optim.groups: no pattern matches parameter '
                           f'{name!r}; end the list with (".*", {{}})')
  labels = jax.tree_util.tree_map_with_path(label, params)
  for i, (pattern, _) in enumerate(groups):
    if i not in used and pattern != '.*':
      raise errors.UserError(f'optim.groups: pattern {pattern!r} matches no '
                             'parameter')
  return labels


def adamw_hf(schedule, b1, b2, eps, weight_decay):
  """AdamW as in BERT's PyTorch ports; SOHO and FIBER are trained with it.

  It differs from torch's and optax's: eps is added to the root of the second
  moment before its bias is corrected, and the decay acts on the parameter
  after the step (transformers 4, optimization.AdamW).

  Args:
    schedule: step count -> learning rate.
    b1, b2, eps, weight_decay: AdamW's options.

  Returns:
    an optax transformation whose updates include the learning rate.
  """
  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

  def update(grads, state, params):
    mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu,
                          grads)
    t = state.count + 1
    rate = schedule(state.count)
    size = rate * jnp.sqrt(1 - b2**t) / (1 - b1**t)

    def change(p, m, v):
      step = size * m / (jnp.sqrt(v) + eps)
      return -step - rate * weight_decay * (p - step)
    return (jax.tree.map(change, params, mean, square),
            optax.ScaleByAdamState(t, mean, square))
  return optax.GradientTransformation(init, update)


def _decay(optim, value, kind):
  """A group's weight decay: a number, or a function of the step count."""
  drops = optim.get('weight_decay_steps', ())
  if not drops or not value:
    return value
  if kind != 'adamw':
    raise errors.UserError(
        f'optim.weight_decay_steps: {tuple(drops)} with optimizer {kind!r}; '
        "expected 'adamw', or no such steps")
  factor = optim.weight_decay_factor
  return lambda count: value * factor**sum(
      (count >= step).astype(jnp.float32) for step in drops)


def layers_above(params, towers):
  """Tree of each parameter's k in layer_decay^k, see the module's docstring.

  Args:
    params: tree of arrays or ShapeDtypeStructs.
    towers: `towers` of the model.

  Raises:
    UserError: no parameter is in a layer.
  """
  layers = [(pattern, len(tower) - i) for tower in towers
            for i, pattern in enumerate(tower)]

  def above(path, _):
    name = sharding.path_name(path)
    return next((k for pattern, k in layers if re.fullmatch(pattern, name)), 0)
  found = jax.tree_util.tree_map_with_path(above, params)
  if not any(jax.tree.leaves(found)):
    raise errors.UserError('optim.layer_decay: this model names no layers of '
                           'its own; expected 1')
  return found


def make_optimizer(optim, params, schedule, towers=()):
  """The optax transformation of a config.

  Args:
    optim: config.optim.
    params: tree of arrays or ShapeDtypeStructs.
    schedule: from `make_schedule`.
    towers: `towers` of the model, for optim.layer_decay.
  """
  groups = [(pattern, dict(options)) for pattern, options in optim.groups]
  for pattern, options in groups:
    for key in options:
      if key not in _GROUP_KEYS:
        raise errors.UserError(f'optim.groups {pattern!r}: no option {key!r}'
                               + errors.nearest(key, _GROUP_KEYS))
  labels = group_of(params, groups)
  frozen = jax.tree.map(
      lambda i: bool(groups[int(i)][1].get('freeze')), labels)
  layer_decay = optim.get('layer_decay', 1.)
  if not 0 < layer_decay <= 1:
    raise errors.UserError(f'optim.layer_decay: {layer_decay}; expected more '
                           'than 0, and at most 1, which is none')
  kinds = {str(i): o for i, (_, o) in enumerate(groups)}
  if layer_decay < 1:
    labels, kinds = _by_layer(labels, kinds, layer_decay,
                              layers_above(params, towers))

  def transform(options):
    if options.get('freeze'):
      return optax.set_to_zero()
    kind = options.get('optimizer', optim.get('optimizer', 'adamw'))
    decay = _decay(optim, options.get('weight_decay', optim.weight_decay),
                   kind)
    factor = options.get('lr_multiplier', 1.)
    rate = lambda count: factor * schedule(count)
    if kind == 'adamw':
      steps = [optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
               optax.add_decayed_weights(decay)]
    elif kind == 'adamw_hf':
      return adamw_hf(rate, optim.b1, optim.b2, optim.eps, decay)
    elif kind == 'sgd':
      if 'momentum' not in optim:
        raise errors.UserError("optim.groups: optimizer 'sgd' needs "
                               'optim.momentum, which this config does not '
                               'have')
      # As in torch, decay is added to the gradient before the momentum.
      steps = [optax.add_decayed_weights(decay), optax.trace(optim.momentum)]
    else:
      raise errors.UserError(f'optim.groups: optimizer {kind!r}'
                             + errors.nearest(kind, _OPTIMIZERS))
    return optax.chain(*steps, optax.scale_by_learning_rate(rate))

  # Frozen parameters must not count in the gradient norm.
  chain = [optax.masked(optax.set_to_zero(), frozen)]
  if optim.clip_norm:
    chain.append(optax.clip_by_global_norm(optim.clip_norm))
  chain.append(optax.multi_transform(
      {label: transform(o) for label, o in kinds.items()}, labels))
  return optax.chain(*chain)


def _by_layer(labels, kinds, layer_decay, above):
  """Splits the groups by layer.

  Args:
    labels: tree of labels, from `group_of`.
    kinds: {label: options of the group}.
    layer_decay: see the module's docstring.
    above: from `layers_above`.

  Returns:
    (labels, kinds) of the parts.
  """
  parts = jax.tree.map(lambda label, k: f'{label} {k}', labels, above)
  used = {}
  for part in jax.tree.leaves(parts):
    label, k = part.split()
    own = kinds[label]
    used[part] = {**own, 'lr_multiplier': own.get(
        'lr_multiplier', 1.) * layer_decay**int(k)}
  return parts, used
