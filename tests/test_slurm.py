"""launch/slurm.sbatch and sweeps on a real Slurm, of two nodes on this machine.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge; the
nodes' GPUs are files, what runs on them are CPU devices.

Environment variables:
  E2E_VLP_REQUIRE_SLURM=1: fail where Slurm is missing, instead of skipping.
"""
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests import kill_and_resume as runs
from tests import xla_flags

REPO = pathlib.Path(__file__).resolve().parent.parent
# Process 0 alone would find its program in the cache, and gloo gives up where
# the other one still compiles after 30 s.
NO_CACHE = 'JAX_ENABLE_COMPILATION_CACHE', 'false'
COMMANDS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scontrol')
PACKAGES = 'slurmctld slurmd slurm-client munge'
NODES = ('127.0.0.1', '127.0.0.2')  # names, which must resolve
CONFIG = '''
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=20
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 \
Port=[{ports[1]}-{ports[2]}] CPUs=8 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''


def free_ports(count):
  """Ports in a row that nobody listens on."""
  for first in range(20000 + os.getpid() % 1000 * 8, 32000, count):
    ports = range(first, first + count)
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
      for port in ports:
        stack.enter_context(socket.socket()).bind(('127.0.0.1', port))
      return ports
  raise AssertionError('no free ports')


class Cluster:
  """A Slurm of two nodes, and a repository as a user has it."""

  def __init__(self, folder):
    self.folder, self.repo, self.daemons = folder, folder / 'repo', []
    for name in ('state', *(f'spool-{node}' for node in NODES)):
      (folder / name).mkdir()
    host = socket.gethostname().partition('.')[0]
    (folder / 'slurm.conf').write_text(CONFIG.format(
        host=host, folder=folder, ports=free_ports(3)))
    (folder / 'gres.conf').write_text(
        'AutoDetect=off\nName=gpu Count=8 File=' + self._gpus() + '\n')
    (folder / 'munge.key').write_bytes(os.urandom(1024))
    (folder / 'munge.key').chmod(0o400)
    shutil.copytree(REPO / 'launch', self.repo / 'launch')
    for name in ('e2e_vlp_jax', 'configs', 'tests'):
      (self.repo / name).symlink_to(REPO / name)
    (self.repo / 'launch/common.sh').write_text(  # installs nothing
        f'PATH={pathlib.Path(sys.executable).parent}:$PATH\n')
    self.env = {k: v for k, v in os.environ.items()
                if not k.startswith(('SLURM', 'SBATCH', 'E2E_VLP'))}
    self.env |= {'SLURM_CONF': str(folder / 'slurm.conf'),
                 'JAX_PLATFORMS': 'cpu',
                 # As of the runs that these are compared with, to the bit.
                 'XLA_FLAGS': ' '.join(f'{k}={v}' for k, v in
                                       xla_flags.flags(devices=2)),
                 NO_CACHE[0]: NO_CACHE[1]}

  def _gpus(self):
    for i in range(8):
      (self.folder / f'gpu{i}').touch()
    return str(self.folder / 'gpu[0-7]')

  def start(self):
    where = self.folder / 'munge'
    self._daemon('munged', '--foreground', '--force', *(
        f'--{option}={where}.{end}' for option, end in (
            ('key-file', 'key'), ('socket', 'socket'), ('pid-file', 'pid'),
            ('log-file', 'log'), ('seed-file', 'seed'))))
    self.until(lambda: pathlib.Path(f'{where}.socket').exists(), 'munged',
               60)
    self._daemon('slurmctld', '-D')
    for node in NODES:
      self._daemon('slurmd', '-D', '-N', node)
    self.until(lambda: self.run('sinfo', '-h', '-o', '%t %D', check=False)
               == 'idle 2', 'the nodes', 60)

  def _daemon(self, *command):
    with open(self.folder / 'daemons.log', 'a') as log:
      self.daemons.append(subprocess.Popen(
          command, env=self.env, stdout=log, stderr=log,
          start_new_session=True))

  def stop(self):
    with contextlib.suppress(subprocess.TimeoutExpired):
      subprocess.run(['scancel', '--user=root'], env=self.env, check=False,
                     timeout=20)
    for daemon in reversed(self.daemons):
      daemon.terminate()
      daemon.wait(60)

  def run(self, *command, check=True, **env):
    done = subprocess.run(command, env={**self.env, **env}, cwd=self.repo,
                          capture_output=True, text=True, check=False)
    assert not check or not done.returncode, done.stderr
    return done.stdout.strip()

  def until(self, found, what, patience=runs.PATIENCE):
    for _ in range(int(patience / .2)):
      if found():
        return
      time.sleep(.2)
    logs = [p.read_text()[-2000:] for p in (
        *self.folder.glob('*.log'), *self.repo.glob('slurm-*.out'))]
    raise AssertionError('\n---\n'.join([f'waited for {what}', *logs]))

  def submit(self, *command, **env):
    return self.run('sbatch', '--parsable', *map(str, command), **env)

  def state(self, job):
    """What Slurm says of a job, or of all tasks of its array."""
    return set(self.run('squeue', '-h', '-t', 'all', '-j', job, '-o',
                        '%T').split())

  def wait(self, job):
    """Waits for the job's end; what it has printed."""
    self.until(lambda: not self.state(job) & {
        'PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING', 'SUSPENDED'},
               f'job {job}')
    return '\n---\n'.join(p.read_text()
                          for p in self.repo.glob(f'slurm-{job}*.out'))


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
  missing = [c for c in COMMANDS if not shutil.which(c)]
  if missing or os.geteuid():
    reason = (f'no {", ".join(missing)}: apt-get install {PACKAGES}'
              if missing else 'a Slurm of its own needs root')
    if os.environ.get('E2E_VLP_REQUIRE_SLURM') == '1':
      pytest.fail(reason)
    pytest.skip(reason)
  cluster = Cluster(tmp_path_factory.mktemp('slurm'))
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.stop()


# Few objectives, small images, as it is Slurm that is looked at.
LIGHT = 'tests/small_run.py:light'
VALUES = {'data.buckets': '((48,48),)', 'total_steps': runs.STEPS}


def job(data_dir, workdir, **more):
  """launch/slurm.sbatch and its arguments, the values of `runs.start`."""
  values = {'data.dir': data_dir, 'checkpoint.every_steps': runs.SAVE_EVERY,
            **VALUES, **more}
  return ['launch/slurm.sbatch', '--config', LIGHT, '--workdir', workdir,
          *(f'--config.{k}={v}' for k, v in values.items())]


@pytest.fixture(scope='module')
def whole(tiny_scenes, tmp_path_factory):
  """Workdir of a run of two processes that nobody disturbed."""
  workdir = tmp_path_factory.mktemp('whole') / 'w'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(*NO_CACHE)
    runs.finish(runs.start(runs.Layout(2, 2), workdir, tiny_scenes, VALUES,
                           config=LIGHT), workdir)
  return workdir


def submit_two(slurm, nodes, data_dir, workdir):
  """A job of two processes, on one node or on two."""
  return slurm.submit(f'--nodes={nodes}', f'--ntasks-per-node={2 // nodes}',
                      *job(data_dir, workdir))


def check_finished(slurm, number, workdir, whole, starts=1):
  """Done, as the run that nobody disturbed; what it has printed."""
  said = slurm.wait(number)
  assert slurm.state(number) == {'COMPLETED'}, said
  assert said.count('queued again') == starts - 1, said
  # All devices of both, though srun's variables are there.
  assert said.count('2 processes, 4 devices (2 here)') == starts, said
  assert runs.difference(workdir, whole) == 0
  return said


@pytest.mark.long
def test_two_tasks_of_one_node(slurm, whole, tiny_scenes, tmp_path):
  number = submit_two(slurm, 1, tiny_scenes, tmp_path / 'w')
  check_finished(slurm, number, tmp_path / 'w', whole)


@pytest.mark.long
def test_a_stopped_job_of_two_nodes_goes_on_to_the_same_bits(
    slurm, whole, tiny_scenes, tmp_path):
  """SIGTERM, queued again, finished."""
  workdir = tmp_path / 'w'
  number = submit_two(slurm, 2, tiny_scenes, workdir)
  slurm.until(lambda: runs.last_step(workdir) >= 6 or not slurm.state(number)
              & {'RUNNING', 'PENDING'}, 'step 6')
  slurm.run('scancel', '--signal=TERM', number)
  slurm.until(lambda: slurm.state(number) == {'PENDING'}, 'the queue')
  stopped = runs.last_step(workdir)
  assert 6 <= stopped < runs.STEPS
  slurm.run('scontrol', 'update', f'jobid={number}', 'starttime=now')
  said = check_finished(slurm, number, workdir, whole, starts=2)
  assert f'resumed at step {stopped}' in said


@pytest.mark.slow
def test_a_sweep(slurm, tiny_scenes, tmp_path):
  """Written, submitted as it says, two runs at once, and in the table."""
  workdir = tmp_path / 'W'
  sweep = [sys.executable, '-m', 'e2e_vlp_jax.sweep',
           '--config', 'tests/small_run.py:short', '--workdir', str(workdir),
           f'--config.data.dir={tiny_scenes}',
           f'--config.data.buckets={VALUES["data.buckets"]}']
  submit = slurm.run(*sweep, '--mode', 'slurm').split()
  number = slurm.submit(*submit[1:])
  said = slurm.wait(number)
  assert slurm.state(number) == {'COMPLETED'}, said
  slurm.run(*sweep, '--mode', 'table')
  found = json.loads((workdir / 'sweep.json').read_text())['runs']
  assert [run['finished'] for run in found] == [True, True]


def test_mistakes_are_not_queued_again(slurm, tmp_path):
  number = slurm.submit(*job('nowhere', tmp_path / 'w', total_step=1))
  said = slurm.wait(number)
  assert slurm.state(number) == {'FAILED'}
  assert 'total_steps' in said and 'queued again' not in said


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path, request):
  """Train saves and ends with 0, as for every SIGTERM."""
  fake = tmp_path / 'python'
  fake.write_text(f'''#!/usr/bin/env bash
[[ $1 == -m ]] || exec {sys.executable} "$@"
trap 'sleep 1; exit 0' TERM
touch {tmp_path}/started
for i in {{1..200}}; do sleep .1; done''')
  fake.chmod(0o755)
  common = slurm.repo / 'launch/common.sh'
  kept = common.read_text()
  request.addfinalizer(lambda: common.write_text(kept))
  common.write_text(f'PATH={tmp_path}:$PATH\n')
  workdir = tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'config.json').write_text('{"total_steps": 10}')
  number = slurm.submit('--nodes=2', *job('nowhere', workdir))
  slurm.until((tmp_path / 'started').exists, 'the start', 60)
  slurm.run('scancel', number)
  slurm.wait(number)
  assert slurm.state(number) == {'CANCELLED'}


def test_more_nodes_than_there_are(slurm, tmp_path):
  """The job waits for ever; squeue says why (launch/README.md's table)."""
  number = slurm.submit('--nodes=3', *job('nowhere', tmp_path))
  reason = lambda: slurm.run('squeue', '-h', '-j', number, '-o', '%T %r')
  slurm.until(lambda: reason() == 'PENDING PartitionConfig', 'reason', 30)
  slurm.run('scancel', number)
