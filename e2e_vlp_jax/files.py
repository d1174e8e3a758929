"""Atomic file writing, and the meta data of checkpoints.

Needs neither jax nor TensorFlow.
"""
import json
import os
import tempfile

from e2e_vlp_jax import errors

CHECKPOINTS = 'checkpoints'  # the folder of a WORKDIR


def write(path, text):
  """Writes `text` to a file atomically: no reader sees it half written.

  Raises:
    UserError: `path` cannot be written.
  """
  try:
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
      f.write(text)
    os.replace(path + '.tmp', path)
  except OSError as e:
    raise errors.UserError(f'{path}: cannot be written ({e.strerror})') from e


def write_json(path, value):
  """Writes a JSON-able value with `write`."""
  write(path, json.dumps(value, indent=1))


def check_writable(name, path):
  """UserError unless `path`, the value of argument `name`, can be written."""
  try:
    with open(path, 'a', encoding='utf-8'):
      pass
  except OSError as e:
    raise errors.UserError(f'{name}: {path!r} cannot be written '
                           f'({e.strerror})') from e


def check_folder(name, path):
  """Creates folder `path`; UserError unless files can be written there."""
  try:
    os.makedirs(path, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
  except OSError as e:
    raise errors.UserError(f'{name} {path}: cannot be written '
                           f'({e.strerror})') from e


def step_folder(path):
  """Finds the folder of one step, given itself, its parent or its WORKDIR.

  Raises:
    UserError: there is no checkpoint at `path`.
  """
  path = os.path.abspath(path)
  if os.path.isdir(os.path.join(path, CHECKPOINTS)):
    path = os.path.join(path, CHECKPOINTS)
  if os.path.isdir(os.path.join(path, 'params')):
    return path
  steps = ([int(d) for d in os.listdir(path) if d.isdigit()
            and os.path.isdir(os.path.join(path, d, 'params'))]
           if os.path.isdir(path) else [])
  if not steps:
    raise errors.UserError(
        f'checkpoint: none found at {path!r}; expected a WORKDIR, its '
        f'{CHECKPOINTS}/ folder or one of the steps in it')
  return os.path.join(path, str(max(steps)))


def checkpoint_meta(path):
  """Reads the meta data of a checkpoint, without its arrays.

  Args:
    path: see `step_folder`.

  Returns:
    dict: 'config' as it was stored (`training.old_names.modernise` reads
    it), 'tokenizer', 'labels', 'answers' and 'step'.

  Raises:
    UserError: no checkpoint there, or not readable.
  """
  folder = step_folder(path)
  try:
    with open(os.path.join(folder, 'meta', 'metadata'), encoding='utf-8') as f:
      meta = json.load(f)
  except (OSError, ValueError) as e:
    raise errors.UserError(f'checkpoint: {folder!r} cannot be read: {e}'
                           ) from e
  return {**meta, 'step': int(os.path.basename(folder))}
