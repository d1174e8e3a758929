"""Which of a file's sets of weights is converted.

Training scripts save several: the weights and their average (`model`,
`model_ema`), or a student and its teacher. A set is a dict of tensors within a
torch file, or all tensors whose names begin with the set's name and a dot.
"""
from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import mapping

# Names of the weights that were trained, in the order of preference; '' is the
# file itself. All others must be asked for if there are several.
_USUAL = ('', 'state_dict', 'model', 'model_state_dict', 'module')


def choose(source, sets, wanted, path):
  """Chooses a set.

  Args:
    source: a format, see `mapping`.
    sets: {name: {tensor name: array}}, from `files.read`.
    wanted: name of a set, or None: the one that fits the format; of several
      the trained weights, not their average.
    path: of the file, for messages.

  Returns:
    (name, tensors, others): others are the names of other sets that fit.

  Raises:
    UserError: no set of that name, or several and none of a usual name.
  """
  nested = {}
  for name, tensors in sets.items():
    for prefix, inside in _by_prefix(source, tensors).items():
      nested[f'{name}.{prefix}' if name else prefix] = inside
  every = {**nested, **sets}
  fitting = [n for n in every if _fits(source, every[n])]
  if wanted is not None:
    name = _named(wanted, every, path)
  else:
    name = _default([n for n in fitting if n in sets], path)
    if name is None and any(n in nested for n in fitting) and not any(
        map(mapping.that_fit, sets.values())):
      raise errors.UserError(
          f'--input: {path!r} has such weights only under a prefix: say '
          + ' or '.join(f'--set {n}' for n in fitting))
    if name is None:  # Nothing fits; `mapping.spelled` says why.
      name = max(sets, key=lambda n: len(sets[n]))
  return name, every[name], [n for n in fitting if n != name]


def _fits(source, tensors):
  canonical = mapping.canonical_of(source, tensors)
  return set(source.SIGNATURE) <= set(map(canonical, tensors))


def _by_prefix(source, tensors):
  """{prefix: tensors without it} of prefixes that are not the format's own."""
  canonical = mapping.canonical_of(source, tensors)
  own = {name.partition('.')[0] for name in tensors
         if canonical(name) in source.SIGNATURE}
  found = {}
  for name, x in tensors.items():
    prefix, dot, rest = name.partition('.')
    if dot and prefix not in own:
      found.setdefault(prefix, {})[rest] = x
  return found


def _named(wanted, every, path):
  """The full name of a set, of which `wanted` may be the last part."""
  found = [n for n in every if n == wanted] or [
      n for n in every if n.rpartition('.')[2] == wanted]
  if len(found) != 1:
    names = [n for n in every if n]
    raise errors.UserError(
        f'--set: {path!r} has no set {wanted!r}'
        + (errors.nearest(wanted, names) if names else '') if not found else
        f'--set: {wanted!r} may be any of ' + ', '.join(found))
  return found[0]


def _default(fitting, path):
  """The set with the most usual name; None if there is none."""
  rank = {n: i for i, n in enumerate(_USUAL)}
  ranked = sorted((rank[n.partition('.')[0]], n) for n in fitting
                  if n.partition('.')[0] in rank)
  if ranked:
    return ranked[0][1]
  if len(fitting) > 1:
    raise errors.UserError(
        f'--input: {path!r} has several sets of weights: '
        f'{", ".join(fitting)}; choose one with --set NAME')
  return fitting[0] if fitting else None
