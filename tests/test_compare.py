"""Studies: their runs, the table, the plot, and what a second start repeats."""
import json
import os
import shlex
import textwrap

import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import compare
from e2e_vlp_jax import runs as runs_lib
from tests import test_sweep

STUDY = '''
from e2e_vlp_jax import study

def get_study(arg=None):
  if arg == 'none':
    return {}
  second = lambda start: study.Step(CONFIG, {'optim.learning_rate': .5})
  return study.Study(
      title='a <b> study',
      arms={'one arm': {'first': study.Step(CONFIG),
                        'second': study.Step(CONFIG + ':{first}', {
                            'init_from': '{first}'})},
            'other': {'second': study.Step(CONFIG + (
                ':{nowhere}' if arg == 'wrong' else ':{one arm/first}'))}},
      measures={'score': ('second', 'eval/itm/accuracy')}, seeds=2)
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
  """The path of the study's file; training is a stand-in."""
  calls, fake = tmp_path / 'calls', tmp_path / 'fake_train.py'
  repo = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  fake.write_text(test_sweep.TRAIN.format(repo=repo, calls=str(calls)))
  monkeypatch.setattr(runs_lib, 'TRAIN', ('python', str(fake)))
  config = tmp_path / 'config.py'
  # Its argument must be the folder of a finished run.
  config.write_text(test_sweep.CONFIG.replace(
      'def get_config(arg=\'tiny\'):\n', textwrap.dedent('''
      import os
      def get_config(arg=''):
        if arg and not os.path.exists(arg + '/config.json'):
          raise ValueError('no run in ' + arg)
      ''').lstrip()))
  path = tmp_path / 'study.py'
  path.write_text(STUDY.replace('CONFIG', repr(str(config))))
  return path


def call(*argv):
  with pytest.raises(SystemExit) as e:
    compare.main([str(a) for a in argv])
  return e.value.code


def test_arms_are_chains(place, tmp_path, capsys):
  """Each seed's second run starts from its own first one."""
  workdir, calls = tmp_path / 'W', tmp_path / 'calls'
  argv = ['--study', place, '--workdir', workdir]
  assert call(*argv) == 0
  done = [os.path.relpath(json.loads(line), workdir)
          for line in calls.read_text().splitlines()]
  assert done == [f'{step}/seed={seed}' for seed in (0, 1) for step in (
      'one_arm/first', 'one_arm/second', 'other/second')]
  found = json.loads((workdir / 'study.json').read_text())
  # The stand-in's accuracy is seed / 10 * step, of two steps.
  one, other = found['rows']
  assert one['arm'] == 'one arm' and other['minutes'] >= 0
  score = one['measures']['score']
  assert score['values'] == {'0': 0., '1': .2}
  assert (score['mean'], score['least'], score['most']) == (.1, 0., .2)
  assert not found['unfinished'] and len(found['seconds']) == 6
  held = json.loads((workdir / 'one_arm/second/seed=1/config.json').read_text())
  assert held['init_from'] == str(workdir / 'one_arm/first/seed=1')
  page = (workdir / 'study.html').read_text()
  assert 'a &lt;b&gt; study' in page and '0.100 (0.000-0.200)' in page
  assert (workdir / 'study.png').stat().st_size > 1000
  assert '0.100 (0.000-0.200)' in capsys.readouterr().out
  calls.write_text('')
  assert call(*argv) == 0 and not calls.read_text()
  # One seed more trains that one alone.
  assert call(*argv, '--seeds', '3') == 0
  assert calls.read_text().count('seed=2') == 3 == calls.read_text().count(
      '\n')
  # A seed whose first run was trained elsewhere does not count in the minutes.
  seconds = {str(workdir / f'one_arm/{step}/seed={seed}'): 60. * seed
             for step in ('first', 'second') for seed in (1, 2)}
  (workdir / 'study.json').write_text(json.dumps({'seconds': seconds}))
  assert call(*argv, '--mode', 'table', '--seeds', '3') == 0
  one, other = json.loads((workdir / 'study.json').read_text())['rows']
  assert one['minutes'] == pytest.approx(3.) and other['minutes'] is None


def test_print(place, tmp_path, capsys):
  compare.main(['--study', str(place), '--workdir', str(tmp_path / 'W'),
                '--mode', 'print', '--seeds', '1',
                '--config.log_every_steps=7'])
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3 and not (tmp_path / 'W').exists()
  assert all('--config.log_every_steps=7' in shlex.split(l) for l in lines)


@pytest.mark.parametrize('argument, argv, parts', [
    ('', ['--seeds', '0'], ['--seeds', '1 or more']),
    (':wrong', [], ['{nowhere}', "'other'", 'one arm/first']),
    (':none', [], ['expected a Study', 'dict']),
])
def test_what_cannot_be_is_said(place, tmp_path, capsys, argument, argv, parts):
  code = call('--study', f'{place}{argument}', '--workdir', tmp_path / 'W',
              *argv)
  error = capsys.readouterr().err
  assert code == 2 and error.count('\n') == 1
  assert all(p in error for p in parts), error


def test_no_such_study(tmp_path, capsys):
  code = call('--study', 'configs/studies/finetunin.py', '--workdir', tmp_path)
  assert code == 2 and 'finetuning.py' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['finetuning.py:soho,tasks=answer+match',
                                  'objectives.py:tasks=answer',
                                  'dictionary.py:tasks=answer',
                                  'grounding.py:steps=9,fine=9',
                                  'fusion.py:tasks=answer'])
def test_our_studies(name, tmp_path):
  """Every first run of an arm has a valid config."""
  study = compare.load(f'configs/studies/{name}')
  runs = compare.runs_of(study, [0], str(tmp_path))
  assert len(runs) >= 3
  for run in runs.values():
    if str(tmp_path) not in run.spec:  # Else it starts from another run.
      cli.load_config(run.spec, run.texts)


def test_pre_trainings_share_a_warm_start(tmp_path):
  study = compare.load('configs/studies/objectives.py:steps=1000,tasks=answer')
  runs = compare.runs_of(study, [0], str(tmp_path))
  assert len(runs) == 1 + 2 * 4
  warm = runs['neither', 'warm_start', 0]
  assert dict(warm.texts)['total_steps'] == '801'
  for arm in study.arms:
    texts = dict(runs[arm, 'pretrain', 0].texts)
    assert texts['init_from'] == warm.workdir
    assert (texts['total_steps'], texts['warm_start.steps']) == ('200', '0')
