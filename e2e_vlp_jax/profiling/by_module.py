"""Attributes a step's time to parts of the model, from a profiler's trace.

Every operation of a compiled program carries the names of its scopes in the
code (flax makes one for each module), and the profiler reports how long it ran.
The measured program is thus the one that trains, on CPU, GPU and TPU. An
operation that XLA fused from several parts counts for the part that the fusion
is named after, so shares are accurate to a few percent.
"""
import collections
import glob
import os
import re

import jax

OTHER = 'other'
# Scopes of costly ops, which count apart from the module that calls them.
_OPS = {'matching': 'matching', 'hungarian': 'matching',
        'deformable': 'deformable'}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$')
_INSTRUCTION = re.compile(
    r'^\s+(?:ROOT )?%?([\w.\-]+) = .*?\s[\w\-]+\((.*)$')
_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r'\b(?:calls|to_apply)=%?([\w.\-]+)')
_OPERAND = re.compile(r'%([\w.\-]+)')


def part_of(op_name, modules):
  """The part that a scope path belongs to, or None.

  Args:
    op_name: such as 'jit(step)/transpose(jvp(Model))/.../decoder/layer0/add'.
    modules: names of the model's own submodules.
  """
  words = [w.split('.')[0] for w in re.split(r'[/()]', op_name)]
  for word in words:
    if word in _OPS:
      return _OPS[word]
  for word in words:
    if word in modules:
      return word
  for word in ('losses', 'optimizer'):
    if word in words:
      return word
  return None


def of_operations(hlo, modules):
  """{operation: part or OTHER} of `compiled.as_text()`.

  A fusion that is named after no part (a GPU's are often named after a
  conversion or a copy) counts for the part of most operations inside it.
  Operations that the compiler added (mostly copies) have no name. They count
  for the part that they call or else read.
  """
  parts, nameless = {}, []
  inside = collections.defaultdict(collections.Counter)  # computation: parts
  computation = None
  for line in hlo.splitlines():
    opens = None if line.startswith(' ') else _COMPUTATION.match(line)
    if opens:
      computation = opens[1]
    match = _INSTRUCTION.match(line)
    if not match:
      continue
    name, rest = match.groups()
    scopes = _NAME.search(rest)
    part = scopes and part_of(scopes[1], modules)
    if not part:  # A computation stands before the operation that calls it.
      within = sum((inside[c] for c in _CALLED.findall(rest)),
                   collections.Counter())
      part = within.most_common(1)[0][0] if within else None
    if part:
      parts[name] = part
      inside[computation][part] += 1
      continue
    parts[name] = OTHER
    if not scopes:
      nameless.append((name, _OPERAND.findall(rest)))
  for name, operands in nameless:
    known = [parts[x] for x in operands if parts.get(x, OTHER) != OTHER]
    if known:
      parts[name] = known[0]
  return parts


def trace(run, folder):
  """Calls `run` under the profiler, which writes to `folder`."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with jax.profiler.trace(folder, profiler_options=options):
    run()


def measured(folder, parts):
  """What a trace in `folder` says of the parts.

  A GPU runs many operations as one graph (XLA's command buffers), of which the
  trace tells only the kernels. A kernel that XLA made bears its operation's
  name. One of a library counts for the part of the kernel before it.

  Args:
    folder: folder of `trace`.
    parts: from `of_operations`, for the one program that ran.

  Returns:
    {part: seconds}, summed over cores or devices, and the number of operations
    that ran; on a GPU these are kernels and copies.
  """
  path, = glob.glob(os.path.join(folder, '**', '*.xplane.pb'), recursive=True)
  kernels = {k.replace('.', '_'): part for k, part in parts.items()}
  lines = {True: [], False: []}
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    for line in plane.lines:
      lines[plane.name.startswith('/device:')].append([
          (e.start_ns, e.duration_ns,
           parts.get(operation) or kernels.get(e.name))
          for e in line.events if (operation := _operation(e, parts))])
  # With an accelerator the host's events only say when work was submitted.
  chosen = lines[True] if any(lines[True]) else lines[False]
  out = collections.Counter()
  for events in chosen:
    before = OTHER
    for part, nanoseconds in _own_times(events):
      before = part or before
      out[before] += nanoseconds / 1e9
  return out, sum(map(len, chosen))


def _operation(event, parts):
  """Name of the HLO operation that an event is about, or None."""
  for key, value in event.stats:
    if key == 'hlo_op':
      return value
  # On a TPU the event's name is the operation, or its whole text.
  name = event.name.split(' = ')[0].lstrip('%')
  return name if name in parts else None


def _own_times(events):
  """[(part, ns)] by start, each without the time of events that start later.

  Events are nested, or on a GPU at the same time; every moment counts once.
  """
  out, open_until = [], []
  for start, duration, part in sorted(events, key=lambda e: (e[0], -e[1])):
    while open_until and open_until[-1][0] <= start:
      open_until.pop()
    end = start + duration
    if open_until:
      out[open_until[-1][1]][1] -= min(end, open_until[-1][0]) - start
    open_until.append((end, len(out)))
    out.append([part, duration])
  return out
