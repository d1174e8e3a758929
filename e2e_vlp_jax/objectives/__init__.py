"""Objectives: outputs + batch -> losses.

An objective is one file with a class `Objective`, a frozen dataclass whose
fields are `config.objective_options.<name>`:
- `requests`: {view: (head, ...)} that the model must run for it;
- `__call__(outputs, batch) -> (losses, metrics)`, both {name: (sum, weight)}.
  A loss is sum / weight over the global batch; losses add up. Metrics are
  only logged. A weight should depend on the batch only. If it depends on the
  model's outputs, accumulation needs a second forward pass;
- `least_weight`, optional: {name of a loss: the least number that its sum is
  divided by}, for weights that can be 0 while the sum is not. (A weight that
  was raised itself would no longer add up over micro-batches.)
- `check(config, model)`, optional, for other requirements on model or config.
An objective that must look at the current model outside of the step (samples,
rewards) has also
- `feeder`: a file of evaluation/ with a class `Feeder`, whose `__call__(state,
  batch)` adds to each batch before the step;
- `placeholder(batch)`: the same batch with zeros for it, to compile with.
It is the only objective of its stage.
"""
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors


def build(config, mesh=None, batch_axes=(), weights=None):
  """Builds the objectives of a config whose weight is not 0.

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
  weights = config.objectives if weights is None else weights
  for name, weight in dict(weights).items():
    if not weight:
      continue
    objective = discovery.load(__name__, name, 'Objective',
                               f'objectives.{name}')
    options = dict(config.objective_options.get(name, {}))
    fields = objective.__dataclass_fields__
    for key in options:
      if key not in fields:
        raise errors.UserError(f'objective_options.{name}.{key}: no such '
                               f'option{errors.nearest(key, fields)}')
    if 'mesh' in fields:
      options.update(mesh=mesh, batch_axes=tuple(batch_axes))
    out[name] = (weight, objective(**options))
  if not out:
    raise errors.UserError('objectives: every weight is 0, nothing to train')
  return out


def check(objectives, model, config):
  """UserError if an objective does not fit the model or the config.

  Args:
    objectives: from `build`.
    model: from `models.build`.
    config: whole config.
  """
  for name, (_, objective) in objectives.items():
    if hasattr(objective, 'feeder') and len(objectives) > 1:
      others = ', '.join(n for n in objectives if n != name)
      raise errors.UserError(
          f'objectives.{name}: it changes the texts of the batches, so that it '
          f'must be the only objective of its stage; found {others} beside it')
    for view, heads in objective.requests.items():
      for head in heads:
        if not model.offers(view, head):
          having = [v for v, row in model.views.items() if head in row.heads]
          raise errors.UserError(
              f'objectives.{name}: needs the head {head!r} of the view '
              f'{view!r}, which model {config.model.name!r} with these '
              'options does not have'
              + (errors.nearest(view, having) if having else
                 f'; set objectives.{name}=0'))
    if hasattr(objective, 'check'):
      objective.check(config, model)


def check_negatives(config, model, name):
  """UserError if a (micro-)batch would have no negatives: only one image."""
  rows = config.batch_size // config.accumulate
  if rows < 2 and not model.keeps_past_examples:
    raise errors.UserError(
        f'batch_size: {config.batch_size} in {config.accumulate} part(s), but '
        f'objective {name} contrasts the images of a part with each other: '
        f'expected at least {2 * config.accumulate}')


def requests(objectives):
  """Union of the objectives' requests: {view: (head, ...)}."""
  out = {}
  for _, objective in objectives.values():
    for view, heads in objective.requests.items():
      out.setdefault(view, set()).update(heads)
  return {view: tuple(sorted(heads)) for view, heads in sorted(out.items())}
