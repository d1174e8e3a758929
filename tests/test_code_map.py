"""docs/code_map.md is true: its examples are followed, to the letter.

In a copy of the repository: the files that the page says are written, its
commands run. Nothing that was there before is changed.
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
PAGE = REPO / 'docs' / 'code_map.md'
ROOMS = ('configs', 'e2e_vlp_jax/models', 'e2e_vlp_jax/tasks')
_STEP = re.compile(r'`([\w/.]+\.py)`[^`]*?:\n```python\n(.*?)```'
                   r'|```bash\n(.*?)```', re.DOTALL)


def steps(section):
  """[(file, its text) or ('', command)] of a section, in order."""
  text = PAGE.read_text(encoding='utf-8')
  body, = re.findall(rf'^## {section}\n(.*?)(?=^## |\Z)', text,
                     re.MULTILINE | re.DOTALL)
  for file, code, commands in _STEP.findall(body):
    if file:
      yield file, code
    else:
      yield from (('', line) for line in commands.strip().splitlines())


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """A copy of package, configs and tests, without tests/data."""
  folder = tmp_path_factory.mktemp('repository')
  for name in ('e2e_vlp_jax', 'configs', 'tests'):
    shutil.copytree(REPO / name, folder / name,
                    ignore=shutil.ignore_patterns('__pycache__', 'data')
                    if name == 'tests' else
                    shutil.ignore_patterns('__pycache__'))
  for name in ('setup.py', 'pyproject.toml'):
    shutil.copy(REPO / name, folder)
  return folder


@pytest.fixture(scope='module')
def follow(copy):
  """Writes the files of a section and runs its commands, once."""
  done = {}

  def one(section):
    if section in done:
      return done[section]
    out = ''
    for file, text in steps(section):
      if file:
        assert not (copy / file).exists(), f'{file} is there already'
        (copy / file).parent.mkdir(exist_ok=True)
        (copy / file).write_text(text, encoding='utf-8')
        continue
      command = text.split()
      assert command[0] == 'python', text
      run = subprocess.run(
          [sys.executable, *command[1:]], cwd=copy, check=False, text=True,
          capture_output=True,
          env={**os.environ, 'PYTHONPATH': str(copy), 'XLA_FLAGS': ''})
      assert run.returncode == 0, f'{text}\n{run.stdout}\n{run.stderr}'
      out += run.stdout
    done[section] = out
    return out
  return one


def metrics(folder):
  with open(folder / 'metrics.jsonl', encoding='utf-8') as f:
    return [json.loads(line) for line in f]


def test_add_a_dataset(follow):
  assert '60 images, 60 texts' in follow('Add a dataset')


def test_add_a_model(follow, copy):
  """It passes the conformance test and learns what the pictures show."""
  follow('Add a dataset')
  out = follow('Add a model')
  assert ' passed' in out and 'failed' not in out
  rows = [r for r in metrics(copy / 'runs/averages') if 'train/mlm' in r]
  assert rows[-1]['step'] == 50
  assert rows[-1]['train/mlm'] < .8 * rows[0]['train/mlm']


def test_add_an_objective(follow, copy):
  for section in ('Add a dataset', 'Add a model', 'Add an objective'):
    follow(section)
  last = [r for r in metrics(copy / 'runs/confident')
          if 'train/confidence' in r][-1]
  assert last['step'] == 10


def test_add_a_task(follow, copy):
  out = follow('Add a task')
  assert 'eval/counting/accuracy' in out
  with open(copy / 'runs/counted/eval.json', encoding='utf-8') as f:
    assert 0 <= json.load(f)['eval/counting/accuracy'] <= 1


def test_the_page_names_what_is_there():
  """Every file that the tables name exists."""
  tables = '\n'.join(line for line in PAGE.read_text(
      encoding='utf-8').splitlines() if line.startswith('|'))
  for name in re.findall(r'`([\w/]+\.py)`', tables):
    assert any((REPO / room / name).exists()
               for room in ('', 'e2e_vlp_jax', *ROOMS)), name
