"""A peer in a process of its own, which is killed if it does not answer.

The two processes talk over a pipe: the child is sent what to build, then the
names of what to do, and sends back one answer to each.
"""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import weakref
from multiprocessing import connection

from e2e_vlp_jax import errors
from e2e_vlp_jax import peers

_CHILD = 'from e2e_vlp_jax.peers import process; process.serve()'


class Process:
  """A peer that runs elsewhere. Once it fails, it is not asked again.

  Attributes:
    name: name of the peer.
    version: versions of its libraries; None if it failed before it said.
    parameters: number of its parameters, or None.
    build_s: seconds until it was built, or None.
    times: seconds of each of its steps so far.
    failure: None, or why it was given up: a dict for the report, either
      {'timed_out': True, 'during', 'waited_s'} or {'failed': one line,
      'during'}.
  """

  def __init__(self, name, config, batch, sizes, timeout):
    """Starts the process and waits until the peer is built.

    Args:
      name, config, batch, sizes: see `peers.build`.
      timeout: seconds that any of its answers may take.

    Raises:
      UserError: as `peers.build`.
    """
    peers.load(name)
    self.name, self._timeout = name, timeout
    self.version = self.parameters = self.build_s = self.failure = None
    self.times = []
    self._pipe, theirs = multiprocessing.Pipe()
    self._child = subprocess.Popen(  # pylint: disable=consider-using-with
        [sys.executable, '-c', _CHILD, str(theirs.fileno())],
        pass_fds=[theirs.fileno()], start_new_session=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None,
                                                                sys.path))})
    theirs.close()  # Only the child has it now, so its death is noticed.
    # Also when this process ends.
    self.close = weakref.finalize(self, _kill, self._child)
    start = time.perf_counter()
    found = self._ask('being built', (name, config, batch, sizes))
    if found:
      self.build_s = time.perf_counter() - start
      self.version, self.parameters = found

  def step(self):
    """Lets it run one step, whose seconds are added to `times`."""
    seconds = self._ask('a step' if self.times else 'its first step', 'step')
    if seconds is not None:
      self.times.append(seconds)

  def details(self):
    """The peer's `details()`; {} if it has failed."""
    return self._ask('its last answer', 'details') or {}

  def _ask(self, what, message):
    """Its answer to a message; None if it has failed.

    Args:
      what: what it is asked to do, for the report.
      message: picklable.

    Raises:
      UserError: the peer refuses.
    """
    if self.failure:
      return None
    try:
      self._pipe.send(message)
      if self._pipe.poll(self._timeout):
        kind, answer = self._pipe.recv()
      else:
        kind, answer = 'timed_out', True
    except (EOFError, OSError):  # It is dead; the system may have killed it.
      kind, answer = 'failed', f'its process ended ({self._child.wait()})'
    if kind == 'refused':
      self.close()
      raise errors.UserError(answer)
    if kind == 'answer':
      return answer
    self.failure = {kind: answer, 'during': what}
    if kind == 'timed_out':
      self.failure['waited_s'] = self._timeout
    self.close()
    return None


def _kill(child):
  """Ends a process and those that it started, such as compilers."""
  if child.poll() is None:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def serve():
  """The child: builds a peer and answers until the other process is gone."""
  pipe = connection.Connection(int(sys.argv[1]))
  try:
    peer = peers.build(*pipe.recv())
    pipe.send(('answer', (peer.version, peer.parameters)))
    while True:
      if pipe.recv() == 'step':
        start = time.perf_counter()
        peer.step()
        answer = time.perf_counter() - start
      else:
        answer = peer.details()
      pipe.send(('answer', answer))
  except (EOFError, BrokenPipeError, KeyboardInterrupt):
    pass
  except errors.UserError as e:
    pipe.send(('refused', str(e)))
  except Exception as e:  # pylint: disable=broad-exception-caught
    traceback.print_exc()
    line = ' '.join(f'{type(e).__name__}: {e}'.split())
    pipe.send(('failed', line[:500]))
