"""A run: its folder, its config, its stages. Everything but the loop."""
import glob
import json
import os
from typing import Any, NamedTuple

import jax

from e2e_vlp_jax import errors

# Keys that may differ when a run is continued: they change what is written,
# where it runs or how fast, not what is learnt.
FREE_KEYS = ('log_every_steps', 'eval_every_steps', 'checkpoint', 'mesh',
             'evals', 'samples', 'tensorboard', 'data.dir', 'data.threads',
             'profile')


class Stage(NamedTuple):
  """Steps start..end with their own objectives and optimizer settings."""
  start: int
  end: int
  objectives: dict
  optim: Any


def stages(config):
  """The warm start, if the config has one, and the run proper."""
  total, warm = config.total_steps, config.warm_start.steps
  if not 0 <= warm <= total or total < 1:
    raise errors.UserError(f'total_steps: {total} and warm_start.steps: '
                           f'{warm}; expected 0 <= warm_start.steps <= '
                           'total_steps and total_steps >= 1')
  main = Stage(warm, total, dict(config.objectives), config.optim)
  if not warm:
    return [main]
  first = Stage(0, warm, dict(config.warm_start.objectives),
                config.warm_start.optim)
  return [first, main] if warm < total else [first]


def to_dict(config):
  """A config as plain JSON types (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def _flat(tree, prefix=''):
  if isinstance(tree, dict):
    return {k: v for name, value in tree.items()
            for k, v in _flat(value, f'{prefix}{name}.').items()}
  return {prefix[:-1]: tree}


def differences(old, new, free=()):
  """{dotted key: (old value, new value)} of two configs as plain dicts.

  Args:
    old, new: from `to_dict`.
    free: keys and groups that do not count, such as `FREE_KEYS`.
  """
  a, b = _flat(old), _flat(new)
  return {k: (a.get(k), b.get(k)) for k in sorted(set(a) | set(b))
          if a.get(k) != b.get(k)
          and not any(k == f or k.startswith(f + '.') for f in free)}


def finished(workdir, config):
  """Whether `workdir` holds the run of `config`, at its last step."""
  try:
    with open(os.path.join(workdir, 'config.json')) as f:
      held = json.load(f)
  except (OSError, ValueError):
    return False
  last = os.path.join(workdir, 'checkpoints', str(config.total_steps))
  return os.path.isdir(last) and not differences(held, to_dict(config),
                                                 FREE_KEYS)


def open_workdir(workdir, config, allow_changes=False):
  """Creates a run's folder, or checks that it holds this very run.

  Writes config.json.

  Args:
    workdir: a path that every host sees.
    config: of the run.
    allow_changes: go on with a run whose config differs in keys that matter
      (another dataset or seed, say), and name them.

  Raises:
    UserError: the folder cannot be written, or holds another run.
  """
  if '://' in workdir:
    raise errors.UserError(
        f'--workdir {workdir}: not a path of the file system; mount the '
        'bucket (gcsfuse, Filestore, NFS) and name the mounted folder')
  path = os.path.join(workdir, 'config.json')
  new = to_dict(config)
  # A run that was refused before it wrote anything has nothing to lose.
  written = [f for f in (os.path.join(workdir, 'metrics.jsonl'),
                         *glob.glob(f'{glob.escape(workdir)}/checkpoints/*'))
             if os.path.exists(f)]
  if written and os.path.exists(path):
    try:
      with open(path) as f:
        old = json.load(f)
    except ValueError as e:
      raise errors.UserError(f'{path}: not JSON ({e}); is --workdir right?'
                             ) from e
    diff = [(k, *v) for k, v in differences(old, new, FREE_KEYS).items()]
    if diff and allow_changes:
      if jax.process_index() == 0:
        for k, there, here in diff:
          print(f'--allow-changes: {k}: {there!r} -> {here!r}')
    elif diff:
      k, there, here = diff[0]
      more = f' and {len(diff) - 1} more keys' if len(diff) > 1 else ''
      raise errors.UserError(
          f'--workdir {workdir} holds a run with another config: {k} is '
          f'{there!r} there, {here!r} here{more}; use another workdir or '
          'that config, or --allow-changes')
  if jax.process_index() == 0:
    try:
      os.makedirs(workdir, exist_ok=True)
      with open(path + '.tmp', 'w') as f:
        json.dump(new, f, indent=1)
      os.replace(path + '.tmp', path)
    except OSError as e:
      raise errors.UserError(f'--workdir {workdir}: cannot be written '
                             f'({e.strerror})') from e


def report_loaded(workdir, path, report):
  """Prints what `init_from` gave, and writes all of it to WORKDIR.

  Args:
    workdir: gets init_from.json.
    path: of the checkpoint.
    report: from `checkpoint.start_from`.
  """
  if jax.process_index():
    return
  why = {'loaded': 'loaded', 'resized': 'of these resized',
         'missing': 'new here, freshly drawn',
         'surplus': 'in the checkpoint alone, skipped',
         'other_shape': 'of another shape, freshly drawn'}
  for kind in why:
    names = report[kind]
    some = (f': {", ".join(names[:5])}' + ', ...' * (len(names) > 5)
            if kind != 'loaded' and names else '')
    print(f'init_from {path}: {len(names)} {why[kind]}{some}', flush=True)
  with open(os.path.join(workdir, 'init_from.json'), 'w') as f:
    json.dump({'checkpoint': path, **report}, f, indent=1)


def count_parameters(params):
  """{'total': n, '<top-level module>': n, ...}."""
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  return {'total': size(params), **{k: size(v) for k, v in params.items()}}
