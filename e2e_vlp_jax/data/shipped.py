"""JSON files that come with the package, or a user's own of the same form."""
import json
import os

from e2e_vlp_jax import errors


def names(folder):
  """Names of the files of a folder beside this module, sorted."""
  path = os.path.join(os.path.dirname(__file__), folder)
  return sorted(f[:-5] for f in os.listdir(path) if f.endswith('.json'))


def load(folder, name, key, what, parse):
  """Reads the shipped file `name` of a folder, or the file at path `name`.

  Args:
    folder: beside this module.
    name: name or path.
    key: config key that gave the name, for the error.
    what: what the file holds, with its article, for the error.
    parse: JSON value -> result; ValueError, TypeError or KeyError if it is not
      of the right form.

  Raises:
    UserError: no such file, or one without `what`.
  """
  path = os.path.join(os.path.dirname(__file__), folder, f'{name}.json')
  if not os.path.exists(path):
    path = str(name)
  if not os.path.isfile(path):
    raise errors.UserError(f'{key}: no {what.partition(" ")[2]} {name!r}'
                           + errors.nearest(name, names(folder)))
  try:
    with open(path, encoding='utf-8') as f:
      return parse(json.load(f))
  except (ValueError, TypeError, KeyError) as e:
    raise errors.UserError(f'{key}: {path} is not {what}: {e}') from e
