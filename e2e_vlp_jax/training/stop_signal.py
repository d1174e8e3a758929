"""SIGTERM and Ctrl-C end a run after the current step instead of at once.

An evaluation, which can take many minutes, is broken off.
"""
import os
import signal

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
  """A stop has been requested; see `StopSignal.break_off`."""


class StopSignal:
  """Asks the training loop to stop; a context manager.

  Inside it, SIGTERM and the first Ctrl-C only request a stop; a second Ctrl-C
  interrupts as usual. On exit the old signal handlers are restored.

  With several processes, the signal may arrive at different times, or at only
  one of them. Then jax's preemption service handles SIGTERM and chooses a call
  of `look` that all of them reach, so that all must call it equally often.

  Attributes:
    requested: the run should save and end. Changes in `look` alone, so that its
      value is constant in the body of a loop.
    exit_code: exit code of such a process: 0, or 130 after Ctrl-C.
  """

  def __init__(self):
    self.requested, self.exit_code = False, 0
    self._signalled = False
    self._several = jax.process_count() > 1
    self._looks = 0
    self._old_handlers = {}

  def __enter__(self):
    numbers = [signal.SIGINT] + [signal.SIGTERM] * (not self._several)
    for number in numbers:
      self._old_handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *unused):
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)

  def look(self):
    """Sets `requested` if the run ends here, on all hosts."""
    self._looks += 1
    if self._several:
      self.requested |= multihost_utils.reached_preemption_sync_point(
          self._looks)
    else:
      self.requested = self._signalled

  def break_off(self):
    """Looks; raises `Stopped` if the run ends here, on all hosts."""
    self.look()
    if self.requested:
      raise Stopped

  def _handle(self, number, frame):
    if number == signal.SIGINT:
      if self.exit_code:
        signal.default_int_handler(number, frame)  # The second Ctrl-C.
      self.exit_code = 130
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._signalled = True
