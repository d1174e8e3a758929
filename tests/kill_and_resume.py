"""Kills real runs at random moments and looks where they end.

  python -m tests.kill_and_resume --trials 20 [--first 0] [--seed 0]
      [--folder DIR]

A trial starts a small run on some number of processes and some mesh, kills
it at a random moment (SIGKILL, or SIGTERM to one of its processes), starts it
again, perhaps on other processes or another mesh, and compares the metrics of
its last steps with those of a run that nobody disturbed: equal to the bit on
the same layout, to 1e-4 on another. It also counts the steps that were lost.
"""
import argparse
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np

from tests import xla_flags

REPO = pathlib.Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY, COMPARED = 24, 4, 3
PATIENCE = 600  # seconds for a run of seconds, on a busy machine


class Layout(NamedTuple):
  """Processes, devices of each, and the mesh over all of them."""
  processes: int
  devices: int
  fsdp: int = 1
  tensor: int = 1

  def __str__(self):
    return (f'{self.processes} x {self.devices} devices, fsdp {self.fsdp}, '
            f'tensor {self.tensor}')


LAYOUTS = (Layout(1, 1), Layout(1, 4), Layout(1, 4, fsdp=4),
           Layout(1, 4, fsdp=2, tensor=2), Layout(2, 2), Layout(2, 2, fsdp=2),
           Layout(2, 2, tensor=4))


def start(layout, workdir, data_dir, overrides=(),
          config='tests/small_run.py', only=None, output=None):
  """Starts a run's processes; their output goes to files beside `workdir`.

  Args:
    layout: a Layout.
    workdir, data_dir: paths.
    overrides: {config key: value}.
    config: --config.
    only: number of the one process to start, as if the others did not come.
    output: where their output goes instead.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  values = {'data.dir': data_dir, 'total_steps': STEPS,
            'checkpoint.every_steps': SAVE_EVERY, 'mesh.fsdp': layout.fsdp,
            'mesh.tensor': layout.tensor, **dict(overrides)}
  command = [sys.executable, '-m', 'e2e_vlp_jax.train', '--config', config,
             '--workdir', str(workdir),
             *(f'--config.{k}={v}' for k, v in values.items())]
  processes = []
  for i in range(layout.processes) if only is None else (only,):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(
        f'{k}={v}' for k, v in xla_flags.flags(layout.devices))}
    env.setdefault('JAX_COMPILATION_CACHE_DIR', f'{data_dir}/jax_cache')
    env.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
    if layout.processes > 1:
      env |= {'E2E_VLP_COORDINATOR': f'localhost:{port}',
              'E2E_VLP_PROCESSES': str(layout.processes),
              'E2E_VLP_PROCESS': str(i)}
    with open(f'{workdir}.{i}.log', 'a') as log:
      processes.append(subprocess.Popen(command, cwd=REPO, env=env,
                                        stdout=output or log,
                                        stderr=output or log))
  return processes


def finish(processes, workdir):
  """Waits; the exit codes, or an error with the end of the logs."""
  try:
    codes = [p.wait(PATIENCE) for p in processes]
  except subprocess.TimeoutExpired:
    kill(processes)
    codes = ['hangs']
  if any(codes):
    logs = [pathlib.Path(f'{workdir}.{i}.log').read_text()[-1500:]
            for i in range(len(processes))]
    raise RuntimeError(f'exit codes {codes}\n' + '\n---\n'.join(logs))
  return codes


def kill(processes):
  """SIGKILL, as a machine dies; where one host goes, a launcher ends all."""
  for p in processes:
    p.kill()
  for p in processes:
    p.wait()


def metrics(workdir):
  """{(step, name): value} of the training metrics; the last writing counts."""
  found = {}
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  for line in path.read_text().splitlines() if path.exists() else ():
    line = json.loads(line)
    found |= {(line['step'], k): v for k, v in line.items()
              if k.startswith('train/')}
  return found


def last_step(workdir):
  return max((step for step, _ in metrics(workdir)), default=0)


def wait_for_step(processes, workdir, step):
  """Returns when `step` is written down, or the run is over."""
  until = time.monotonic() + PATIENCE
  while last_step(workdir) < step and time.monotonic() < until:
    if all(p.poll() is not None for p in processes):
      return
    time.sleep(.01)


def difference(workdir, reference):
  """Largest relative difference of the last steps' metrics; 0 = same bits."""
  ours, theirs = metrics(workdir), metrics(reference)
  names = [k for k in theirs if k[0] > STEPS - COMPARED]
  assert names and {k for k in ours if k[0] > STEPS - COMPARED} == set(names)
  a, b = (np.array([d[k] for k in names]) for d in (ours, theirs))
  return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-2)))


def trial(random_, number, folder, data_dir, reference):
  """One kill and one resume; returns a dict of what happened."""
  workdir = pathlib.Path(folder) / f'trial{number}'
  # Every third trial of two processes gets SIGTERM in one of them; every
  # second one goes on in another layout.
  first = LAYOUTS[number % len(LAYOUTS)]
  term = first.processes > 1 and number % 3 > 0
  second = first if number % 2 else random_.choice(LAYOUTS)
  at = random_.randint(0, STEPS - 2)
  processes = start(first, workdir, data_dir)
  wait_for_step(processes, workdir, at)
  time.sleep(random_.uniform(0, .3))
  if term:
    random_.choice(processes).send_signal(signal.SIGTERM)
    finish(processes, workdir)  # Every process saves and exits with 0.
  else:
    kill(processes)
  reached = last_step(workdir)
  before = (workdir / 'metrics.jsonl').read_text().count('\n') if (
      workdir / 'metrics.jsonl').exists() else 0
  finish(start(second, workdir, data_dir), workdir)
  after = (workdir / 'metrics.jsonl').read_text().splitlines()[before:]
  # Killed after its last save, a run has nothing left to do.
  resumed = min((json.loads(x)['step'] for x in after if 'train/loss' in x),
                default=reached + 1) - 1
  return {'first': str(first), 'killed by': 'SIGTERM to one' if term
          else 'SIGKILL', 'reached': reached, 'second': str(second),
          'resumed': resumed, 'lost': max(0, reached - resumed),
          'same layout': first == second,
          'difference': difference(workdir, reference(first))}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--trials', type=int, default=20)
  parser.add_argument('--first', type=int, default=0,
                      help='number of the first trial')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', help='kept; a temporary one by default')
  args = parser.parse_args(argv)
  folder = args.folder or tempfile.mkdtemp(prefix='kill_and_resume_')
  os.makedirs(folder, exist_ok=True)
  data_dir = os.path.join(folder, 'data')
  subprocess.run([sys.executable, '-m', 'e2e_vlp_jax.prepare', 'scenes',
                  '--data_dir', data_dir, '--num_train', '64',
                  '--num_validation', '8', '--num_test', '8', '--num_unseen',
                  '8'], check=True, cwd=REPO, stdout=subprocess.DEVNULL)
  undisturbed = {}

  def reference(layout):
    if layout not in undisturbed:
      workdir = os.path.join(folder, f'whole{len(undisturbed)}')
      finish(start(layout, workdir, data_dir), workdir)
      undisturbed[layout] = workdir
    return undisturbed[layout]

  failed = 0
  for number in range(args.first, args.first + args.trials):
    # A trial's moments depend on its number alone: it can be repeated.
    random_ = random.Random(f'{args.seed} {number}')
    found = trial(random_, number, folder, data_dir, reference)
    limit = 0 if found['same layout'] else 1e-4
    # What was saved is not done again; a save may be under way at the kill.
    good = (found['difference'] <= limit
            and found['lost'] <= 2 * SAVE_EVERY
            and (found['killed by'] == 'SIGKILL' or found['lost'] == 0))
    failed += not good
    print(f'{"ok    " if good else "FAILED"} {number:2d}', '; '.join(
        f'{k} {v}' for k, v in found.items()), flush=True)
  print(f'seed {args.seed}: {args.trials - failed} of {args.trials} trials '
        f'end as the undisturbed run; files in {folder}')
  return failed


if __name__ == '__main__':
  sys.exit(bool(main()))
