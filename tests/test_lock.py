"""A lock file: one process at a time, and the dead hold nothing."""
import os
import signal
import socket
import subprocess
import sys

import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import files

HOLD = '''
import sys, time
from e2e_vlp_jax import files
with files.lock(sys.argv[1], 'data/x'):
  print('held', flush=True)
  time.sleep(600)
'''


@pytest.fixture
def holder(tmp_path):
  """(path of a lock file, a process that holds it)."""
  path = str(tmp_path / '.lock')
  with subprocess.Popen([sys.executable, '-c', HOLD, path],
                        stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b'held\n'
    yield path, process
    process.kill()


def test_the_second_is_told_who_holds_it(holder):
  path, process = holder
  with pytest.raises(errors.UserError, match=(
      f'data/x is in use by process {process.pid} on '
      f'{socket.gethostname()}, since 2')):
    with files.lock(path, 'data/x'):
      pass
  assert os.path.exists(path)


def test_a_killed_process_holds_nothing(holder):
  path, process = holder
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert os.path.exists(path)
  for _ in range(2):
    with files.lock(path, 'data/x'):
      with pytest.raises(errors.UserError, match=f'process {os.getpid()} on'):
        with files.lock(path, 'data/x'):
          pass
    assert not os.path.exists(path)


def test_an_error_inside_releases_it(tmp_path):
  path = str(tmp_path / '.lock')
  with pytest.raises(KeyError):
    with files.lock(path, 'data/x'):
      raise KeyError
  with files.lock(path, 'data/x'):
    pass


def test_a_folder_that_cannot_be_written(tmp_path):
  with pytest.raises(errors.UserError, match='none/.lock: cannot be written'):
    with files.lock(str(tmp_path / 'none/.lock'), 'data/x'):
      pass
