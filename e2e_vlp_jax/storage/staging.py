"""A run's folder in a bucket: a local folder whose files are uploaded.

Objects of a bucket cannot grow. So what grows or is small (metrics.jsonl,
TensorBoard's events, pictures, reports) is written to a local folder, and
uploaded whole: every minute, at every save and at the end. Checkpoints go to
the bucket directly.
"""
import contextlib
import os
import shutil
import sys
import tempfile
import threading

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.storage import paths

SECONDS = 60  # between two uploads


class Folder(os.PathLike):
  """A WORKDIR that is in a bucket.

  os.path.join and the like take it for its local folder; str() is its path in
  the bucket, also in messages.

  Args:
    place: gs://BUCKET/NAME. What is written there is fetched, but for
      checkpoints, pictures and events, which no run reads.
  """

  def __init__(self, place):
    self._place = paths.absolute(place)
    self._parent = tempfile.mkdtemp(prefix='e2e_vlp_jax_')
    self._local = os.path.join(self._parent, os.path.basename(self._place))
    self._seen, self._lock = {}, threading.Lock()
    self._closing, self._failed = threading.Event(), False
    self._thread = threading.Thread(target=self._every_minute, daemon=True)
    os.makedirs(self._local)
    for name in paths.names(self._place):
      path = f'{self._place}/{name}'
      if (not name.startswith(('.', 'events.')) and '.' in name
          and paths.is_file(path)):
        content = paths.read_bytes(path)
        with open(os.path.join(self._local, name), 'wb') as f:
          f.write(content)
    self._seen = dict(self._files())
    self._thread.start()

  def __fspath__(self):
    return self._local

  def __str__(self):
    return self._place

  def upload(self):
    """Uploads what has changed; a failure is said, and tried again later."""
    try:
      self._upload()
      self._failed = False
    except Exception as e:  # Training goes on, whatever it is.
      if not self._failed:
        print(f'warning: {e}', file=sys.stderr, flush=True)
      self._failed = True

  def close(self):
    """The last upload; the local folder is deleted if it works.

    Raises:
      UserError, TryAgain: it does not; names the local folder.
    """
    self._closing.set()
    self._thread.join()
    try:
      self._upload()
    except (errors.UserError, errors.TryAgain) as e:
      raise type(e)(f'{e}; what is missing there is in {self._local}') from e
    shutil.rmtree(self._parent, ignore_errors=True)

  def _every_minute(self):
    while not self._closing.wait(SECONDS):
      self.upload()

  def _upload(self):
    with self._lock:
      for name, state in self._files():
        if self._seen.get(name) != state:
          with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            with open(os.path.join(self._local, name), 'rb') as f:
              content = f.read()
            paths.write(f'{self._place}/{name}', content)
            self._seen[name] = state

  def _files(self):
    """Yields (name, what changes when the file does) of the local files."""
    for folder, _, names in os.walk(self._local):
      for name in sorted(names):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
          found = os.stat(path)
          if not name.endswith('.tmp'):
            yield (os.path.relpath(path, self._local),
                   (found.st_mtime_ns, found.st_size))


@contextlib.contextmanager
def opened(workdir):
  """Gives WORKDIR as a path: itself, or a `Folder` of what is in a bucket."""
  if not paths.in_bucket(workdir):
    yield workdir
    return
  folder = Folder(workdir)
  try:
    yield folder
  except SystemExit:  # A signal stopped the run, which is no error.
    folder.close()
    raise
  except BaseException:
    try:
      folder.close()
    except (errors.UserError, errors.TryAgain) as e:
      print(f'warning: {e}', file=sys.stderr, flush=True)
    raise
  else:
    folder.close()


def check_folder(name, workdir):
  """UserError or TryAgain unless WORKDIR, the value of `name`, can be written.

  Without this, what is computed for a `Folder` would meet its bucket only at
  the end.
  """
  if not isinstance(workdir, Folder):
    files.check_folder(name, workdir)
    return
  with paths.writing(str(workdir)):
    probe = paths.at(f'{workdir}/.probe')
    probe.write_bytes(b'')
    probe.unlink()


def upload(workdir):
  """Uploads what has changed, if WORKDIR is a `Folder`."""
  if isinstance(workdir, Folder):
    workdir.upload()
