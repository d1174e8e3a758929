"""The folders of a run's checkpoints: which steps there are, and what is whole.

A checkpoint is WORKDIR/checkpoints/<step>/ with one folder for each item, see
training/checkpoint.py. All commands find a checkpoint with `step_folder` and
read it with `read`. WORKDIR may be in a bucket. Needs neither jax nor
TensorFlow.
"""
import json
import os
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.storage import failures
from e2e_vlp_jax.storage import paths

CHECKPOINTS = 'checkpoints'  # the folder of a WORKDIR
# What every checkpoint has; some also have model_state, opt_state, ema_params.
_ALWAYS = ('params', 'meta')
_STEP = '0|[1-9][0-9]*'
_LONGEST = 160  # characters of another library's message


class Damaged(errors.UserError):
  """A checkpoint that is there and cannot be read."""


def step_folder(path):
  """Finds the folder of one step, given itself, its parent or its WORKDIR.

  Of several steps it is the newest, whether or not it can be read.

  Raises:
    UserError: there is no checkpoint at `path`.
  """
  path = paths.absolute(path)
  if paths.is_folder(os.path.join(path, CHECKPOINTS)):
    path = os.path.join(path, CHECKPOINTS)
  steps = _steps(path)
  if steps:
    return os.path.join(path, str(max(steps)))
  there = any(paths.is_folder(os.path.join(path, item)) for item in _ALWAYS)
  named = re.fullmatch(_STEP, os.path.basename(path))
  if there and not named:
    raise errors.UserError(
        f'checkpoint: {path!r} is not named by its step; expected a number, '
        'such as 4000')
  if there or named and os.path.basename(os.path.dirname(path)) == CHECKPOINTS:
    if paths.is_folder(path):
      return path
  raise errors.UserError(
      f'checkpoint: none found at {path!r}; expected a WORKDIR, its '
      f'{CHECKPOINTS}/ folder or one of the steps in it')


def _steps(path):
  """Numbers of the finished steps in a folder, [] if there is no such folder.

  Raises:
    UserError: it cannot be listed.
  """
  try:
    return [int(name) for name in paths.names(path)
            if re.fullmatch(_STEP, name)
            and paths.is_folder(os.path.join(path, name))
            and _is_finished(os.path.join(path, name))]
  except OSError as e:
    raise errors.UserError(f'checkpoint: {path!r} cannot be read '
                           f'({e.strerror})') from e


def _is_finished(folder):
  """Whether all of a step is written.

  In a file system Orbax then gives its folder its number. In a bucket, also a
  mounted one, it writes a file and the time; the latter survives a copy.
  """
  if paths.is_file(os.path.join(folder, 'commit_success.txt')):
    return True
  facts = _metadata(folder)
  if not facts:
    return not paths.in_bucket(folder)
  return bool(facts.get('commit_timestamp_nsecs'))


def read(path, function):
  """Returns `function(folder)` for the step that `path` stands for.

  Args:
    path: see `step_folder`.
    function: reads a step's folder; raises `Damaged` if it cannot.

  Raises:
    UserError: no checkpoint at `path`, or a damaged one. The message names
      the newest step beside it for which `function` works.
  """
  folder = step_folder(path)
  try:
    return function(folder)
  except Damaged as e:
    raise errors.UserError(f'{e}; {_newest_whole(folder, function)}') from e


def _newest_whole(damaged, function):
  """Names the newest readable step beside a damaged one."""
  parent, name = os.path.split(damaged)
  for step in sorted(_steps(parent), reverse=True):
    folder = os.path.join(parent, str(step))
    if str(step) == name:
      continue
    try:
      function(folder)
      return f'the newest whole step is {folder!r}'
    except errors.UserError:
      pass
  return 'no other step beside it is whole'


def meta(path):
  """Reads the meta data of a checkpoint, without its arrays.

  Args:
    path: see `step_folder`.

  Returns:
    dict: 'config' as it was stored (`training.old_names.modernise` reads
    it), 'tokenizer', 'labels', 'answers' and 'step'.

  Raises:
    UserError: no checkpoint there, or a damaged one.
  """
  def whole(folder):
    check_items(folder)
    return meta_of(folder)
  return read(path, whole)


def meta_of(folder):
  """`meta` of a step's folder; raises `Damaged` if it cannot be read."""
  file = os.path.join(folder, 'meta', 'metadata')
  try:
    found = json.loads(paths.read_text(file))
  except OSError as e:
    raise damaged(folder, 'meta', e) from e
  except (ValueError, RecursionError) as e:
    raise damaged(folder, 'meta', ValueError(f'not JSON: {e}')) from e
  groups = {'config': ('data', 'model'), 'tokenizer': ('kind',),
            'labels': ('classes',)}
  for group, keys in groups.items():
    node = found.get(group) if isinstance(found, dict) else None
    if not isinstance(node, dict) or not all(k in node for k in keys):
      raise Damaged(f'checkpoint: {folder!r} cannot be read: its meta has no '
                    f'{group} with {" and ".join(keys)}')
  return {**found, 'step': int(os.path.basename(folder))}


def check_items(folder, wanted=_ALWAYS, optional=('opt_state',)):
  """Raises `Damaged` if a step lacks an item that was saved with it.

  Args:
    folder: of a step.
    wanted: names of items that are expected where the checkpoint does not list
      its items.
    optional: names of items that may be lacking. Who only predicts can delete
      the largest one.
  """
  items = _listed(folder) or wanted
  lacking = [i for i in items if i not in optional
             and not paths.is_folder(os.path.join(folder, i))]
  if lacking:
    raise Damaged(f'checkpoint: {folder!r} cannot be read: it lacks '
                  + ', '.join(sorted(lacking)))


def _listed(folder):
  """Names of the items that were saved in a step; () if that is not known."""
  items = _metadata(folder).get('item_handlers')
  return tuple(items) if isinstance(items, dict) else ()


def _metadata(folder):
  """What Orbax wrote about a step, {} if that cannot be read."""
  try:
    found = json.loads(paths.read_text(
        os.path.join(folder, '_CHECKPOINT_METADATA')))
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def damaged(folder, item, error):
  """A `Damaged` for an item whose reading raised `error`, of any class.

  If a bucket could not be read, it is a UserError or TryAgain that says so.
  """
  while error.__cause__ is not None:  # Orbax wraps what tensorstore says.
    error = error.__cause__
  if paths.in_bucket(folder) and not isinstance(error, FileNotFoundError):
    found = failures.of(error, f'{os.path.join(folder, item)}: cannot be read')
    if found is not None:
      return found
  why = '' if paths.in_bucket(folder) else _unreadable(
      os.path.join(folder, item))
  if not why and isinstance(error, (TypeError, AttributeError, KeyError)):
    why = 'incomplete'  # Orbax stumbles over what is not there.
  if not why and isinstance(error, OSError) and error.strerror:
    why = error.strerror
  if not why:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    why = re.sub(r' in OCDBT database at .*?"[^"]*"', '', why)
    why = why if len(why) <= _LONGEST else why[:_LONGEST] + '...'
  return Damaged(f'checkpoint: {folder!r} cannot be read: its {item} is '
                 f'damaged ({why})')


def _unreadable(folder):
  """Names a file of `folder` that cannot be opened, or ''."""
  found = []
  for path, folders, names in os.walk(folder, onerror=found.append):
    folders.sort()
    for name in sorted(names):
      try:
        with open(os.path.join(path, name), 'rb'):
          pass
      except OSError as e:
        found.append(e)
  if not found:
    return ''
  file = os.path.relpath(found[0].filename, os.path.dirname(folder))
  return f'{file}: {found[0].strerror}'
