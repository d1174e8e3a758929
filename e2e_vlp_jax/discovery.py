"""Look-up by name: the files of a package are the list of what there is.

A model, an objective, a task, an evaluator, a dataset, a weights format and a
peer are one file each in a package of their own; nobody keeps a list.
"""
import importlib
import os

from e2e_vlp_jax import errors


def names(package, having=None):
  """Names of the modules of a package, sorted.

  Args:
    package: dotted name, 'e2e_vlp_jax.tasks'.
    having: only modules whose source defines this name at its top level; the
      files are read, not imported.
  """
  # A folder counts as a module: its `builder.py` or `__init__.py` is read.
  found = []
  for folder in importlib.import_module(package).__path__:
    for entry in os.listdir(folder):
      path, name = os.path.join(folder, entry), entry.removesuffix('.py')
      if os.path.isdir(path):
        path = os.path.join(path, 'builder.py')
      elif name == entry or name == '__init__':
        continue
      if os.path.isfile(path) and (having is None or _defines(path, having)):
        found.append(name)
  return sorted(found)


def _defines(path, name):
  with open(path, encoding='utf-8') as f:
    return any(line.startswith((f'class {name}(', f'class {name}:',
                                f'def {name}(', f'{name} = '))
               for line in f)


def load(package, name, having, key):
  """`having` of the module `name` of a package.

  Args:
    package: dotted name.
    name: of one of its modules, or of a folder with a `builder.py`.
    having: what the module must define.
    key: the config key or argument that gave the name, for the error.

  Raises:
    UserError: there is no such module; names the nearest.
  """
  known = names(package, having)
  if name not in known:
    raise errors.UserError(f'{key}: no {name!r}' + errors.nearest(name, known))
  module = importlib.import_module(f'{package}.{name}')
  if not hasattr(module, having):
    module = importlib.import_module(f'{package}.{name}.builder')
  return getattr(module, having)
