"""Paths of a file system, or of a bucket of Google Cloud Storage.

gs://BUCKET/NAME works where a run or a checkpoint is named. etils.epath reads
and writes it through gcsfs, which is not installed by default. Prepared data
have to be in the file system (`check_local`). Needs neither jax nor TensorFlow.
"""
import contextlib
import os
import re

# Else epath goes to buckets through TensorFlow, which takes seconds to import
# and raises errors of its own.
os.environ.setdefault('EPATH_USE_TF', 'false')
# Else gcsfs asks for each bucket's kind, by another service.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

from etils import epath  # noqa: E402

from e2e_vlp_jax import errors  # noqa: E402
from e2e_vlp_jax.storage import failures  # noqa: E402


MOUNTS = '/proc/mounts'


def in_bucket(path):
  """Whether a path is that of a bucket.

  Raises:
    UserError: it is of neither kind, or gcsfs is not installed.
  """
  path = str(path)
  if '://' not in path:
    return False
  if not re.fullmatch(r'gs://[a-z0-9][-_.a-z0-9]+[a-z0-9](/.*)?', path):
    raise errors.UserError(f'{path}: expected a path of the file system, or '
                           'gs://BUCKET/NAME')
  try:
    import fsspec  # pylint: disable=g-import-not-at-top
    import gcsfs  # noqa: F401  # pylint: disable=g-import-not-at-top
  except ImportError as e:
    raise errors.UserError(f'{path}: buckets need the extra gcs: '
                           'pip install "e2e_vlp_jax[gcs]"') from e
  # Another host may have written meanwhile.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return True


def absolute(path):
  """A path that does not depend on the current folder."""
  path = str(path)
  return path.rstrip('/') if in_bucket(path) else os.path.abspath(path)


def at(path, *names):
  """The `epath.Path` of `path`/NAME/..., which has the methods of pathlib's."""
  in_bucket(path)
  return epath.Path(str(path), *names)


def is_folder(path):
  with _failures(path):
    return at(path).is_dir()


def is_file(path):
  with _failures(path):
    return at(path).is_file()


def names(path):
  """Names of what is in a folder; [] if there is no such folder.

  Raises:
    UserError, TryAgain: it cannot be listed.
  """
  try:
    with _failures(path):
      return [x.name for x in at(path).iterdir()]
  except (FileNotFoundError, NotADirectoryError):
    return []


def read_text(path):
  """The text of a file; OSError or ValueError as `open` and `read` raise them.

  Raises:
    UserError, TryAgain: a bucket fails in another way.
  """
  with _failures(path):
    return at(path).read_text(encoding='utf-8')


def read_bytes(path):
  """The content of a file; raises what `read_text` does."""
  with _failures(path):
    return at(path).read_bytes()


def write(path, content):
  """Writes text or bytes to a file, which no reader sees half written.

  Raises:
    UserError, TryAgain: it cannot be written.
  """
  content = content.encode() if isinstance(content, str) else content
  with writing(path):
    at(path).write_bytes(content)


@contextlib.contextmanager
def writing(path):
  """Context in which `path` is written: a bucket that fails is one line.

  Raises:
    UserError, TryAgain: it fails; the former if there is no such bucket.
  """
  try:
    with _failures(path, 'cannot be written'):
      yield
  except FileNotFoundError as e:  # Nothing else can be absent in a bucket.
    if not in_bucket(path):
      raise
    raise errors.UserError(f'{path}: cannot be written: no such bucket') from e


def check_local(name, path):
  """UserError if `path`, the value of `name`, is not of the file system."""
  if '://' in path:
    raise errors.UserError(
        f'{name}: {path!r}; prepared data are read from the file system: '
        'copy them (gcloud storage rsync --recursive) or mount the bucket '
        '(gcsfuse); only runs and checkpoints may be named by gs://')


def renames_folders(path):
  """Whether a folder gets another name in one step: not on a mounted bucket.

  Buckets with a hierarchical namespace can, but one cannot see which have it.
  """
  if in_bucket(path):
    return False
  path, best, kind = os.path.realpath(path), '', ''
  with contextlib.suppress(OSError), open(MOUNTS, encoding='utf-8') as f:
    for line in f:
      _, point, found, *_ = line.split()
      point = point.replace('\\040', ' ')
      if len(point) >= len(best) and (
          path == point or path.startswith(point.rstrip('/') + '/')):
        best, kind = point, found
  return kind != 'fuse.gcsfuse'


@contextlib.contextmanager
def _failures(path, what='cannot be read'):
  """What a bucket's libraries raise becomes a line, but for what is absent."""
  try:
    yield
  except (errors.UserError, errors.TryAgain):
    raise
  except Exception as e:  # gcsfs, aiohttp and google.auth raise many classes.
    if not in_bucket(path) or isinstance(e, (FileNotFoundError,
                                             NotADirectoryError)):
      raise
    found = failures.of(e, f'{path}: {what}')
    if found is None:
      raise
    raise found from e
