"""Reads the cost of a step from its program.

FLOPs come from the jaxpr, because XLA's own analysis counts the body of a loop
once, however often it runs, and only counts one chip's share. Collectives come
from the text of the compiled program, because only the compiler knows them.
"""
import math
import re
from typing import NamedTuple

import jax
from jax.interpreters import partial_eval as pe


# --- FLOPs ------------------------------------------------------------------
def flops(jaxpr):
  """FLOPs of matrix products and convolutions: 2 per multiply-add.

  The body of a scan counts once per iteration, and recomputation counts
  again. Elementwise operations and reductions are left out, as usual, and so
  are results that XLA will drop because nothing reads them. The body of a while
  loop counts once, because a jaxpr does not contain its number of iterations
  (our only one, the matching, has no matrix products).

  Args:
    jaxpr: ClosedJaxpr of the whole, global computation.
  """
  live, _ = pe.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  return _flops(live)


def _flops(jaxpr):
  return sum(_equation(e) for e in jaxpr.eqns)


def _equation(eqn):
  name, params = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    (contract, _), _ = params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    return 2. * eqn.outvars[0].aval.size * math.prod(
        shape[d] for d in contract)
  if name == 'conv_general_dilated':
    # One output value takes every tap of the kernel and all input features.
    # In a dilated input (the gradient of a strided convolution) the holes are
    # not multiplied; padding counts as if it were pixels.
    kernel = eqn.invars[1].aval.shape
    _, features, *space = params['dimension_numbers'].rhs_spec
    taps = kernel[features] * math.prod(kernel[d] for d in space)
    return 2. * eqn.outvars[0].aval.size * taps / math.prod(
        params['lhs_dilation'])
  if name == 'pallas_call' and params.get('cost_estimate'):
    return float(params['cost_estimate'].flops)  # Of the whole grid.
  if name == 'cond':
    return max(_flops(b.jaxpr) for b in params['branches'])
  times = params['length'] if name == 'scan' else 1
  if name == 'shard_map':  # Its body runs on one device.
    axes = params.get('newly_manual_axes') or params['manual_axes']
    times = math.prod(params['mesh'].shape[a] for a in axes)
  return times * sum(_flops(j) for j in _inner(params))


def _inner(params):
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(x, 'jaxpr'):
        x = x.jaxpr
      if hasattr(x, 'eqns'):
        yield x


# --- Collectives ------------------------------------------------------------
class Collective(NamedTuple):
  """A collective operation of a compiled program.

  Attributes:
    kind: 'all-reduce', 'all-gather', ...
    bytes: size of the larger of operand and result, on one chip.
    group: number of chips that take part.
    times: how often a step runs it.
    in_loop: inside a loop of unknown length, which makes `times` too low.
  """
  kind: str
  bytes: int
  group: int
  times: int
  in_loop: bool

  @property
  def traffic(self):
    """Minimum bytes that a chip sends in a step, with ring algorithms."""
    share = (self.group - 1) / self.group
    factor = {'all-reduce': 2 * share, 'collective-permute': 1.,
              'collective-broadcast': 1.}.get(self.kind, share)
    return factor * self.bytes * self.times


_KINDS = ('all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|'
          'collective-permute|collective-broadcast')
_OPERATION = re.compile(
    rf'= (?P<type>.*?)[\s)](?P<kind>{_KINDS})(?P<start>-start)?\(')
_SHAPE = re.compile(r'\b(pred|bf16|c64|c128|[suf]\d+)(?:e\w+)?\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = '
                          r'(?P<type>.*?)\s(?P<opcode>[a-z\-]+)\('
                          r'(?P<rest>.*)$')
_LAYOUT = re.compile(_SHAPE.pattern + r'(\{[^}]*\})?')
_OPERAND = re.compile(r'%([\w.\-]+)')
# Operations that move nothing, or whose traffic is counted elsewhere.
_FREE = re.compile(
    r'parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|'
    r'call|after-all|opt-barrier|partition-id|replica-id|.*-done|.*-update')
# Operations that read their first operand only in part.
_READS_A_PART = ('slice', 'dynamic-slice', 'gather')
_CALLED = re.compile(
    r'\b(body|condition|calls|to_apply|true_computation|false_computation)='
    r'%?([\w.\-]+)|branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# {{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}.
_GROUPS = re.compile(r'replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|'
                     r'mesh\[([^\]]*)\] *\{([^}]*)\})')


def collectives(hlo):
  """[Collective] of `compiled.as_text()`, each with how often it runs."""
  parts = re.search(r'num_partitions=(\d+)', hlo)
  replicas = re.search(r'replica_count=(\d+)', hlo)
  everyone = int((parts or replicas or [0, 1])[1])
  found = []
  for line, times, in_loop in _executed(hlo, fused=True):
    match = _OPERATION.search(line)
    if match:
      found.append(_collective(match, line, everyone, times, in_loop))
  return [c for c in found if c.group > 1]


def memory_traffic(hlo):
  """Bytes that a step moves from and to a chip's main memory.

  Each operation reads its operands and writes its results once; a fusion
  counts as one operation. Arrays that the compiler keeps in on-chip memory (a
  TPU's VMEM, memory space 1) are free. What reads a part of an array (a slice,
  a gather, a prefetch of a slice, a fusion that begins with one) is charged for
  that part. What writes into a part of an array is charged for the whole.
  """
  bodies, _ = _computations(hlo)
  sizes, total = {}, 0.
  for line in hlo.splitlines():
    match = _INSTRUCTION.match(line)
    if match:
      sizes[match['name']] = sum(
          _bytes(kind, dims) for kind, dims, layout in _LAYOUT.findall(
              match['type']) if 'S(' not in layout)
  for line, times, _ in _executed(hlo, fused=False):
    match = _INSTRUCTION.match(line)
    if match and not _FREE.fullmatch(match['opcode']):
      total += times * _moved(match, sizes, bodies)
  return total


def _moved(match, sizes, bodies):
  """Bytes that one run of an instruction moves.

  Args:
    match: of _INSTRUCTION.
    sizes: {name: bytes in main memory}.
    bodies: from `_computations`.
  """
  opcode, result = match['opcode'], sizes[match['name']]
  if opcode == 'slice-start':  # ((operand), slice, context)
    (_, _, source), (kind, dims, target) = _LAYOUT.findall(match['type'])[:2]
    return _bytes(kind, dims) * sum(
        'S(' not in layout for layout in (source, target))
  if opcode.endswith('-start'):  # Its type has the operands.
    return result
  operands = _OPERAND.findall(match['rest'].split('), ')[0])
  called = re.search(r'\bcalls=%?([\w.\-]+)', match['rest'])
  parts = {}
  if opcode in _READS_A_PART:
    parts[0] = _size_of(match['type'])
  elif opcode == 'fusion' and called:
    parts = _parts_read(bodies.get(called[1], ()))
  read = {}
  for i, name in enumerate(operands):
    size = sizes.get(name, 0)
    read[name] = max(read.get(name, 0), min(size, parts.get(i, size)))
  return result + sum(read.values())


def _parts_read(lines):
  """{number of a parameter: bytes} that a fusion reads only in part."""
  found = [m for m in map(_INSTRUCTION.match, lines) if m]
  users = {}
  for m in found:
    for name in _OPERAND.findall(m['rest'].split('), ')[0]):
      users.setdefault(name, []).append(m)

  def read(name):
    """Bytes read of `name`, or None for the whole."""
    total = 0
    for m in users.get(name, ()):
      first = _OPERAND.search(m['rest'])[1] == name
      if m['opcode'] in _READS_A_PART and first:
        size = _size_of(m['type'])
      elif m['opcode'] == 'bitcast':
        size = read(m['name'])
      else:
        size = None
      if size is None:
        return None
      total += size
    return total
  parts = {int(m['rest'].split(')')[0]): read(m['name']) for m in found
           if m['opcode'] == 'parameter'}
  return {i: size for i, size in parts.items() if size is not None}


def _size_of(kind):
  """Bytes of a type, wherever it is."""
  return sum(_bytes(*shape) for shape in _SHAPE.findall(kind))


def _executed(hlo, fused):
  """(line, how often it runs, in a loop of unknown length) of a program.

  Args:
    hlo: text of a compiled program.
    fused: also the lines inside fusions, reductions and the like.
  """
  bodies, entry = _computations(hlo)

  def visit(name, times, in_loop):
    for line in bodies.get(name, ()):
      yield line, times, in_loop
      if re.search(r'-(done|update)\(', line):
        continue  # Its start was counted.
      trips = _trips(line, bodies)
      for key, called, branches in _CALLED.findall(line):
        if key in ('calls', 'to_apply') and not fused and not re.search(
            r' (async-start|call)\(', line):
          continue
        loop = key in ('body', 'condition')
        for inner in [called] if called else branches.split(','):
          yield from visit(
              inner.strip().lstrip('%'),
              times * (trips if loop and trips else 1),
              in_loop or (loop and not trips))
  return visit(entry, 1, False)


def _trips(line, bodies):
  """How often the loop that `line` starts runs, or None.

  Some compilers annotate the number. Otherwise it is in the loop's condition:
  jax's scans and counted loops compare a counter from 0 with a constant.
  """
  known = _TRIPS.search(line)
  if known:
    return int(known[1])
  condition = re.search(r'\bcondition=%?([\w.\-]+)', line)
  lines = '\n'.join(bodies.get(condition[1], ())) if condition else ''
  limit = re.search(r'ROOT .*compare\(%?[\w.\-]+, %?([\w.\-]+)\), '
                    r'direction=LT', lines)
  number = limit and re.search(
      rf'%?{re.escape(limit[1])} = s32.* constant\((\d+)\)', lines)
  return int(number[1]) if number else None


def _computations(hlo):
  """({computation: its lines}, the entry computation's name)."""
  bodies, entry, lines = {}, None, []
  for line in hlo.splitlines():
    match = None if line.startswith(' ') else _COMPUTATION.match(line)
    if match:
      lines = bodies.setdefault(match[2], [])
      if match[1]:
        entry = match[2]
    else:
      lines.append(line)
  return bodies, entry


def _collective(match, line, everyone, times, in_loop):
  sizes = [_bytes(*shape) for shape in _SHAPE.findall(match['type'])]
  if match['start'] and match['kind'] != 'all-reduce':
    # (operands, results): an asynchronous start names both.
    sizes = [s for s in sizes if s > 4] if len(sizes) > 2 else sizes
    sizes = sizes[len(sizes) // 2:]
  group = _group_size(line) or everyone
  total = sum(sizes)
  if match['kind'] == 'reduce-scatter':
    total *= group
  return Collective(match['kind'], int(total), group, times, in_loop)


def _group_size(line):
  groups = _GROUPS.search(line)
  if not groups:
    return None
  listed, iota, axes, chosen = groups.groups()
  if listed:
    return len(listed.split(','))
  if iota:
    return int(iota)
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
  # An axis in part is written 'a':(1)2, of size 2.
  return math.prod(int(part or sizes[axis]) for axis, part in re.findall(
      r"'(\w+)'(?::\(\d+\)(\d+))?", chosen))


def _bytes(kind, dims):
  bits = {'pred': 8, 'bf16': 16, 'c64': 64, 'c128': 128}.get(kind)
  bits = bits or int(re.sub(r'\D', '', kind))
  return math.prod(int(d) for d in dims.split(',') if d) * bits / 8


# --- Memory -----------------------------------------------------------------
def memory(compiled):
  """Bytes on one chip: {'arguments', 'temporaries', 'peak'}.

  Arguments are the state and the batch. They are donated, so results reuse
  their memory. The peak is the most that must be in memory at the same time.
  """
  m = compiled.memory_analysis()
  fixed = (m.argument_size_in_bytes + m.output_size_in_bytes
           - m.alias_size_in_bytes + m.generated_code_size_in_bytes)
  return {'arguments': m.argument_size_in_bytes,
          'temporaries': m.temp_size_in_bytes,
          'peak': fixed + m.temp_size_in_bytes}


def bytes_per_chip(shapes, shardings):
  """Bytes of a tree of ShapeDtypeStructs on each chip of its shardings."""
  def one(x, s):
    size = math.prod(s.shard_shape(x.shape)) if x.shape else 1
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return size * 8
    return size * x.dtype.itemsize
  return sum(jax.tree.leaves(jax.tree.map(one, shapes, shardings)))


def count_parameters(params):
  """{'total': n, '<top-level module>': n, ...}."""
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  return {'total': size(params), **{k: size(v) for k, v in params.items()}}
