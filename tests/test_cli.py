"""Mistakes on the command line: exit code 2 and one line that helps."""
import os
import subprocess
import sys

import ml_collections
import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train

CONFIG = '''
import ml_collections
from ml_collections.config_dict import placeholder

def get_config(arg='tiny'):
  if arg not in ('tiny', 'large'):
    raise ValueError(f'no size {arg!r}; choose tiny or large')
  return ml_collections.ConfigDict(dict(
      seed=0, name=arg, total_steps=10, tensorboard=True,
      init_from=placeholder(str), rules=(), evals=dict(
          one=dict(type='retrieval'), two=dict(type='x', options=dict(k=1))),
      optim=dict(learning_rate=1e-3, groups=(('.*', {}),))))
'''


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('configs') / 'model.py'
  path.write_text(CONFIG)
  return path


def parse(*argv):
  parser = cli.parser('A program.', config='required', workdir=True)
  return cli.parse(parser, ['--workdir', 'w', *map(str, argv)])


def test_overrides_take_the_type_of_what_they_replace(config_file):
  args, config = parse(
      f'--config={config_file}:large', '--config.total_steps=20',
      '--config.seed', '-1', '--config.optim.learning_rate=1',
      '--config.tensorboard=false', '--config.init_from=a=b',
      "--config.optim.groups=(('x', {}),)")
  assert args.workdir == 'w'
  assert isinstance(config, ml_collections.ConfigDict)
  assert config.name == 'large'
  assert config.total_steps == 20 and config.seed == -1
  assert config.optim.learning_rate == 1.
  assert isinstance(config.optim.learning_rate, float)
  assert config.tensorboard is False
  assert config.init_from == 'a=b'
  assert config.optim.groups == (('x', {}),)


def test_an_evaluator_s_options_need_not_be_listed(config_file):
  _, config = parse(
      f'--config={config_file}', '--config.evals.one.options.top_k=7',
      '--config.evals.one.options.protocol=dual',
      '--config.evals.two.options.names=("a", "b")',
      '--config.evals.two.options.k=2', '--config.evals.two.options.all=true')
  assert config.evals.one.options.to_dict() == dict(top_k=7, protocol='dual')
  assert config.evals.two.options.to_dict() == dict(k=2, names=('a', 'b'),
                                                    all=True)


@pytest.mark.parametrize('override,expected', [
    ('total_step=3', ["'total_step'", "'total_steps'"]),
    ('evals.three.options.k=3', ['evals.three.options.k',
                                 'evals.two.options.k']),
    ('optim.learningrate=3', ["'optim.learningrate'",
                              "'optim.learning_rate'"]),
    ('optm.learning_rate=3', ["'optm.learning_rate'",
                              "'optim.learning_rate'"]),
    ('zzz=3', ["'zzz'", 'total_steps', 'optim']),
    ('total_steps.x=3', ["'total_steps.x'", "'total_steps'"]),
    ('total_steps=abc', ["'total_steps'", "'abc'", 'int', '10']),
    ('total_steps=1.5', ["'total_steps'", "'1.5'", 'int']),
    ('tensorboard=maybe', ["'tensorboard'", "'maybe'", 'bool']),
    ('optim.learning_rate=fast', ["'optim.learning_rate'", "'fast'", 'float']),
    ('rules=abc', ["'rules'", "'abc'", 'tuple']),
    ('optim=3', ["'optim'", 'optim.learning_rate']),
])
def test_overrides_that_cannot_be(config_file, override, expected):
  with pytest.raises(errors.UserError) as e:
    parse('--config', config_file, f'--config.{override}')
  for part in expected:
    assert part in str(e.value)


def test_config_files_that_cannot_be(config_file, tmp_path):
  empty = tmp_path / 'empty.py'
  empty.write_text('')
  for spec, expected in [
      (f'{config_file}:huge', ["'huge'", 'tiny or large']),
      (config_file.with_name('modell.py'), ['modell.py', 'model.py']),
      (config_file.parent, ['no config file']),
      (config_file.with_suffix('.yaml'), ['model.yaml', 'model.py']),
      (empty, ['get_config']),
  ]:
    with pytest.raises(errors.UserError) as e:
      parse('--config', spec)
    for part in expected:
      assert part in str(e.value)


def test_arguments_that_cannot_be(config_file):
  for argv, expected in [
      ([], ['--config']),
      (['--config', config_file, '--workdirs=w'], ["'--workdirs'",
                                                   "'--workdir'"]),
      # The misspelt argument, not the missing one.
      (['--confg', config_file], ["'--confg'", "'--config'"]),
      (['--config', config_file, 'more'], ["'more'"]),
      (['--config', config_file, '--config.seed'], ['--config.seed', 'value']),
      (['--config.seed=3'], ['--config']),
  ]:
    with pytest.raises(errors.UserError) as e:
      parse(*argv)
    for part in expected:
      assert part in str(e.value)


def fails(capfd, main, *argv):
  """The one line that `main(argv)` prints on stderr, with exit code 2."""
  with pytest.raises(SystemExit) as e, errors.exit_on_user_error():
    main(list(map(str, argv)))
  assert e.value.code == 2
  out, err = capfd.readouterr()
  assert not out
  assert err.startswith('error: ') and err.count('\n') == 1
  return err


def test_train_refuses_before_it_starts(capfd, tmp_path):
  workdir = tmp_path / 'w'
  config = ['--config', 'configs/e2e_vlp.py:tiny']
  for argv, expected in [
      ([*config, '--config.modl.width=64'], 'model.width'),
      ([*config, '--config.batch_size=many'], 'int'),
      (['--config', 'configs/e2e_vlp.py:tinny'], 'tiny'),
      (['--config', 'configs/e2e-vlp.py:tiny'], 'configs/e2e_vlp.py'),
      ([*config, '--config.data.dir=' + str(tmp_path / 'none')], 'prepare'),
      ([*config, '--steps=3'], '--steps'),
      (['--config', 'configs/e2e_vlp.py:tiny,data=cocoo'], 'coco'),
  ]:
    assert expected in fails(capfd, train.main, *argv, '--workdir', workdir)
  assert not workdir.exists()


def test_prepare_names_the_nearest_dataset(capfd, tmp_path):
  line = fails(capfd, prepare.main, 'scene', '--data_dir', tmp_path)
  assert "'scene'" in line and "'scenes'" in line
  line = fails(capfd, prepare.main, 'scenes', '--datadir', tmp_path)
  assert "'--datadir'" in line and "'--data_dir'" in line


@pytest.mark.parametrize('command', [
    ['train', '--config', 'configs/e2e_vlp.py:tiny', '--workdir', 'w',
     '--config.total_step=1'],
    ['prepare', 'scene', '--data_dir', 'd'],
])
def test_processes_end_with_code_2(command):
  run = subprocess.run([sys.executable, '-m', f'e2e_vlp_jax.{command[0]}',
                        *command[1:]], check=False, capture_output=True,
                       text=True)
  assert run.returncode == 2
  assert run.stderr.startswith('error: ') and run.stderr.count('\n') == 1


def test_a_config_that_changes_twice_in_a_second(tmp_path, monkeypatch):
  """Python's cache of bytecode goes by whole seconds and the file's length."""
  monkeypatch.setattr(sys, 'dont_write_bytecode', False)
  path = tmp_path / 'c.py'
  for number in (1, 2):
    path.write_text(f'def get_number():\n  return {number}\n')
    os.utime(path, (1e9, 1e9))
    assert cli.call(str(path), 'get_number') == number
