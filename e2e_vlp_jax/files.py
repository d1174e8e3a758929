"""Atomic file writing, and locks.

Needs neither jax nor TensorFlow.
"""
import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import time

from e2e_vlp_jax import errors


class InUse(errors.UserError):
  """Another process holds a lock.

  Attributes:
    host: name of its host, '' if unknown.
  """

  def __init__(self, name, who):
    """Args: name of what is locked; who: content of the lock file, or {}."""
    self.host = who.get('host', '')
    holder = (f'process {who["pid"]} on {self.host}, since {who["since"]}'
              if who else 'another process')
    super().__init__(f'{name} is in use by {holder}; wait until it ends, or '
                     'stop it')


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


@contextlib.contextmanager
def lock(path, name):
  """Holds a lock file: one process at a time, on any host that sees the file.

  The operating system releases the lock when the process ends, however it
  ends. So a lock file that a killed process left behind locks nothing. A
  process that was forked meanwhile holds the lock too; a spawned one does not.
  Where the file system has no locks, a line on stderr says so.

  Args:
    path: of the lock file; its folder must exist. It is removed at the end.
    name: of what is locked, for the error.

  Raises:
    InUse: another process holds it; names its number and host.
    UserError: the file cannot be written.
  """
  try:
    f = _locked(path, name)
  except OSError as e:
    raise errors.UserError(f'{path}: cannot be written ({e.strerror})') from e
  with f:
    f.truncate(0)
    json.dump(dict(pid=os.getpid(), host=socket.gethostname(),
                   since=time.strftime('%Y-%m-%d %H:%M:%S')), f)
    f.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        os.remove(path)  # Before it is unlocked: see `_locked`.


def _locked(path, name):
  """The open lock file, locked."""
  while True:
    f = open(path, 'a+', encoding='utf-8')  # pylint: disable=consider-using-with
    try:
      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      with f:
        raise InUse(name, _holder(f)) from e
    except OSError as e:
      if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        f.close()
        raise
      print(f'{path}: this file system has no locks; nothing prevents a '
            'second command here', file=sys.stderr)
      return f
    # The one before us may have removed the file between the two lines above;
    # then the next to come would lock another file of this name.
    try:
      if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
        return f
    except FileNotFoundError:
      pass
    f.close()


def _holder(f):
  """What a lock file says of who holds it, {} if nothing yet."""
  f.seek(0)
  try:
    who = json.load(f)
  except ValueError:
    return {}
  return who if {'pid', 'host', 'since'} <= set(who) else {}


def check_writable(name, path):
  """UserError unless `path`, the value of argument `name`, can be written."""
  if '://' in path:
    raise errors.UserError(f'{name}: {path!r}; expected a file of the file '
                           'system')
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
