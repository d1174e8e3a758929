"""The doors between the rooms: who may import whom, and at what cost.

Read from the source (ast), so that a broken rule is found without running
what breaks it; what only an import can show runs in a fresh process.
"""
import ast
import pathlib
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = REPO / 'e2e_vlp_jax'
# Things a person runs. The other files beside them serve everybody.
ENTRY_POINTS = sorted(f.stem for f in PACKAGE.glob('*.py')
                      if f.stem not in ('__init__', 'checkpoint_files', 'cli',
                                        'discovery', 'errors', 'files',
                                        'runs', 'study'))
# What a room may import besides itself and `EVERYWHERE`.
EVERYWHERE = ['checkpoint_files', 'discovery', 'errors', 'files',
              'storage']
DOORS = {
    'storage': [],
    'ops': [],
    'data': [],
    'models': ['ops'],
    'objectives': ['ops'],
    'training': ['ops', 'objectives', 'profiling'],
    'profiling': [],
    'tasks': ['ops', 'models', 'data.pp'],
    'evaluation': ['data', 'models', 'training', 'tasks'],
    'weights': ['ops', 'models', 'training'],
    'peers': ['models'],
    'benchmarks': ['data', 'evaluation', 'models', 'peers', 'profiling',
                   'tasks', 'training'],
}
ACCELERATOR_ROOMS = ('models', 'ops', 'objectives', 'tasks', 'training')
# Optional and large: imported where they are used, never with a module.
EXTRAS = {'torch', 'torchvision', 'transformers', 'pycocoevalcap'}


def imports(path):
  """[(dotted name, whether at import of the module)] of a Python file."""
  found = []

  def walk(node, top):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.Import):
        found.extend((a.name, top) for a in child.names)
      elif isinstance(child, ast.ImportFrom):
        assert child.level == 0, f'{path}: relative import'
        found.extend((f'{child.module}.{a.name}', top) for a in child.names)
      else:
        function = isinstance(child, (ast.FunctionDef, ast.Lambda,
                                      ast.AsyncFunctionDef))
        walk(child, top and not function)

  walk(ast.parse(path.read_text()), True)
  return found


def own(path):
  """The imports of `path` from this package, without the package's name."""
  return [name.removeprefix('e2e_vlp_jax.') for name, _ in imports(path)
          if name.startswith('e2e_vlp_jax.')]


def within(name, doors):
  return any(name == d or name.startswith(d + '.') for d in doors)


@pytest.mark.parametrize('room', DOORS)
def test_rooms_use_their_doors(room):
  files = sorted((PACKAGE / room).rglob('*.py'))
  assert files
  wrong = [f'{f.relative_to(REPO)} imports {name}' for f in files
           for name in own(f)
           if not within(name, [room, *EVERYWHERE, *DOORS[room]])]
  assert not wrong


def test_every_room_has_its_doors():
  rooms = {f.parent.name for f in PACKAGE.glob('*/__init__.py')}
  assert rooms == set(DOORS)


def test_nobody_imports_entry_points():
  wrong = [f'{f.relative_to(REPO)} imports {name}'
           for f in PACKAGE.rglob('*.py') for name in own(f)
           if within(name, ENTRY_POINTS)]
  assert not wrong


def test_ops_are_pure_jax():
  allowed = {'jax', 'numpy', 'optax', 'e2e_vlp_jax', *sys.stdlib_module_names}
  wrong = [f'{f.name} imports {name}' for f in (PACKAGE / 'ops').glob('*.py')
           for name, _ in imports(f) if name.split('.')[0] not in allowed]
  assert not wrong


def test_data_has_no_model_code():
  wrong = [f'{f.name} imports {name}'
           for f in (PACKAGE / 'data').rglob('*.py')
           for name, _ in imports(f) if name.split('.')[0] in ('flax', 'optax')]
  assert not wrong


def test_configs_import_ml_collections_only():
  """And errors; studies, what they are made of; fine-tuning, what it reads."""
  files = list((REPO / 'configs').rglob('*.py'))
  assert files
  allowed = {'ml_collections', 'configs', *sys.stdlib_module_names}
  wrong = [f'{f.name} imports {name}' for f in files
           for name, _ in imports(f)
           if name.split('.')[0] not in allowed and f.name != 'finetune.py'
           and name != 'e2e_vlp_jax.errors' and not (
               f.parent.name == 'studies' and within(
                   name, ['e2e_vlp_jax.study', 'e2e_vlp_jax.tasks']))]
  wrong += [f'finetune.py imports {name}' for name, top in imports(
      REPO / 'configs' / 'finetune.py') if top and within(name, [
          'jax', 'flax', 'tensorflow', *(f'e2e_vlp_jax.{room}' for room in (
              'models', 'objectives', 'data', 'evaluation', 'weights'))])]
  assert not wrong


def test_extras_are_imported_where_used():
  wrong = [f'{f.relative_to(REPO)} imports {name}'
           for f in PACKAGE.rglob('*.py') for name, top in imports(f)
           if top and name.split('.')[0] in EXTRAS]
  assert not wrong


def test_tensorflow_is_imported_where_used():
  """So that a wrong config fails, and a prediction is made, without it."""
  wrong = [f'{f.relative_to(REPO)} imports {name}'
           for f in PACKAGE.rglob('*.py') for name, top in imports(f)
           if top and name.split('.')[0] in ('tensorflow',
                                             'tensorflow_datasets')
           and f.parent.name not in ('datasets', 'scenes')
           and f.name != 'prepare.py']
  assert not wrong


def test_no_flags_are_defined_at_import():
  wrong = []
  for f in PACKAGE.rglob('*.py'):
    for statement in ast.parse(f.read_text()).body:
      if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        continue
      wrong += [f'{f.relative_to(REPO)}:{node.lineno}'
                for node in ast.walk(statement)
                if isinstance(node, ast.Attribute)
                and node.attr.startswith('DEFINE')]
  assert not wrong


@pytest.mark.parametrize('room', ['training', 'data', 'tasks',
                                  'evaluation'])
def test_no_room_knows_a_system_by_name(room):
  """E2E-VLP, SOHO and FIBER differ in assembly files and configs only."""
  wrong = [f'{f.relative_to(REPO)}:{node.lineno} has {node.value!r}'
           for f in (PACKAGE / room).rglob('*.py')
           for node in ast.walk(ast.parse(f.read_text()))
           if isinstance(node, ast.Constant)
           and node.value in ('e2e_vlp', 'soho', 'fiber')]
  assert not wrong


def modules(rooms):
  return sorted('.'.join(f.relative_to(REPO).with_suffix('').parts)
                .removesuffix('.__init__')
                for room in rooms for f in (PACKAGE / room).rglob('*.py'))


def test_accelerator_rooms_need_no_tensorflow():
  """Nor do they touch a device or jax's global settings when imported."""
  code = f'''
import importlib, sys
for name in ('tensorflow', 'tensorflow_datasets', 'torch', 'transformers'):
  sys.modules[name] = None  # any import of it raises
import jax
before = dict(jax.config.values)
for name in {modules(ACCELERATOR_ROOMS)}:
  importlib.import_module(name)
changed = [k for k, v in jax.config.values.items() if before.get(k, v) != v]
assert not changed, changed
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), 'a device was touched'
'''
  run = subprocess.run([sys.executable, '-c', code], cwd=REPO, check=False,
                       capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
