"""'op|op(argument, key=value)' strings -> one function over an example.

An op is a factory in one of the files `data/ops_*.py`: called with the
`Context` and the string's arguments it returns `fn(example) -> example`. An
example is a dict of numpy arrays and plain Python values that starts as a
record; `fn` returns a new dict. All randomness comes from example['seed'] (an
int for `rng.uniform`). Each op gets it folded with a constant of that op, so
that no two ops share random numbers. Ops have no state.

The ops only plan, with cheap arithmetic in Python. Pixels are touched once, by
the `render` of their keys, which the pipeline runs in parallel.

A new op is a new file `data/ops_NAME.py`; this module finds it. It defines
  OPS    {op: factory}
  KEYS   {op: (keys.Key, ...)}, the batch keys that the op makes or changes
  SIZES  optional, {op: function}: called with the op's arguments by name it
         returns {letter: size}, for this op and those after it
An op must also work on `records.nothing()`, on which every pipeline tries its
ops first.
"""
import ast
import dataclasses
import importlib
import inspect
import zlib
from collections.abc import Callable

from e2e_vlp_jax import discovery
from e2e_vlp_jax.data import keys, rng
from e2e_vlp_jax.errors import UserError, nearest

_PACKAGE = 'e2e_vlp_jax.data'
# Renamed arguments of ops: {(op, old name): name}.
_RENAMED = {('scale_crop', 'of'): 'canvas_side', ('fit', 'limits'): 'max_sides'}


@dataclasses.dataclass(frozen=True)
class Op:
  """An op as declared in its file; see the module's docstring."""
  make: Callable
  keys: tuple = ()
  sizes: Callable = lambda **_: {}


def find_ops():
  """{name: Op} of all op files."""
  found = {}
  for name in discovery.names(_PACKAGE, 'OPS'):
    if not name.startswith('ops_'):
      continue
    module = importlib.import_module(f'{_PACKAGE}.{name}')
    made, sizes = (getattr(module, table, {}) for table in ('KEYS', 'SIZES'))
    for op in {**made, **sizes}.keys() - module.OPS.keys():
      raise UserError(f'data/{name}.py: KEYS or SIZES name the op {op!r}'
                      + nearest(op, module.OPS))
    for op, make in module.OPS.items():
      if op in found:
        raise UserError(f'data/{name}.py: the op {op!r} is already in '
                        f'{found[op].make.__module__}')
      found[op] = Op(make, tuple(made.get(op, ())), sizes.get(op, Op.sizes))
  return found


OPS = find_ops()


@dataclasses.dataclass(frozen=True)
class Context:
  """Settings of the pipeline that ops may read."""
  tokenizer: object
  labels: object
  train: bool
  sentences: int       # S
  max_text: int        # L
  max_boxes: int       # M
  max_attributes: int  # K
  unit: str = 'image'
  answers: object = None  # an `answer_list.AnswerList`


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


def bind(pp):
  """[(op name, its arguments by name)] of a string, defaults included.

  Raises:
    UserError: as `parse`; or arguments that the op does not take.
  """
  bound = []
  for name, args, kwargs in parse(pp):
    takes = inspect.signature(OPS[name].make)
    kwargs = {_RENAMED.get((name, k), k): v for k, v in kwargs.items()}
    try:
      found = takes.bind(None, *args, **kwargs)
    except TypeError as e:
      raise UserError(
          f'pp string {pp!r}: {name}: {e}; it takes '
          f'{", ".join(list(takes.parameters)[1:]) or "no arguments"}') from e
    found.apply_defaults()
    bound.append((name, dict(list(found.arguments.items())[1:])))
  return bound


def build(pp, context, only=None):
  """The function of a whole pp string.

  Args:
    pp: 'op|op(arg)'.
    context: a `Context`.
    only: names of ops; all others are left out.

  Raises:
    UserError: as `bind`. The function itself raises one if the ops are in a
      wrong order.
  """
  steps, count = [], {}
  for name, arguments in bind(pp):
    if only is not None and name not in only:
      continue
    count[name] = count.get(name, 0) + 1
    constant = zlib.crc32(f'{name} {count[name]}'.encode())
    steps.append((OPS[name].make(context, **arguments), constant))

  def apply(example):
    seed = example['seed']
    for fn, constant in steps:
      example = fn({**example, 'seed': rng.fold(seed, constant)})
    return {**example, 'seed': seed}

  return apply


def declared(pp, sizes):
  """The batch keys of a pp string, in the order in which they are made.

  Args:
    pp: 'op|op(arg)'.
    sizes: {letter: size}.

  Returns:
    [(Key, sizes)]: the keys of the ops, then those of every batch, each with
    the sizes of its letters. A key that a later op changes comes again.

  Raises:
    UserError: as `bind`; no op makes an image; two ops disagree on a key.
  """
  all_keys()
  found = []
  for name, arguments in bind(pp):
    sizes = {**sizes, **OPS[name].sizes(**arguments)}
    found += [(key, sizes) for key in OPS[name].keys
              if 0 not in key.row_shape(sizes)]
  if not any(key.name == 'image' for key, _ in found):
    raise UserError(f'pp string {pp!r}: no fit or squash, which make the '
                    'image of a batch')
  return found + [(key, sizes) for key in keys.ALWAYS]


def all_keys():
  """{key name: (Key, [ops that make or change it])}, over all op files.

  Raises:
    UserError: two ops declare a key with different shapes or dtypes.
  """
  found = {}
  for op, declared_keys in [*((name, op.keys) for name, op in OPS.items()),
                            ('every batch', keys.ALWAYS)]:
    for key in declared_keys:
      first, ops = found.setdefault(key.name, (key, []))
      if str(first) != str(key):
        raise UserError(
            f'batch key {key.name!r}: the op {op!r} declares it as {key}, '
            f'{ops[0]!r} as {first}; expected the same, or another name')
      ops.append(op)
  return found


def table():
  """The table of keys in docs/data.md, as Markdown."""
  lines = ['| key | type and shape | padding | made by | holds |',
           '|---|---|---|---|---|']
  for name, (key, ops) in all_keys().items():
    lines.append(f'| `{name}` | {key} | {key.padding} | {", ".join(ops)} '
                 f'| {key.holds} |')
  return '\n'.join(lines)
