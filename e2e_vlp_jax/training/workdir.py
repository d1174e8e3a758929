"""WORKDIR: the run in it, and the checkpoint from which it started."""
import contextlib
import json
import os
import socket
import sys
import time

import jax
import ml_collections

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.storage import bucket_lock
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.storage import staging
from e2e_vlp_jax.training import distributed
from e2e_vlp_jax.training import early_stop
from e2e_vlp_jax.training import extension
from e2e_vlp_jax.training import old_names

# Keys that may change when a run is resumed: they affect output, hardware or
# speed, not the trained parameters.
FREE_KEYS = ('log_every_steps', 'eval_every_steps', 'eval_batch_size',
             'max_bad_steps', 'checkpoint', 'early_stop', 'mesh', 'evals',
             'samples',
             'tensorboard', 'data.dir', 'data.threads', 'data.pp_eval',
             'profile')


# Seconds for which a file server may keep the lock of a host that died. Linux
# keeps NFS locks for 90.
_PATIENCE = 120


@contextlib.contextmanager
def only_run(workdir):
  """Lets one training at a time use a WORKDIR, which it creates.

  Process 0 holds a lock for all processes of the run. It ends with the process,
  however that ends; in a bucket, a minute later.

  Yields:
    WORKDIR as `staging.opened` gives it.

  Raises:
    UserError: another training runs there (it is named), or the folder cannot
      be written.
    TryAgain: the same, and it may pass.
  """
  with contextlib.ExitStack() as stack:
    error, folder = None, None
    try:
      if jax.process_index() == 0:
        if paths.in_bucket(workdir):
          stack.enter_context(bucket_lock.lock(paths.absolute(workdir),
                                               f'--workdir {workdir}'))
        else:
          _create(workdir)
          _lock(workdir, stack)
      folder = stack.enter_context(staging.opened(workdir))
    except (errors.UserError, errors.TryAgain) as e:
      error = e
    if not distributed.everywhere(error is None):
      raise error or errors.UserError(
          f'--workdir {workdir}: another process cannot use it and says why')
    yield folder


def _lock(workdir, stack):
  """Enters the lock of `workdir`; waits if the holder's host may be dead."""
  until, waits = time.monotonic() + _PATIENCE, False
  while True:
    try:
      stack.enter_context(files.lock(os.path.join(workdir, '.lock'),
                                     f'--workdir {workdir}'))
      return
    except files.InUse as e:
      if e.host in ('', socket.gethostname()) or time.monotonic() > until:
        raise
      if not waits:
        print(f'--workdir {workdir}: locked from {e.host}; waiting up to '
              f'{_PATIENCE} s, in case that host is gone', file=sys.stderr,
              flush=True)
    waits = True
    time.sleep(1)


def _create(workdir):
  """Creates a run's folder; UserError if that is not possible."""
  files.check_folder('--workdir', workdir)


def to_dict(config):
  """A config as plain JSON types (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def differences(old, new, free=()):
  """{dotted key: (old value, new value)} of two configs as plain dicts.

  Args:
    old, new: from `to_dict`. In the result, None stands for a missing key.
    free: keys and groups to ignore, such as `FREE_KEYS`.
  """
  a, b = old_names.flatten(old), old_names.flatten(new)
  # A group may be empty in one and filled in the other.
  a, b = ({k: v for k, v in x.items() if v != {}} for x in (a, b))
  return {k: (a.get(k), b.get(k)) for k in sorted(set(a) | set(b))
          if a.get(k) != b.get(k)
          and not any(k == f or k.startswith(f + '.') for f in free)}


def finished(workdir, config):
  """Whether `workdir` contains the finished run of `config`.

  It is finished at its last step, or where its `early_stop` has ended it.
  """
  try:
    held = old_names.modernise(json.loads(paths.read_text(
        os.path.join(workdir, 'config.json'))))
  except (OSError, ValueError, errors.UserError):
    return False
  new = old_names.modernise(to_dict(config))
  stop = early_stop.EarlyStop(ml_collections.ConfigDict(new).early_stop)
  try:
    last = checkpoint_files.step_folder(workdir)
    checkpoint_files.check_items(last, optional=())
    stop.restore(meta := checkpoint_files.meta_of(last))
  except errors.UserError:  # absent, or damaged
    return False
  if meta['step'] < config.total_steps and not stop.reached:
    return False
  return not differences(held, new, FREE_KEYS)


def open_workdir(workdir, config, allow_changes=False):
  """Creates a run's folder, or checks that it holds the same run.

  Writes config.json. A run may be made longer (`total_steps`); it is said what
  its learning rate does then.

  Args:
    workdir: as `only_run` gives it.
    config: config of the run.
    allow_changes: resume a run even if important keys differ (such as dataset
      or seed), and print them.

  Raises:
    UserError: the folder cannot be written, or holds another run.
  """
  path = os.path.join(workdir, 'config.json')
  new = to_dict(config)
  # Without metrics or checkpoints the folder may be used again.
  written = (os.path.exists(os.path.join(workdir, 'metrics.jsonl'))
             or paths.names(f'{workdir}/{checkpoint_files.CHECKPOINTS}'))
  if written and os.path.exists(path):
    # The stored config lacks what its schedule does not read.
    held = _read(path)
    before = held.get('total_steps', config.total_steps)
    held['total_steps'] = max(before, config.total_steps)
    _compare(workdir, held, old_names.modernise(new), allow_changes)
    if before < config.total_steps and jax.process_index() == 0:
      print(extension.describe(config, before), flush=True)
  if jax.process_index() == 0:
    _create(os.fspath(workdir))
    files.write_json(path, new)


def _read(path):
  """A WORKDIR's config.json, under current names."""
  try:
    with open(path, encoding='utf-8') as f:
      return old_names.modernise(json.load(f), path)
  except ValueError as e:
    raise errors.UserError(f'{path}: not JSON ({e}); is --workdir right?'
                           ) from e


def _compare(workdir, old, new, allow_changes):
  """Raises UserError if the configs differ; `allow_changes` prints instead."""
  diff = differences(old, new, FREE_KEYS)
  if not diff:
    return
  if allow_changes:
    if jax.process_index() == 0:
      for key, (there, here) in diff.items():
        print(f'--allow-changes: {key}: {there!r} -> {here!r}')
    return
  key = next(iter(diff))
  there, here = diff[key]
  more = f' and {len(diff) - 1} more keys' if len(diff) > 1 else ''
  known = old_names.flatten(new)
  hint = '' if key in known else (
      ' (this config has no such key' + errors.nearest(key, known) + ')')
  raise errors.UserError(
      f'--workdir {workdir} holds a run with another config: {key} is '
      f'{there!r} there, {here!r} here{hint}{more}; use another workdir or '
      'that config, or --allow-changes')


def report_loaded(workdir, path, report):
  """Prints which parameters `init_from` loaded; writes all names to WORKDIR.

  Args:
    workdir: gets init_from.json.
    path: of the checkpoint.
    report: from `checkpoint.start_from`.
  """
  if jax.process_index():
    return
  why = {'loaded': 'loaded', 'resized': 'of these resized',
         'missing': 'not in the checkpoint, randomly initialised',
         'surplus': 'only in the checkpoint, skipped',
         'other_shape': 'of another shape, randomly initialised'}
  for kind in why:
    names = report[kind]
    some = (f': {", ".join(names[:5])}' + ', ...' * (len(names) > 5)
            if kind != 'loaded' and names else '')
    print(f'init_from {path}: {len(names)} {why[kind]}{some}', flush=True)
  files.write_json(os.path.join(workdir, 'init_from.json'),
                   {'checkpoint': path, **report})
