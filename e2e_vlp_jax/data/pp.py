"""'op|op(argument, key=value)' strings -> one function over an example.

An op is a factory in one of the `ops_*` modules: called with the `Context`
and the string's arguments it returns `fn(example) -> example`. An example is
a dict of numpy arrays and plain Python values, starting as a record; `fn`
returns a new dict. All randomness comes from example['seed'] (an int for
`rng.uniform`), which reaches every op folded with a constant of that op,
so that two ops never share draws. No state, no other source.

The ops plan: they are cheap arithmetic in Python. Pixels are touched once,
by `ops_image.render`, which the pipeline runs in parallel.
"""
import ast
import dataclasses
import inspect
import zlib

from e2e_vlp_jax.data import (ops_boxes, ops_image, ops_masking,
                              ops_randaug, ops_text, rng)
from e2e_vlp_jax.errors import UserError, nearest

OPS = {**ops_image.OPS, **ops_randaug.OPS, **ops_boxes.OPS, **ops_text.OPS,
       **ops_masking.OPS}


@dataclasses.dataclass(frozen=True)
class Context:
  """What every op may know of the pipeline it is part of."""
  tokenizer: object
  labels: object
  train: bool
  sentences: int       # S
  max_text: int        # L
  max_boxes: int       # M
  max_attributes: int  # K


def parse(pp):
  """[(op name, args, kwargs)] of a string; literals only, never evaluated.

  Raises:
    UserError: a syntax error, an unknown op, a value that is no literal.
  """
  try:
    node = ast.parse(pp.strip(), mode='eval').body
  except SyntaxError as e:
    raise UserError(f"pp string {pp!r}: expected 'op|op(argument, "
                    f"key=value)', {e.msg} at column {e.offset}") from e
  # 'a|b|c' is Python for (a | b) | c.
  nodes = []
  while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    nodes.append(node.right)
    node = node.left
  parsed = []
  for node in [node, *reversed(nodes)]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
      raise UserError(f'pp string {pp!r}: {ast.unparse(node)!r} is not an op')
    name = call.func.id
    if name not in OPS:
      raise UserError(f'pp string {pp!r}: unknown op {name!r}'
                      + nearest(name, OPS))
    try:
      parsed.append((name, [ast.literal_eval(a) for a in call.args],
                     {k.arg: ast.literal_eval(k.value)
                      for k in call.keywords}))
    except ValueError as e:
      raise UserError(f'pp string {pp!r}: the arguments of {name!r} must be '
                      'numbers, strings, tuples or True/False') from e
  return parsed


def build(pp, context, only=None):
  """The function of a whole pp string.

  Args:
    pp: 'op|op(arg)'.
    context: a `Context`.
    only: names of ops; all others are left out.

  Raises:
    UserError: as `parse`; or arguments that the op does not take. The
      function itself raises one where the ops' order cannot work.
  """
  steps, seen = [], {}
  for name, args, kwargs in parse(pp):
    if only is not None and name not in only:
      continue
    takes = inspect.signature(OPS[name])
    try:
      takes.bind(context, *args, **kwargs)
    except TypeError as e:
      raise UserError(
          f'pp string {pp!r}: {name}: {e}; it takes '
          f'{", ".join(list(takes.parameters)[1:]) or "no arguments"}') from e
    seen[name] = seen.get(name, 0) + 1
    constant = zlib.crc32(f'{name} {seen[name]}'.encode())
    steps.append((OPS[name](context, *args, **kwargs), constant))

  def apply(example):
    seed = example['seed']
    for fn, constant in steps:
      example = fn({**example, 'seed': rng.fold(seed, constant)})
    return {**example, 'seed': seed}

  return apply
