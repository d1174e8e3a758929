"""Command lines of the entry points: arguments, config files, overrides.

Only entry points (train, evaluate, ...) call this. Nothing is registered
globally, so one process can import any number of them.
"""
import argparse
import ast
import contextlib
import glob
import importlib.util
import os
import sys
import traceback

import ml_collections

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import old_names

# Hide what TensorFlow prints when it is imported: our messages are one line.
# Entry points import this module first.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')


class _Parser(argparse.ArgumentParser):
  """argparse that raises `UserError` instead of printing its usage."""

  def error(self, message):
    raise errors.UserError(f'{message} (see --help)')


def parser(doc, config=False, workdir=False):
  """An argument parser; `config` and `workdir` add the usual arguments."""
  p = _Parser(description=doc, allow_abbrev=False,
              formatter_class=argparse.RawDescriptionHelpFormatter)
  if config:
    p.add_argument('--config', required=config == 'required',
                   metavar='C.py:ARG',
                   help='config file and its argument; override values with '
                        '--config.a.b=value')
  if workdir:
    p.add_argument('--workdir', required=True,
                   help='output directory; of train, evaluate and sweep also '
                        'in a bucket, gs://BUCKET/NAME')
  return p


def parse(p, argv=None):
  """Parses `argv`; returns (args, config or None).

  args.overrides holds the (key, text) pairs of --config.KEY=TEXT.

  Args:
    p: a parser from `parser()`.
    argv: arguments without the program's name; sys.argv[1:] by default.

  Raises:
    UserError: an unknown argument, config file, key or value.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  overrides, rest = [], []
  while argv:
    word = argv.pop(0)
    if not word.startswith('--config.'):
      rest.append(word)
      continue
    key, equals, value = word[len('--config.'):].partition('=')
    if not equals:
      if not argv:
        raise errors.UserError(f'{word} needs a value')
      value = argv.pop(0)
    overrides.append((key, value))
  # Report an unknown argument before a missing one that it may stand for.
  known = [s for a in p._actions for s in a.option_strings]  # pylint: disable=protected-access
  unknown = [w for w in rest
             if w.startswith('--') and w.partition('=')[0] not in known]
  if not unknown:
    args, unknown = p.parse_known_args(rest)
  if unknown:
    word = unknown[0].partition('=')[0]
    raise errors.UserError(
        f'unknown argument {word!r}{errors.nearest(word, known)}')
  spec = getattr(args, 'config', None)
  if overrides and not (spec or hasattr(args, 'study')):
    raise errors.UserError(f'--config.{overrides[0][0]} without --config')
  args.overrides = overrides
  return args, load_config(spec, overrides) if spec else None


def load_config(spec, overrides=()):
  """Reads a config file and overrides some of its values.

  Args:
    spec: 'path.py' or 'path.py:ARG'; ARG is get_config's argument.
    overrides: (key, text) pairs, such as ('model.width', '128'); the text is
      read as the type of the value that it replaces.

  Returns:
    The ConfigDict of the file's get_config.

  Raises:
    UserError: no such file, a bad argument (get_config's ValueError), an
      unknown key (with the nearest one) or a value of another type.
  """
  config = call(spec, 'get_config')
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(f'--config {spec}: get_config returned '
                           f'{type(config).__name__}; expected a ConfigDict')
  for key, text in overrides:
    _override(config, key, text)
  return config


def load_sweep(spec):
  """The runs of a config file's get_sweep: [{'model.width': 128, ...}].

  Raises:
    UserError: no such file or function, a bad argument, or no dicts.
  """
  runs = call(spec, 'get_sweep')
  try:
    runs = list(runs)
  except TypeError:
    runs = []
  if not runs or not all(isinstance(run, dict) for run in runs):
    raise errors.UserError(f'--config {spec}: get_sweep returned no list '
                           'of dicts; expected for example [{"seed": 0}, '
                           '{"seed": 1}]')
  return runs


def call(spec, function, argument='--config', folder='configs'):
  """What `function` of the file 'path.py:ARG' returns for ARG.

  Args:
    spec: 'path.py' or 'path.py:ARG'.
    function: name of the function.
    argument: of the command line that names the file, for messages.
    folder: where such files are, for suggestions.

  Raises:
    UserError: no such file or function, a bad ARG, an error in the file.
  """
  path, _, given = spec.partition(':')
  if not (os.path.isfile(path) and path.endswith('.py')):
    files = {os.path.relpath(f) for d in (os.path.dirname(path), folder)
             for f in glob.glob(os.path.join(d, '*.py'))}
    raise errors.UserError(f'{argument}: no config file {path!r}'
                           + errors.nearest(path, sorted(files)))
  module_spec = importlib.util.spec_from_file_location('_config', path)
  module = importlib.util.module_from_spec(module_spec)
  with _named_errors(f'{argument} {spec}', path):
    # Not exec_module, which keeps bytecode: it would take a file that changes
    # twice in a second, and not in length, for the old one.
    source = module_spec.loader.get_data(path)
    exec(module_spec.loader.source_to_code(source, path), vars(module))
  if not hasattr(module, function):
    raise errors.UserError(f'{argument}: {path!r} has no function {function}')
  with _named_errors(f'{argument} {spec}', path):
    try:
      return getattr(module, function)(*[given] if given else [])
    except ValueError as e:
      raise errors.UserError(f'{argument} {spec}: {e}') from e


@contextlib.contextmanager
def _named_errors(what, path):
  """Turns an error of a config file into a line that names its place."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # It is the user's own code.
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
             if os.path.abspath(frame.filename) == os.path.abspath(path)]
    if isinstance(e, SyntaxError):
      lines = [e.lineno]
    raise errors.UserError(
        f'{what}: ' + (f'line {lines[-1]}: ' if lines else '')
        + f'{type(e).__name__}: {e.msg if isinstance(e, SyntaxError) else e}'
    ) from e


def current_key(config, key):
  """The current name of a dotted key of `config`, which may be an old name."""
  new = old_names.rename(key)
  return new if _has(config, new) else key


def _has(config, key):
  *groups, name = key.split('.')
  for group in groups:
    if not isinstance(config, ml_collections.ConfigDict) or (
        group not in config):
      return False
    config = config[group]
  return isinstance(config, ml_collections.ConfigDict) and name in config


def _override(config, key, text):
  """Sets config's dotted `key` to `text`, read as the old value's type."""
  key = current_key(config, key)
  if not _has(config, key):
    if _add_evaluator_option(config, key, text):
      return
    why = old_names.gone(key)
    if why:
      raise errors.UserError(f'config key {key!r} was removed: {why}')
    raise errors.UserError(
        f'unknown config key {key!r}'
        + (errors.nearest(key, _keys(config))
           or f'; the top-level keys are {", ".join(config)}'))
  *groups, name = key.split('.')
  node = config
  for group in groups:
    node = node[group]
  kind = node.get_type(name)
  if kind is ml_collections.ConfigDict:
    raise errors.UserError(
        f'config key {key!r} is a group; set one of its keys: '
        + ', '.join(f'{key}.{k}' for k in node[name]))
  try:
    node[name] = old_names.value(
        key, _READ.get(kind, ast.literal_eval)(text))
  except (KeyError, SyntaxError, TypeError, ValueError) as e:
    raise errors.UserError(f'config key {key!r}: found {text!r}, expected '
                           f'{kind.__name__} such as {node[name]!r}') from e


def _add_evaluator_option(config, key, text):
  """Sets evals.NAME.options.OPTION, which a config need not list.

  Evaluators check the name and the value before they start.

  Returns:
    whether `key` is one.
  """
  first, *names = key.split('.')
  if (first != 'evals' or len(names) != 3 or names[1] != 'options'
      or not _has(config, f'evals.{names[0]}')):
    return False
  try:
    value = ast.literal_eval({'true': 'True', 'false': 'False'}.get(
        text.lower(), text))
  except (SyntaxError, TypeError, ValueError):
    value = text
  evaluator = config.evals[names[0]]
  with evaluator.unlocked():
    evaluator.options = {**evaluator.get('options', {}), names[2]: value}
  return True


# How to parse an override by type; all other types are Python literals.
_READ = {
    str: str,
    int: int,
    float: float,
    bool: lambda text: {'true': True, 'false': False}[text.lower()],
}


def _keys(config, prefix=''):
  """The dotted names of all values in `config`."""
  for name in config:
    if isinstance(config[name], ml_collections.ConfigDict):
      yield from _keys(config[name], f'{prefix}{name}.')
    else:
      yield prefix + name
