"""Sweeps: their runs, the commands, what a second start repeats."""
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from configs import e2e_vlp
from configs import soho
from e2e_vlp_jax import cli
from e2e_vlp_jax import runs as runs_lib
from e2e_vlp_jax import sweep

NASTY = 'a b;$(touch CANARY)`touch CANARY`\'"\\ $HOME <b>&\nx'
CONFIG = '''
import ml_collections
from ml_collections.config_dict import placeholder

def get_config(arg='tiny'):
  return ml_collections.ConfigDict(dict(
      seed=0, total_steps=2, tensorboard=True, init_from=placeholder(str),
      log_every_steps=1, sides=(1, 2), optim=dict(learning_rate=1e-3),
      warm_start=dict(schedule=dict(learning_rate=1e-3)), evals=dict(itm={})))

def get_sweep(arg='tiny'):
  return RUNS
'''
# In place of train: notes what it was given, and ends as its seed says.
TRAIN = '''
import json, os, sys, time
sys.path.insert(0, {repo!r})
from e2e_vlp_jax import cli
from tests import small_run
parser = cli.parser('', config='required', workdir=True)
args, config = cli.parse(parser)
os.makedirs(args.workdir, exist_ok=True)
with open({calls!r}, 'a') as f:
  f.write(json.dumps(args.workdir) + '\\n')
if config.seed == 13:
  sys.exit(2)
if config.seed == 99:
  time.sleep(60)
with open(args.workdir + '/config.json', 'w') as f:
  json.dump(config.to_dict(), f)
with open(args.workdir + '/metrics.jsonl', 'a') as f:
  for step in (1, 2):
    scores = {{'eval/itm/accuracy': config.seed / 10 * step}}
    f.write(json.dumps({{'step': step, 'train/loss': 3. - step, **scores}}))
    f.write('\\n')
  f.write('{{"step": 2, "eval/itm/acc')
small_run.pretend_saved(args.workdir, config.total_steps)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A function that writes the config file for some runs: -> its path."""
  calls, fake = tmp_path / 'calls', tmp_path / 'fake_train.py'
  repo = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  fake.write_text(TRAIN.format(repo=repo, calls=str(calls)))
  monkeypatch.setattr(runs_lib, 'TRAIN', ('python', str(fake)))

  def write(runs):
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.replace('RUNS', repr(runs)))
    return path
  return write


def call(*argv):
  with pytest.raises(SystemExit) as e:
    sweep.main([str(a) for a in argv])
  return e.value.code


def test_values_reach_train_as_they_are(place, tmp_path, capsys):
  runs = [{'init_from': NASTY, 'tensorboard': False, 'sides': (3,)},
          {'optim.learning_rate': 1e-05, 'seed': 7}]
  config, workdir = place(runs), tmp_path / 'W'
  assert call('--config', config, '--workdir', workdir, '--mode', 'print',
              '--config.log_every_steps=5') == 0
  lines = shlex.split(capsys.readouterr().out.replace('\npython ', ' python '))
  at = [i for i, word in enumerate(lines) if word == 'python'] + [len(lines)]
  parser = cli.parser('', config='required', workdir=True)
  folders = set()
  for run, a, b in zip(runs, at, at[1:]):
    args, found = cli.parse(parser, lines[a + 2:b])
    flat = dict(found.to_dict(), **{'optim.learning_rate':
                                    found.optim.learning_rate})
    assert {k: flat[k] for k in run} == run and found.log_every_steps == 5
    folders.add(args.workdir)
  assert len(folders) == 2 and not workdir.exists()
  assert str(workdir / 'learning_rate=1e-05,seed=7') in folders
  for folder in folders:  # whatever the value, one plain name
    assert os.path.dirname(folder) == str(workdir)
    assert not set(os.path.basename(folder)) & set(' ;$`\'"\\<>&\n')


@pytest.mark.parametrize('runs, argv, parts', [
    ([{'sed': 1}], [], ["run 1: unknown config key 'sed'", "'seed'"]),
    ([{'seed': 1}, {'seed': .5}], [], ["run 2: config key 'seed'", 'int']),
    ([{'seed': 1}, {'seed': 1}], [], ['runs 1 and 2', "name 'seed=1'"]),
    ([{'seed': 1}], ['--config.seed=2'], ['--config.seed', 'the sweep']),
    # Under its old name, too.
    ([{'warm_start.optim.learning_rate': 1.}],
     ['--config.warm_start.schedule.learning_rate=2'], ['the sweep']),
    ([], [], ['get_sweep returned no list']),
    (['seed'], [], ['get_sweep returned no list']),
    ([{'seed': 1}], ['--metric', 'eval/itn/accuracy'], ["'eval/itm/'"]),
    ([{'seed': 1}], ['--mode', 'remote'], ['local', 'remote']),
])
def test_what_cannot_be_is_said_before_anything_starts(
    place, tmp_path, capsys, runs, argv, parts):
  code = call('--config', place(runs), '--workdir', tmp_path / 'W', *argv)
  error = capsys.readouterr().err
  assert code == 2 and error.count('\n') == 1 and error.startswith('error: ')
  assert all(part in error for part in parts), error
  assert not (tmp_path / 'W').exists() and not (tmp_path / 'calls').exists()


def test_a_config_without_sweep(tmp_path, capsys):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG.partition('def get_sweep')[0])
  assert call('--config', path, '--workdir', tmp_path / 'W') == 2
  assert 'no function get_sweep' in capsys.readouterr().err


def test_local_runs(place, tmp_path, capfd):
  """One fails, the others run; what is done is not done again."""
  workdir, calls = tmp_path / 'W', tmp_path / 'calls'
  names = lambda: [os.path.basename(json.loads(line))
                   for line in calls.read_text().splitlines()]
  argv = ['--workdir', workdir, '--metric', 'eval/itm/accuracy']
  config = place([{'seed': 3}, {'seed': 13}, {'seed': 5}])
  assert call('--config', config, *argv) == 1
  out, err = capfd.readouterr()
  assert names() == ['seed=3', 'seed=13', 'seed=5']
  assert 'failed: seed=13 (exit code 2)' in err
  # Best first, those without a figure last.
  found = json.loads((workdir / 'sweep.json').read_text())['runs']
  assert [r['name'] for r in found] == ['seed=5', 'seed=3', 'seed=13']
  assert found[0]['metrics'] == {'eval/itm/accuracy': 1., 'train/loss': 1.}
  assert [r['finished'] for r in found] == [True, True, False]
  assert found[0]['overrides'] == {'seed': 5} and found[0]['step'] == 2
  rows = out.splitlines()
  assert [r.split()[0] for r in rows[-4:-1]] == ['seed=5', 'seed=3', 'seed=13']
  page = (workdir / 'sweep.html').read_text()
  assert page.index('seed=5') < page.index('seed=3') and '1.0000' in page

  calls.write_text('')
  config = place([{'seed': 3}, {'seed': 5}, {'seed': 8}])
  assert call('--config', config, *argv) == 0
  assert names() == ['seed=8']
  assert '[1/3] seed=3: already finished' in capfd.readouterr().out
  # With other values elsewhere they are other runs: train has the last word.
  calls.write_text('')
  config.write_text(config.read_text().replace('sides=(1, 2)', 'sides=(1, 3)'))
  call('--config', config, *argv)
  assert names() == ['seed=3', 'seed=5', 'seed=8']
  calls.write_text('')
  assert call('--config', config, *argv, '--mode', 'table') == 0
  assert not names()


def test_of_a_loss_the_smallest_is_best(tmp_path):
  runs = []
  for name, loss in (('a', 2.), ('b', 1.), ('c', None)):
    runs.append(runs_lib.Run(name, str(tmp_path / name), 'none.py'))
    (tmp_path / name).mkdir()
    (tmp_path / name / 'metrics.jsonl').write_text(
        json.dumps({'step': 1, 'train/loss': loss}) + '\n')
  rows = sweep.table(runs, 'train/loss')
  assert [row['name'] for row in rows] == ['b', 'a', 'c']


def test_stopped_it_stops_the_training_and_starts_no_other(place, tmp_path):
  config = place([{'seed': 99}, {'seed': 1}])
  program = textwrap.dedent(f'''
      import sys
      from e2e_vlp_jax import runs
      from e2e_vlp_jax import sweep
      runs.TRAIN = {runs_lib.TRAIN!r}
      sweep.main(['--config', {str(config)!r}, '--workdir',
                  {str(tmp_path / 'W')!r}])''')
  process = subprocess.Popen([sys.executable, '-c', program],
                             stdout=subprocess.PIPE, text=True)
  for _ in range(600):
    if (tmp_path / 'calls').exists():
      break
    time.sleep(.1)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'stopped; run the same command to continue' in out
  assert (tmp_path / 'calls').read_text().count('\n') == 1


def test_slurm(place, tmp_path, capsys):
  """An array whose tasks are those of launch/slurm.sbatch."""
  workdir = tmp_path / 'a folder'
  runs = [{'seed': 1}, {'init_from': NASTY}]
  assert call('--config', place(runs), '--workdir', workdir, '--mode',
              'slurm') == 0
  script = workdir / 'sweep.sbatch'
  assert shlex.split(capsys.readouterr().out) == ['sbatch', str(script)]
  text = script.read_text()
  assert '#SBATCH --array=0-1\n' in text and '#SBATCH --requeue\n' in text
  env = {k: v for k, v in os.environ.items() if not k.startswith('SLURM')}
  submit = lambda **more: subprocess.run(
      ['bash', str(script)], env={**env, 'DRY_RUN': '1', **more},
      cwd=tmp_path, capture_output=True, text=True, check=False)
  done = submit(SLURM_ARRAY_TASK_ID='1')
  assert done.returncode == 0, done.stderr
  words = shlex.split(done.stdout[done.stdout.index('+ srun'):])
  assert f'--config.init_from={NASTY}' in words
  assert 'e2e_vlp_jax.train' in words
  assert not list(tmp_path.rglob('CANARY'))
  done = submit()
  assert done.returncode == 2 and done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('file, config', [
    ('e2e_vlp.py:tiny', e2e_vlp), ('soho.py:tiny', soho),
    ('soho.py:r18', soho)])
def test_sweeps_of_our_configs(file, config):
  runs = sweep.runs_of(f'configs/{file}', [], 'W')
  assert len({run.name for run in runs}) == len(runs) > 2
  assert len(runs) == len(config.get_sweep(file.partition(':')[2]))


@pytest.mark.long
def test_a_real_one(tiny_scenes, tmp_path, capfd):
  argv = ['--config', 'tests/small_run.py:short', '--workdir', tmp_path / 'W',
          f'--config.data.dir={tiny_scenes}', '--metric', 'train/loss']
  assert call(*argv) == 0
  found = json.loads((tmp_path / 'W' / 'sweep.json').read_text())['runs']
  assert all(run['finished'] and run['step'] == 2 for run in found)
  first, second = (run['metrics']['train/loss'] for run in found)
  assert first < second
  capfd.readouterr()
  assert call(*argv) == 0
  assert capfd.readouterr().out.count('already finished') == 2
