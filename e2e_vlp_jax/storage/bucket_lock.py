"""A lock in a bucket: one run at a time uses gs://BUCKET/NAME.

A bucket releases no lock when a process dies. So the holder writes a sign of
life every few seconds, and who finds a lock without one for a minute takes it
over. Each writing has the condition that nobody else has written in between.
"""
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.storage import failures
from e2e_vlp_jax.storage import paths

BEAT = 15  # seconds between two signs of life
DEAD = 60  # seconds without one


@contextlib.contextmanager
def lock(folder, name):
  """Holds the lock of a bucket's folder.

  Args:
    folder: gs://BUCKET/NAME.
    name: of what is locked, for the error.

  Raises:
    InUse: another process holds it; names its number and host.
    UserError: the bucket does not exist or cannot be written.
    TryAgain: it fails in a way that may pass.
  """
  held = _Lock(folder, name)
  with _failures(name):
    held.take()
  ends = threading.Event()
  beats = threading.Thread(target=held.beat, args=(ends,), daemon=True)
  beats.start()
  try:
    yield
  finally:
    ends.set()
    beats.join()
    held.release()


class _Lock:
  """The object FOLDER/.lock."""

  def __init__(self, folder, name):
    assert paths.in_bucket(folder)
    from google.api_core import exceptions  # pylint: disable=g-import-not-at-top
    from google.cloud import storage  # pylint: disable=g-import-not-at-top
    self._errors, self._name = exceptions, name
    bucket, _, path = folder.removeprefix('gs://').partition('/')
    # Objects need no project; without one the client would ask for it.
    client = storage.Client(project=os.environ.get('GOOGLE_CLOUD_PROJECT', '-'))
    self._blob = client.bucket(bucket).blob(f'{path}/.lock'.lstrip('/'))
    self._generation = 0  # of what we wrote; 0: nothing is there
    self._who = dict(pid=os.getpid(), host=socket.gethostname(),
                     since=time.strftime('%Y-%m-%d %H:%M:%S'),
                     run=uuid.uuid4().hex)

  def take(self):
    seen, since = 0, time.monotonic()
    while not self._write():
      who, generation = self._read()
      if seen and generation != seen:
        raise files.InUse(self._name, who)
      if not seen and who:
        seen, since = generation, time.monotonic()
        if not _gone(who):
          print(f'{self._name}: locked by process {who["pid"]} on '
                f'{who["host"]}; waiting up to {DEAD} s, in case it is gone',
                file=sys.stderr, flush=True)
      if not who or _gone(who) or time.monotonic() - since > DEAD:
        self._generation = generation  # Take over exactly this one.
      else:
        time.sleep(1)

  def beat(self, ends):
    """Writes signs of life until the event `ends`."""
    while not ends.wait(BEAT):
      with contextlib.suppress(Exception):  # The next one may get through.
        if self._write():
          continue
        who, generation = self._read()
        if who.get('run') == self._who['run']:  # Written, but the answer lost.
          self._generation = generation
          continue
        print(f'error: {files.InUse(self._name, who)}: it took this run for '
              'dead', file=sys.stderr, flush=True)
        os._exit(errors.EXIT_MISTAKE)  # Two runs must not write there.

  def release(self):
    with contextlib.suppress(Exception):  # Or it is taken for dead later.
      self._blob.delete(if_generation_match=self._generation)

  def _write(self):
    """Writes it if nobody else has since `_generation`; whether that worked."""
    blob = self._blob.bucket.blob(self._blob.name)
    try:
      blob.upload_from_string(json.dumps(self._who),
                              if_generation_match=self._generation)
    except self._errors.PreconditionFailed:
      return False
    except self._errors.NotFound as e:
      raise errors.UserError(f'{self._name}: no bucket '
                             f'{self._blob.bucket.name!r}') from e
    self._generation = blob.generation
    return True

  def _read(self):
    """(who holds it, generation); ({}, 0) if nobody does."""
    while True:
      blob = self._blob.bucket.get_blob(self._blob.name)  # the newest
      if blob is None:
        return {}, 0
      try:
        return json.loads(blob.download_as_bytes()), blob.generation
      except self._errors.NotFound:
        pass  # A sign of life came in between.


def _gone(who):
  """Whether the holder was a process of this host that is no more."""
  if who['host'] != socket.gethostname():
    return False
  if who['pid'] == os.getpid():  # The number of a dead one, ours now.
    return True
  try:
    os.kill(who['pid'], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return False


@contextlib.contextmanager
def _failures(name):
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # google.auth and google.api_core raise many classes.
    found = failures.of(e, f'{name}: cannot be written')
    if found is None:
      raise
    raise found from e
