"""Finds models, objectives, tasks and so on by the names of their files.

Every model, objective, task, evaluator, dataset, weights format and peer is
one file in the package of its kind. The files themselves are the list, so there
is no registry to update.
"""
import importlib
import os

from e2e_vlp_jax import errors


def names(package, having=None):
  """Names of the modules of a package, sorted.

  Args:
    package: dotted name, such as 'e2e_vlp_jax.tasks'.
    having: if given, only modules that define this name at top level. The
      source files are searched, not imported.
  """
  # A folder counts as a module if it has a `builder.py`.
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
  """Imports the module `name` of a package and returns its `having`.

  Args:
    package: dotted name.
    name: name of one of its modules, or of a folder with a `builder.py`.
    having: name of a class, function or value that the module defines.
    key: config key or argument that contains `name`, for the error message.

  Raises:
    UserError: there is no such module; suggests the nearest name.
  """
  known = names(package, having)
  if name not in known:
    raise errors.UserError(f'{key}: no {name!r}' + errors.nearest(name, known))
  module = importlib.import_module(f'{package}.{name}')
  if not hasattr(module, having):
    module = importlib.import_module(f'{package}.{name}.builder')
  return getattr(module, having)
