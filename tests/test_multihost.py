"""Two real processes are one run; peers that do not come are named."""
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

from e2e_vlp_jax.training import distributed
from tests import kill_and_resume as runs

ALONE = runs.Layout(1, 4)
PAIR = runs.Layout(2, 2)
EVALS = {'eval_batch_size': 24, 'total_steps': 8}


@pytest.fixture(scope='module')
def alone(tiny_scenes, tmp_path_factory):
  """Workdir of an undisturbed run of one process, with evaluation."""
  workdir = tmp_path_factory.mktemp('alone') / 'w'
  runs.finish(runs.start(ALONE, workdir, tiny_scenes, EVALS,
                         config='tests/small_run.py:evaluated'), workdir)
  return workdir


def test_two_processes_are_one_run(alone, tiny_scenes, tmp_path):
  """Same losses, same scores; 16 examples in evaluation batches of 24."""
  workdir = tmp_path / 'w'
  runs.finish(runs.start(PAIR, workdir, tiny_scenes, EVALS,
                         config='tests/small_run.py:evaluated'), workdir)
  a, b = runs.metrics(alone), runs.metrics(workdir)
  assert set(a) == set(b)
  for key in a:
    np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-5,
                               err_msg=str(key))
  scores = [json.loads((w / 'eval.json').read_text())
            for w in (alone, workdir)]
  assert scores[0].keys() == scores[1].keys() and len(scores[0]) > 10
  for key in scores[0]:
    np.testing.assert_allclose(scores[0][key], scores[1][key], atol=1e-3,
                               err_msg=key)
  # Each line is written once: process 0 alone writes.
  steps = [line['step'] for line in map(json.loads, open(
      workdir / 'metrics.jsonl')) if 'train/loss' in line]
  assert steps == list(range(1, 9))
  said = (tmp_path / 'w.0.log').read_text()
  assert 'process 1: ' in said and '2 processes, 4 devices (2 here)' in said


def test_sigterm_to_one_process_stops_both_at_one_step(tiny_scenes, tmp_path):
  """And the run goes on with one process and another mesh."""
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  runs.finish(runs.start(ALONE, whole, tiny_scenes), whole)
  processes = runs.start(PAIR, broken, tiny_scenes)
  runs.wait_for_step(processes, broken, 6)
  processes[1].send_signal(signal.SIGTERM)
  assert runs.finish(processes, broken) == [0, 0]
  step = runs.last_step(broken)
  assert 6 <= step < runs.STEPS
  assert (broken / 'checkpoints' / str(step) / 'params').is_dir()
  second = runs.Layout(1, 4, fsdp=2, tensor=2)
  runs.finish(runs.start(second, broken, tiny_scenes), broken)
  assert runs.difference(broken, whole) <= 1e-4


def test_a_checkpoint_damaged_for_one_host_is_set_aside_by_both(
    alone, tiny_scenes, tmp_path):
  workdir = tmp_path / 'w'
  shutil.copytree(alone, workdir)
  for path in (workdir / 'checkpoints' / '8' / 'params').rglob('*'):
    if path.is_file():
      path.write_bytes(b'not a checkpoint')
  runs.finish(runs.start(PAIR, workdir, tiny_scenes, EVALS,
                         config='tests/small_run.py:evaluated'), workdir)
  assert (workdir / 'damaged_checkpoint_8').is_dir()
  assert runs.last_step(workdir) == 8


@pytest.mark.parametrize('number', [0, 1])
def test_peers_that_do_not_come_are_named(number, tiny_scenes, tmp_path,
                                          monkeypatch):
  monkeypatch.setenv('E2E_VLP_JOIN_TIMEOUT', '5')
  processes = runs.start(PAIR, tmp_path / 'w', tiny_scenes, only=number)
  assert processes[0].wait(runs.PATIENCE) == 75  # to be started again
  log = (tmp_path / f'w.{number}.log').read_text()
  errors = [x for x in log.splitlines() if x.startswith('error:')]
  assert len(errors) == 1 and re.search(r'localhost:\d+', errors[0]), log
  assert '5 s' in errors[0]
  assert ('0 of 1 peers seen', 'nobody answers there')[number] in errors[0]


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


def test_half_of_the_variables_is_an_error(tiny_scenes, tmp_path,
                                           monkeypatch):
  monkeypatch.setenv('E2E_VLP_PROCESSES', '2')
  process, = runs.start(ALONE, tmp_path / 'w', tiny_scenes)
  assert process.wait(runs.PATIENCE) == 2
  assert 'E2E_VLP_COORDINATOR, E2E_VLP_PROCESS: not set' in (
      tmp_path / 'w.0.log').read_text()
