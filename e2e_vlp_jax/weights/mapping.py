"""Converts the tensors of a published file to our variables, and back.

A *source* is one file of this package, found by its name (hf_detr, ...):
  SIGNATURE         tensors by which its files are recognised.
  SURPLUS           ((regex, reason), ...): tensors that we do not use.
  COPIES            {tensor: the tensor of which it is a copy}.
  canonical(name)   a tensor's name in the source's published spelling.
  describe(tensors) facts about the file's model: {config key: value}, and
                    'classes' and 'vocabulary' if it has them.
  read_config(c)    the same from the config.json beside the file, if any.
  entries(config)   the `Entry` of each tensor.
and optionally:
  spelling(names)   `canonical` for a file with these names.
  UNSAID            config keys that its tensors do not determine.
  FEWER             config keys that may be less than in the file, such as a
                    number of layers, of which the first ones are taken.
  NEVER             (regex, ...): variables that its files never have although
                    they have others of the same module.
  RESIZABLE         config keys that may differ from the file with --resize.
  resize(x, shape)  resizes a tensor of the form 'table' for them.

Every form below only permutes values, so that import and export keep every bit.
Half precision is widened to float32 without loss; the type is recorded and
restored at export.
"""
import importlib
import re
from typing import NamedTuple

import ml_collections
import numpy as np

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import files


class Entry(NamedTuple):
  """One tensor and its variable.

  Attributes:
    theirs: the tensor's name in the source's published spelling.
    ours: path of our variable, such as 'params/encoder/layer0/...'.
    form: key of `FORMS`.
    group: a file has all tensors of a group or none; '' = required.
    part: (i, n): it is the i-th of n equal parts of the variable, along its
      last axis.
  """
  theirs: str
  ours: str
  form: str = 'same'
  group: str = ''
  part: tuple = (0, 1)

  @property
  def key(self):
    """Path of the variable, and the part if there are several."""
    i, n = self.part
    return self.ours if n == 1 else f'{self.ours}[{i}/{n}]'

  def take(self, x):
    """The tensor in our variable `x`."""
    i, n = self.part
    return FORMS[self.form][1](np.split(x, n, -1)[i] if n > 1 else x)


# How torch's layout becomes ours, and ours torch's.
FORMS = {
    'same': (lambda x: x, lambda x: x),
    'table': (lambda x: x, lambda x: x),  # 'same', and may be resized
    'dense': (np.transpose, np.transpose),           # [out, in]
    'conv': (lambda x: x.transpose(2, 3, 1, 0),      # [out, in, h, w]
             lambda x: x.transpose(3, 2, 0, 1)),
    'conv1x1': (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    # A two-way classifier whose classes are in the other order.
    'flip': (lambda x: x[::-1], lambda x: x[::-1]),
    'dense_flip': (lambda x: x[::-1].T, lambda x: x.T[::-1]),
}


def formats():
  """Names of all sources."""
  return discovery.names('e2e_vlp_jax.weights', 'SIGNATURE')


def find(name):
  """Finds the source called `name`; UserError if there is none."""
  if name not in formats():
    raise errors.UserError(f'--format: no format {name!r}'
                           + errors.nearest(name, formats()))
  return importlib.import_module(f'e2e_vlp_jax.weights.{name}')


def dense(theirs, ours, group='', form='dense'):
  """Entries of a linear layer."""
  return [Entry(f'{theirs}.weight', f'params/{ours}/kernel', form, group),
          Entry(f'{theirs}.bias', f'params/{ours}/bias',
                'flip' if form == 'dense_flip' else 'same', group)]


def norm(theirs, ours, group=''):
  """Entries of a LayerNorm."""
  return [Entry(f'{theirs}.weight', f'params/{ours}/norm/scale', group=group),
          Entry(f'{theirs}.bias', f'params/{ours}/norm/bias', group=group)]


def head_of(config, view):
  """Name of the first head of `config.model.heads` in a view, or None."""
  heads = config.model.get('heads', {})
  return next((name for name in heads
               if view in heads[name].get('views', ('joint',))), None)


def count(pattern, tensors):
  """1 + the largest number that `pattern`'s group finds in the names."""
  found = [int(m.group(1)) for m in map(re.compile(pattern).match, tensors)
           if m]
  return 1 + max(found, default=-1)


def spelled(source, tensors, path):
  """{published spelling: (spelling in the file, array)} of a file.

  Raises:
    UserError: not a file of this source; suggests the right one.
  """
  out = {}
  canonical = canonical_of(source, tensors)
  for name, x in tensors.items():
    other, _ = out.setdefault(canonical(name), (name, x))
    if other != name:
      raise errors.UserError(f'--input: {path!r} has the same tensor under '
                             f'two names, {other!r} and {name!r}')
  lacking = [name for name in source.SIGNATURE if name not in out]
  if lacking:
    name = source.__name__.rpartition('.')[2]
    others = that_fit(tensors)
    raise errors.UserError(
        f'--input: {path!r} does not hold {name} weights: no tensor '
        f'{lacking[0]!r} among its {len(tensors)} (the first is '
        f'{min(tensors, default="")!r})'
        + (f'; did you mean --format {others[0]}?' if others else ''))
  return out


def that_fit(tensors):
  """Names of the formats whose signature is among these tensors."""
  return [f for f in formats() if set(find(f).SIGNATURE) <= set(
      map(canonical_of(find(f), tensors), tensors))]


def canonical_of(source, names):
  """How `source` spells the names of a file."""
  return (source.spelling(names) if hasattr(source, 'spelling')
          else source.canonical)


def value_of(config, key):
  """The config's value under 'a.b.c', None where it has no such key."""
  for part in key.split('.'):
    inside = isinstance(config, ml_collections.ConfigDict) and part in config
    config = config[part] if inside else None
  return config


def check_config(facts, config, sizes, path, source=None, resize=False):
  """UserError if the file's model is not that of `config`.

  Args:
    facts: from `describe` and `read_config`.
    config: whole config.
    sizes: for 'classes' and 'vocabulary': (config key, number of entries,
      {number: value of that key that has it}).
    path: path of the file, for the error message.
    source: module, for its `FEWER` and `RESIZABLE`.
    resize: whether the latter may differ.
  """
  found, fitting, absent = [], [], []
  fewer, resizable = (getattr(source, name, ())
                      for name in ('FEWER', 'RESIZABLE'))
  for key, value in facts.items():
    if key in sizes:
      key, number, settings = sizes[key]
      if number != value:
        found.append(f'{key} has {number} entries, the file {value}')
        fitting.append(f'--config.{key}={settings[value]}'
                       if value in settings else
                       f'a {key} of {value} entries')
      continue
    node = value_of(config, key)
    if key in fewer and node is not None and 0 < node < value:
      continue
    if node is None:  # cannot be set on the command line
      absent.append(key)
    elif node != value and not (resize and key in resizable):
      found.append(f'{key} is {node}, the file has {value}')
      fitting.append(f"--config.{key}={str(value).replace(' ', '')}"
                     + (' (or --resize)' if key in resizable else ''))
  if absent:
    found.append(f'it has no {_some(absent)}')
    fitting.append(f'a config that has {absent[0]}')
  if found:
    raise errors.UserError(
        f'--input {path!r} is of another model than --config: '
        + '; '.join(found) + '. These would fit: ' + ' '.join(fitting))


def to_ours(source, tensors, config, shapes, path, resize=False):
  """Converts a file's tensors to our variables.

  Args:
    source: module, see above.
    tensors: from `spelled`.
    config: a config that `check_config` accepts.
    shapes: {path of a variable: shape} of the config's model.
    path: of the file, for messages.
    resize: whether tensors of the form 'table' may have another shape.

  Returns:
    (variables, record): {path: float32 array}, and a JSON-able dict that
    accounts for every tensor of the file and every variable of the model:
    'tensors' {path (and part): [name in the file, type]}, 'copies' {name:
    name of the equal tensor}, 'surplus' {name: reason}, 'missing' [path],
    'resized' {name: [shape in the file, ours]}.

  Raises:
    UserError: tensors are missing, or have wrong shapes, types or values.
  """
  every = source.entries(config)
  entries = [e for e in every if e.ours in shapes]
  there = {e.group for e in entries if e.group and e.theirs in tensors}
  lacking = [e.theirs for e in entries if e.theirs not in tensors
             and (not e.group or e.group in there)]
  if lacking:
    raise errors.UserError(f'--input {path!r} is not whole: it lacks '
                           + _some(lacking))
  variables, names, wrong, resized = {}, {}, [], {}
  for e in entries:
    if e.theirs not in tensors:
      continue
    name, x = tensors[e.theirs]
    if str(x.dtype) not in files.FLOATS:
      wrong.append(f'{name} is {x.dtype}, expected one of '
                   + ', '.join(files.FLOATS))
      continue
    expected = _their_shape(e, shapes[e.ours])
    if (resize and e.form == 'table' and x.shape != expected
        and x.shape[1:] == expected[1:]):
      resized[name] = [list(x.shape), list(expected)]
      x = source.resize(x, expected)
    if x.shape != expected:
      wrong.append(f'{name} is {list(x.shape)}, expected {list(expected)}')
      continue
    x = np.asarray(FORMS[e.form][0](x), np.float32, order='C')
    i, n = e.part
    if n > 1:
      parts = variables.setdefault(e.ours, np.zeros(shapes[e.ours], x.dtype))
      np.split(parts, n, -1)[i][...] = x
    else:
      variables[e.ours] = x
    names[e.key] = [name, str(tensors[e.theirs][1].dtype)]
  if wrong:
    raise errors.UserError(f'--input {path!r} does not fit: ' + _some(wrong))
  check_finite(f'--input {path!r}', dict(tensors[e.theirs] for e in entries
                                         if e.theirs in tensors))
  copies, surplus = _left_over(source, tensors, every,
                               {e.theirs for e in entries})
  return variables, {
      'tensors': names, 'copies': copies, 'surplus': surplus,
      'missing': [k for k in shapes if k not in variables],
      'resized': resized}


def check_finite(what, tensors):
  """UserError if values are NaN or infinite; names the tensors and counts.

  Args:
    what: for the message.
    tensors: {name: array of floats}.
  """
  found = [f'{name} ({x.size - count} of {x.size})'
           for name, x in tensors.items()
           if (count := np.count_nonzero(np.isfinite(x))) < x.size]
  if found:
    raise errors.UserError(
        f'{what}: {len(found)} tensor(s) have values that are not finite (NaN '
        f'or infinite): {_some(found)}; expected weights of a model that works')


def _left_over(source, tensors, entries, used):
  """({copy: name of the equal tensor}, {surplus tensor: reason}).

  Args:
    source, tensors: see `to_ours`.
    entries: all of the source's, for this config.
    used: canonical names of the tensors that became variables.
  """
  copies, surplus = {}, {}
  places = {e.theirs: e.ours for e in entries}
  for canonical, (name, x) in tensors.items():
    if canonical in used:
      continue
    origin = source.COPIES.get(canonical)
    original, y = tensors.get(origin, (None, None))
    if original and origin not in used:
      surplus[name] = f'stands for {original}, which is left out, too'
    elif original and x.dtype == y.dtype and np.array_equal(x, y):
      copies[name] = original
    elif original:
      surplus[name] = f'differs from {original}, which stands for both here'
    elif canonical in places:
      surplus[name] = f'the config does not train {places[canonical]}'
    else:
      surplus[name] = next((why for pattern, why in source.SURPLUS
                            if re.fullmatch(pattern, canonical)),
                           'unknown to this format')
  return copies, surplus


def to_theirs(source, variables, config, record=None):
  """Converts our variables to tensors, the inverse of `to_ours`.

  Args:
    source: module.
    variables: {path: array}.
    config: config of the checkpoint.
    record: from `to_ours`, to restore the names and types of that file;
      without it, published spelling and the variables' types.

  Raises:
    UserError: the checkpoint lacks variables that every file of this source
      has, or has values that are not finite.
  """
  entries = _entries(source, config)
  if record is None:
    names = {e.key: [e.theirs, str(variables[e.ours].dtype)]
             for e in entries if e.ours in variables}
    lacking = [e.ours for e in entries
               if not e.group and e.ours not in variables]
    if lacking:
      raise errors.UserError(
          '--input: the checkpoint is of another model than --format '
          f'{source.__name__.rpartition(".")[2]} describes: it lacks '
          + _some(lacking))
    copies = {}
  else:
    names, copies = record['tensors'], record['copies']
  places = {e.key: e for e in entries}
  check_finite('--input, the checkpoint', {
      places[key].ours: variables[places[key].ours] for key in names})
  out = {name: places[key].take(variables[places[key].ours]).astype(
      files.FLOATS[kind]) for key, (name, kind) in names.items()}
  return {**out, **{name: out[original] for name, original in copies.items()}}


def _entries(source, config):
  """The source's entries; UserError if `config` is of quite another model."""
  try:
    return source.entries(config)
  except (AttributeError, KeyError, TypeError) as e:
    name = source.__name__.rpartition('.')[2]
    raise errors.UserError(
        f'--input: the checkpoint is of another model than --format {name} '
        f'describes: its config of {config.model.name} has no '
        f'{str(e.args[0]).splitlines()[0].strip(chr(34))}') from e


def uncovered(source, missing, tensors):
  """Missing variables of modules of which the file has other variables.

  Args:
    source: module.
    missing: paths of variables that the file did not give.
    tensors: paths of those that it gave.
  """
  module = lambda path: path.split('/')[:2]
  covered = [module(k) for k in tensors]
  never = getattr(source, 'NEVER', ())
  return [k for k in missing if module(k) in covered
          and not any(re.fullmatch(pattern, k) for pattern in never)]


def _their_shape(entry, shape):
  return entry.take(np.broadcast_to(np.float32(0), shape)).shape


def _some(items):
  """The first three items and the number of others."""
  more = f' and {len(items) - 3} more' if len(items) > 3 else ''
  return '; '.join(items[:3]) + more
