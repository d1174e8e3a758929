"""One training at a time in a WORKDIR; the dead hold nothing."""
import json
import os
import signal
import socket
import subprocess
import time

import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import sweep
from e2e_vlp_jax import train
from e2e_vlp_jax.training import distributed
from e2e_vlp_jax.training import workdir as workdir_lib
from tests import kill_and_resume as runs

LIGHT = 'tests/small_run.py:light'


def start(workdir, data, steps=5000):
  process, = runs.start(runs.Layout(1, 1), workdir, data,
                        {'total_steps': steps}, config=LIGHT,
                        output=subprocess.PIPE)
  return process


def test_the_second_says_who_trains_and_a_killed_one_holds_nothing(
    tiny_scenes, tmp_path):
  workdir = tmp_path / 'w'
  first = start(workdir, tiny_scenes)
  try:
    runs.wait_for_step([first], workdir, 2)
    before = (workdir / 'config.json').stat().st_mtime_ns
    second = start(workdir, tiny_scenes)
    out, err = map(bytes.decode, second.communicate(timeout=runs.PATIENCE))
    said = [x for x in err.splitlines() if x.startswith('error: ')]
    assert second.returncode == 2 and len(said) == 1, out + err
    assert 'Traceback' not in err
    assert said[0].startswith(
        f'error: --workdir {workdir} is in use by process {first.pid} on '
        f'{socket.gethostname()}, since 20'), said
    # It touched nothing, and the first goes on.
    assert (workdir / 'config.json').stat().st_mtime_ns == before
    reached = runs.last_step(workdir)
    runs.wait_for_step([first], workdir, reached + 2)
    assert first.poll() is None
  finally:
    first.send_signal(signal.SIGKILL)
    first.communicate()
  assert (workdir / '.lock').exists()
  last = runs.last_step(workdir)
  third = start(workdir, tiny_scenes, steps=last + 1)
  _, err = third.communicate(timeout=runs.PATIENCE)
  assert third.returncode in (0, 2), err
  # `total_steps` differs, which is said; the lock is no obstacle.
  assert b'in use' not in err and b'total_steps' in err
  assert not (workdir / '.lock').exists()


def held(path, **changes):
  """Holds the lock of `path`, as process 1 of another host would."""
  lock = files.lock(str(path / '.lock'), 'w')
  lock.__enter__()  # pylint: disable=unnecessary-dunder-call
  who = dict(pid=1, host='node7', since='2026-01-01 00:00:00', **changes)
  (path / '.lock').write_text(json.dumps(who))
  return lock


def test_the_lock_of_another_host_is_waited_for(tmp_path, monkeypatch, capsys):
  """Its file server may keep the lock of a host that died for a while."""
  lock = held(tmp_path)
  naps = []

  def nap(seconds):
    naps.append(seconds)
    if len(naps) == 3:
      lock.__exit__(None, None, None)
  monkeypatch.setattr(time, 'sleep', nap)
  with workdir_lib.only_run(str(tmp_path)):
    assert len(naps) == 3
  assert capsys.readouterr().err.count('locked from node7; waiting') == 1


def test_and_refused_if_that_host_lives(tmp_path, monkeypatch):
  lock = held(tmp_path)
  now = [0.]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(time, 'sleep', lambda s: now.__setitem__(0, now[0] + s))
  with pytest.raises(errors.UserError, match='in use by process 1 on node7'):
    with workdir_lib.only_run(str(tmp_path)):
      pass
  assert 100 < now[0] < 200
  lock.__exit__(None, None, None)


def test_process_0_holds_it_for_all(tmp_path, monkeypatch):
  """Others take no lock, and end with it if it is refused."""
  monkeypatch.setattr(workdir_lib.jax, 'process_index', lambda: 1)
  with workdir_lib.only_run(str(tmp_path)):
    assert not os.listdir(tmp_path)
  monkeypatch.setattr(distributed, 'everywhere', lambda flag: False)
  with pytest.raises(errors.UserError, match='another process cannot use'):
    with workdir_lib.only_run(str(tmp_path)):
      pass


def test_a_refused_run_releases_it(tiny_scenes, tmp_path, monkeypatch):
  monkeypatch.chdir(runs.REPO)
  command = ['--config', LIGHT, f'--config.data.dir={tiny_scenes}',
             '--workdir', str(tmp_path), '--config.total_steps=1']
  (tmp_path / 'metrics.jsonl').write_text('')
  (tmp_path / 'config.json').write_text('{"seed": 5}')
  with pytest.raises(SystemExit):
    train.main(command)
  assert not (tmp_path / '.lock').exists()


def test_two_sweeps(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(runs.REPO)
  monkeypatch.setattr(sweep.runs_lib, 'run_here',
                      lambda runs, after: pytest.fail())
  with files.lock(str(tmp_path / '.lock'), 'w'):
    with pytest.raises(SystemExit) as e:
      sweep.main(['--config', 'tests/small_run.py', '--workdir',
                  str(tmp_path)])
  assert e.value.code == 2
  assert f'in use by process {os.getpid()} on' in capsys.readouterr().err
