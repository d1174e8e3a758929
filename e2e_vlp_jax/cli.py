"""Command lines of the entry points: arguments, config files, overrides.

Only the entry points (train, evaluate, ...) call this; nothing is registered
globally, so any number of them can be imported into one process.
"""
import argparse
import os
import sys

from absl import flags as absl_flags
from ml_collections import config_flags

from e2e_vlp_jax import errors


class _Parser(argparse.ArgumentParser):
  """argparse whose errors are `UserError`s instead of a page of usage."""

  def error(self, message):
    raise errors.UserError(f'{message} (see --help)')


def parser(doc, config=False, workdir=False):
  """An argument parser; `config` and `workdir` add the usual arguments."""
  p = _Parser(description=doc, allow_abbrev=False,
              formatter_class=argparse.RawDescriptionHelpFormatter)
  if config:
    p.add_argument('--config', required=config == 'required', metavar='C.py:ARG',
                   help='config file and its argument; override values with '
                        '--config.a.b=value')
  if workdir:
    p.add_argument('--workdir', required=True, help='output directory')
  return p


def parse(p, argv=None):
  """Parses `argv`; returns (args, config or None).

  Args:
    p: a parser from `parser()`.
    argv: arguments without the program's name; sys.argv[1:] by default.

  Raises:
    UserError: an unknown argument, config file, key or value.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  overrides, rest, k = [], [], 0
  while k < len(argv):
    if argv[k].startswith('--config.'):
      overrides.append(argv[k])
      if '=' not in argv[k]:
        if k + 1 == len(argv):
          raise errors.UserError(f'{argv[k]} needs a value')
        overrides[-1] += '=' + argv[k + 1]
        k += 1
    else:
      rest.append(argv[k])
    k += 1
  args, unknown = p.parse_known_args(rest)
  if unknown:
    known = [s for a in p._actions for s in a.option_strings]  # pylint: disable=protected-access
    word = unknown[0].split('=')[0]
    raise errors.UserError(
        f'unknown argument {word!r}{errors.nearest(word, known)}')
  spec = getattr(args, 'config', None)
  if overrides and not spec:
    raise errors.UserError(f'{overrides[0]} given without --config')
  return args, load_config(spec, overrides) if spec else None


def load_config(spec, overrides=()):
  """Reads `path.py[:argument]` and applies `--config.key=value` overrides.

  Returns:
    The ConfigDict of the file's get_config(argument).

  Raises:
    UserError: no such file, a bad argument, an unknown key (with the nearest
      one) or a value of the wrong type.
  """
  path = spec.partition(':')[0]
  if not os.path.isfile(path):
    raise errors.UserError(f'--config: no file {path!r}'
                           + errors.nearest(path, _config_files(path)))
  values = absl_flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  try:
    values(['', f'--config={spec}', *overrides])
  except errors.UserError:
    raise
  except absl_flags.UnrecognizedFlagError as e:
    raise errors.UserError(f'unknown config key: {e}') from e
  except (absl_flags.Error, AttributeError, KeyError, TypeError,
          ValueError) as e:
    raise errors.UserError(f'--config {spec} {" ".join(overrides)}: {e}'
                           ) from e
  return values['config'].value


def _config_files(path):
  folder = os.path.dirname(path) or '.'
  if not os.path.isdir(folder):
    return []
  return [os.path.join(folder, f) for f in sorted(os.listdir(folder))
          if f.endswith('.py')]
