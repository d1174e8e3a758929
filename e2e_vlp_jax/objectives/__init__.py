"""Objectives: outputs + batch -> losses.

An objective is one file with a class `Objective` (a frozen dataclass, its
fields are `config.objective_options.<name>`):
- `requests`: {view: (head, ...)}, what the model must run for it;
- `__call__(outputs, batch) -> (losses, metrics)`, both {name: (sum, weight)}.
  A loss is sum / weight over the global batch; losses add up. Metrics are
  only logged. A weight should depend on the batch alone: one that depends on
  the model's outputs costs accumulation a second forward pass;
- `check(config)`, if there is anything to refuse before the run starts.
"""
import importlib

from e2e_vlp_jax import errors


def build(config, mesh=None, batch_axes=(), weights=None):
  """The objectives of a config whose weight is not 0.

  Args:
    config: reads `objectives` and `objective_options`.
    mesh, batch_axes: for objectives that work per shard (matching).
    weights: instead of config.objectives (a warm start has its own).

  Returns:
    {name: (weight, objective)}.

  Raises:
    UserError: unknown objective or option, or nothing to train.
  """
  out = {}
  for name, weight in dict(weights or config.objectives).items():
    if not weight:
      continue
    try:
      module = importlib.import_module(
          f'e2e_vlp_jax.objectives.{name.replace("grid_classes", "cells")}')
    except ModuleNotFoundError as e:
      raise errors.UserError(
          f'objectives.{name}: no such objective'
          + errors.nearest(name, ['mlm', 'itm', 'itc', 'mvm', 'detection',
                                  'captioning', 'cells'])) from e
    options = dict(config.objective_options.get(name, {}))
    fields = module.Objective.__dataclass_fields__
    for key in options:
      if key not in fields:
        raise errors.UserError(f'objective_options.{name}.{key}: no such '
                               f'option{errors.nearest(key, fields)}')
    if 'mesh' in fields:
      options.update(mesh=mesh, batch_axes=tuple(batch_axes))
    objective = module.Objective(**options)
    if hasattr(objective, 'check'):
      objective.check(config)
    out[name] = (weight, objective)
  if not out:
    raise errors.UserError('objectives: every weight is 0, nothing to train')
  return out


def check_rivals(config, name):
  """UserError if a (micro-)batch has one image and there is no queue."""
  rows = config.batch_size // config.accumulate
  if rows < 2 and not config.model.get('queue', 0):
    raise errors.UserError(
        f'batch_size: {config.batch_size} in {config.accumulate} part(s), but '
        f'objective {name} sets the images of a part against each other: '
        f'expected at least {2 * config.accumulate}')


def check_requests(objectives, views, name):
  """UserError if an objective asks what the model does not have.

  Args:
    objectives: from `build`.
    views: `Model.views`.
    name: of the model.
  """
  for objective_name, (_, objective) in objectives.items():
    for view, heads in objective.requests.items():
      lacking = [h for h in heads if h not in views.get(view, ())]
      if lacking:
        having = [v for v in views if lacking[0] in views[v]]
        raise errors.UserError(
            f'objectives.{objective_name}: needs the head {lacking[0]!r} of '
            f'the view {view!r}, which model {name!r} with these options does '
            'not have'
            + (errors.nearest(view, having) if having else
               f'; set objectives.{objective_name}=0'))


def requests(objectives):
  """Union of what the objectives ask of the model: {view: (head, ...)}."""
  out = {}
  for _, objective in objectives.values():
    for view, heads in objective.requests.items():
      out.setdefault(view, set()).update(heads)
  return {view: tuple(sorted(heads)) for view, heads in sorted(out.items())}
