"""Two real processes are one run; peers that do not join are named."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import distributed
from tests import kill_and_resume as runs

ALONE = runs.Layout(1, 4)
PAIR = runs.Layout(2, 2)
EVALUATED = {'config': 'tests/small_run.py:evaluated',
             'overrides': {'eval_batch_size': 24}}


@pytest.fixture(scope='module')
def alone(tiny_scenes, tmp_path_factory):
  """Workdir of an undisturbed run of one process, with evaluation."""
  workdir = tmp_path_factory.mktemp('alone') / 'w'
  runs.finish(runs.start(ALONE, workdir, tiny_scenes, **EVALUATED), workdir)
  return workdir


def train_steps(workdir):
  with open(workdir / 'metrics.jsonl', encoding='utf-8') as f:
    return [line['step'] for line in map(json.loads, f)
            if 'train/loss' in line]


def assert_same_metrics(ours, theirs):
  assert set(ours) == set(theirs)
  for key in theirs:
    np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5,
                               err_msg=str(key))


def test_two_processes_continue_before_a_damaged_checkpoint(
    alone, tiny_scenes, tmp_path):
  """Both set it aside; the last steps and the scores are those of one process.

  16 examples are evaluated in batches of 24. The first steps of two processes:
  test_sigterm_to_one_process_stops_both_at_one_step.
  """
  workdir, end = tmp_path / 'w', runs.STEPS
  shutil.copytree(alone, workdir)
  for path in (workdir / 'checkpoints' / str(end) / 'params').rglob('*'):
    if path.is_file():
      path.write_bytes(b'not a checkpoint')
  runs.finish(runs.start(PAIR, workdir, tiny_scenes, **EVALUATED), workdir)
  assert (workdir / f'damaged_checkpoint_{end}').is_dir()
  assert_same_metrics(runs.metrics(workdir), runs.metrics(alone))
  scores = [json.loads((w / 'eval.json').read_text())
            for w in (alone, workdir)]
  assert scores[0].keys() == scores[1].keys() and len(scores[0]) > 10
  for key in scores[0]:
    np.testing.assert_allclose(scores[0][key], scores[1][key], atol=1e-3,
                               err_msg=key)
  # Each line is written once, because process 0 alone writes.
  assert train_steps(workdir) == [
      *range(1, end + 1), *range(end - runs.SAVE_EVERY + 1, end + 1)]
  said = (tmp_path / 'w.0.log').read_text()
  assert 'process 1: ' in said and '2 processes, 4 devices (2 here)' in said


def test_sigterm_to_one_process_stops_both_at_one_step(alone, tiny_scenes,
                                                       tmp_path):
  """And one process continues the run of two, on another mesh."""
  workdir = tmp_path / 'w'
  processes = runs.start(PAIR, workdir, tiny_scenes)
  runs.wait_for_step(processes, workdir, 6)
  processes[1].send_signal(signal.SIGTERM)
  assert runs.finish(processes, workdir) == [0, 0]
  step = runs.last_step(workdir)
  assert 6 <= step < runs.STEPS
  assert (workdir / 'checkpoints' / str(step) / 'params').is_dir()
  second = runs.Layout(1, 4, fsdp=2, tensor=2)
  runs.finish(runs.start(second, workdir, tiny_scenes), workdir)
  assert train_steps(workdir) == list(range(1, runs.STEPS + 1))
  assert_same_metrics(runs.metrics(workdir), runs.metrics(alone))


@pytest.mark.long
def test_saves_by_time_carry_a_kill(tiny_scenes, tmp_path):
  """No step is due by its number; two processes save by the clock of one.

  Killed without notice, they go on from there and repeat steps to the bit.
  """
  workdir = tmp_path / 'w'
  saved = lambda: max((int(p.name) for p in workdir.glob('checkpoints/*')
                       if p.name.isdigit()), default=0)
  start = lambda: runs.start(
      PAIR, workdir, tiny_scenes, {
          'checkpoint.every_steps': 0, 'checkpoint.every_minutes': .02,
          'total_steps': 16}, config='tests/small_run.py:light')
  processes = start()
  while not 0 < saved() < runs.last_step(workdir) - 1:
    assert all(p.poll() is None for p in processes)
    time.sleep(.02)
  runs.kill(processes)
  step = saved()
  runs.finish(start(), workdir)
  assert f'resumed at step {step}' in (tmp_path / 'w.0.log').read_text()
  found = {}
  with open(workdir / 'metrics.jsonl', encoding='utf-8') as f:
    for line in filter(lambda x: 'train/loss' in x, map(json.loads, f)):
      found.setdefault(line['step'], []).append(
          {k: v for k, v in line.items() if k.startswith('train/')})
  assert list(found) == list(range(1, 17))
  twice = [x for x in found.values() if len(x) == 2]
  assert twice and all(a == b for a, b in twice)


def test_peers_that_do_not_join_are_named(tiny_scenes, tmp_path, monkeypatch):
  """Process 0 waits for 1, and in another run 1 for 0."""
  monkeypatch.setenv('E2E_VLP_JOIN_TIMEOUT', '5')
  started = [runs.start(PAIR, tmp_path / f'w{i}', tiny_scenes, only=i)[0]
             for i in range(2)]
  for i, what in enumerate(('0 of 1 peers seen', 'nobody answers there')):
    assert started[i].wait(runs.PATIENCE) == 75  # to be started again
    log = (tmp_path / f'w{i}.{i}.log').read_text()
    said = [x for x in log.splitlines() if x.startswith('error:')]
    assert len(said) == 1 and re.search(r'localhost:\d+', said[0]), log
    assert '5 s' in said[0] and what in said[0]


@pytest.mark.parametrize('variables,message', [
    ({'PROCESSES': '2'}, 'E2E_VLP_COORDINATOR, E2E_VLP_PROCESS: not set'),
    ({'COORDINATOR': 'localhost:1', 'PROCESSES': '2', 'PROCESS': '2'},
     "E2E_VLP_PROCESS: '2', expected a whole number from 0 to 1"),
    ({'COORDINATOR': 'host0', 'PROCESSES': '2', 'PROCESS': '1'},
     "E2E_VLP_COORDINATOR: 'host0', expected host:port"),
    ({'DISTRIBUTED': 'yes'}, "E2E_VLP_DISTRIBUTED: 'yes'")])
def test_wrong_variables_are_user_errors(variables, message, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(f'E2E_VLP_{name}', value)
  with pytest.raises(errors.UserError, match=message):
    distributed.join()


JOIN = '''
from e2e_vlp_jax.training import distributed
distributed.join()
import jax
from jax._src import xla_bridge
print('visible', xla_bridge.CUDA_VISIBLE_DEVICES.value, jax.device_count())
'''


@pytest.fixture
def start_pair():
  """Starts two programs as processes of a run, with all that srun sets."""
  processes = []

  def start(*programs, late=0):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    for i, program in enumerate(programs):
      time.sleep(late * i)
      env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS':
             '--xla_force_host_platform_device_count=4',
             'E2E_VLP_COORDINATOR': f'localhost:{port}',
             'E2E_VLP_PROCESSES': '2', 'E2E_VLP_PROCESS': str(i),
             'SLURM_JOB_ID': '4100', 'SLURM_STEP_NODELIST': 'n[1-2]',
             'SLURM_NTASKS': '2', 'SLURM_PROCID': str(i),
             'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_NODES': '2'}
      processes.append(subprocess.Popen(
          [sys.executable, '-c', program], cwd=runs.REPO, env=env, text=True,
          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return processes
  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize('late', [0, 8])
def test_joining_under_slurm(late, start_pair, monkeypatch):
  """jax must not take one device of each for ours, as it would under srun.

  One peer comes late: ten of thirty minutes, on a clock that is shortened.
  """
  monkeypatch.setenv('E2E_VLP_JOIN_TIMEOUT', '60' if late else '300')
  for process in start_pair(JOIN, JOIN, late=late):
    said, _ = process.communicate(timeout=runs.PATIENCE)
    assert process.returncode == 0, said
    assert 'visible all 8' in said, said


def test_a_process_that_fails_is_gone_at_once(start_pair):
  """It does not wait for its peers, which wait for it."""
  first, second = start_pair(JOIN + 'import time; time.sleep(600)',
                             JOIN + 'raise ValueError("here")')
  said, _ = second.communicate(timeout=runs.PATIENCE)
  assert second.returncode == 1 and 'ValueError: here' in said
  assert first.poll() is None


LOOKS = JOIN + """
import os, signal, sys, time
from e2e_vlp_jax.training import distributed, stop_signal
mine = jax.process_index()
with stop_signal.StopSignal() as stop:
  for n in range(600):
    if n == 5 and mine:
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(.02 + .03 * mine)
    distributed.wait_for_all(f'step{n}') if n % 7 == 0 else None
    try:
      stop.look() if n % 3 else stop.break_off()
    except stop_signal.Stopped:
      pass
    if stop.requested:
      break
print('stopped', n)
"""


def test_all_processes_stop_at_one_look(start_pair):
  """The signal reaches the slower one alone, in an evaluation perhaps."""
  said = [p.communicate(timeout=runs.PATIENCE)[0]
          for p in start_pair(LOOKS, LOOKS)]
  at = [re.search(r'stopped (\d+)', text) for text in said]
  assert all(at), said
  assert at[0][1] == at[1][1] and 5 <= int(at[0][1]) < 599


def test_pods_wait_longest(monkeypatch):
  """A slice may come half an hour after the others."""
  monkeypatch.setenv('E2E_VLP_DISTRIBUTED', 'auto')
  monkeypatch.delenv('E2E_VLP_JOIN_TIMEOUT', raising=False)
  jax = mock.MagicMock()
  jax.distributed.initialize.side_effect = InterruptedError
  monkeypatch.setattr(distributed, 'jax', jax)
  timer = mock.MagicMock()
  monkeypatch.setattr(distributed.threading, 'Timer', timer)
  with pytest.raises(InterruptedError):
    distributed.join()
  assert timer.call_args.args[0] == 1800
  assert jax.distributed.initialize.call_args.kwargs == {
      'initialization_timeout': 1860}
