"""Compiles a config's train step for a TPU slice that need not be attached.

  python -m e2e_vlp_jax.preflight --config configs/e2e_vlp.py:r50 \\
      --topology v5e:4x4

It compiles the real program with the real compiler. The report has the memory
on each chip, the FLOPs, the bytes that chips send each other, a lower bound on
the time of a step, and the largest batch that fits. docs/pods.md explains the
figures. `--topology local` plans for the devices of this machine. `--quick`
skips the slowest part of the compilation.
"""
import json
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program as program_lib
from e2e_vlp_jax.profiling import roofline
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import sharding

# The search ends when the largest batch is known to within 1/RESOLUTION.
RESOLUTION = 16
_MOST_TRIALS = 4  # programs that the search compiles; two usually suffice
_MOST_TIMES = 64  # how much larger a batch is than one that fits


def preflight(config, topology, search=True, say=print):
  """Returns what a train step of `config` costs on `topology`.

  Args:
    config: config of a training run; its last stage is compiled, with a batch
      of the largest bucket.
    topology: see `chips.devices`.
    search: also find the largest batch that fits; each trial compiles.
    say: called with lines about the progress.

  Returns:
    JSON-able dict, the content of `--json` (docs/pods.md).

  Raises:
    UserError: the topology, the mesh, the batch or the memory does not fit.
  """
  chip, devices = chips.devices(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
  sizes = vocabularies.Vocabularies.load(config.data).sizes
  bucket = synthetic.largest_bucket(config.data)
  assembly = assemble.Assembly(
      config, models.build(config, **sizes), mesh,
      synthetic.synthetic_batch(config.data, batch_size=1, bucket=bucket,
                                **sizes))
  state = program_lib.bytes_per_chip(assembly.shapes, assembly.shardings)
  counts = program_lib.count_parameters(assembly.shapes.params)
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  say(f'{counts["total"]:,} parameters; compiling for {mesh.size} x '
      f'{chip.name}: minutes for a large model')
  _check_state(assembly.shapes, state, chip, topology, mesh)

  program = _compile(assembly, config.batch_size)
  largest = None
  if chip.hbm and search:
    unit = shards * config.accumulate
    largest = config.accumulate * _largest(
        lambda n: _compile(assembly, n * unit).peak, config.batch_size // unit,
        program.peak, state, chip.hbm, say)
  if chip.hbm and program.peak > chip.hbm:
    raise errors.UserError(_too_large(config, program, chip, shards, largest))
  bound = _roofline(program, chip, mesh, config)
  return {
      'config': config.model.name, 'topology': topology, 'chip': chip.name,
      'chips': mesh.size, 'mesh': dict(mesh.shape),
      'batch_size': config.batch_size,
      'batch_per_chip': config.batch_size // shards,
      'bucket': list(config.data.buckets[bucket]), 'dtype': config.dtype,
      'parameters': counts['total'], 'parameters_by_part': counts,
      'state_bytes_per_chip': state,
      'hbm_bytes_per_chip': {**program.memory, 'capacity': chip.hbm},
      'flops_per_step': program.flops,
      'collective_bytes': _by_kind(program.collectives),
      'collectives_in_unknown_loops': sum(
          c.in_loop for c in program.collectives),
      'roofline': bound,
      'days': (None if bound['step_time_s'] is None else
               bound['step_time_s'] * config.total_steps / 86400),
      'total_steps': config.total_steps,
      'largest_batch_per_chip': largest, 'compile_s': program.seconds,
      'quick': jax.config.jax_optimization_level == 'O0'}


class _Program(NamedTuple):
  """A compiled step. One too large for the chip has only the first fields."""
  peak: float
  seconds: float
  flops: float
  memory: Any = None
  collectives: Any = ()
  traffic: float = 0.


def _compile(assembly, batch_size):
  start = time.perf_counter()
  traced = assembly.trace(batch_size)
  flops = program_lib.flops(traced.jaxpr)
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return _Program(_needed(str(e)), time.perf_counter() - start, flops)
  seconds = time.perf_counter() - start
  memory = program_lib.memory(compiled)
  hlo = compiled.as_text()
  return _Program(memory['peak'], seconds, flops, memory,
                  program_lib.collectives(hlo), program_lib.memory_traffic(hlo))


def _needed(message):
  """Bytes that a program needs, from the compiler's error message."""
  found = re.search(r'(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)', message)
  return (float(found[1]) * 2**(10 * ' KMGT'.index(found[2])) if found
          else float('inf'))


def _largest(peak_of, first, first_peak, state, capacity, say):
  """The largest n whose program fits, to within 1/RESOLUTION of it.

  Memory grows almost linearly with the batch. A line through two compiled
  programs therefore tells the largest batch, and one more program confirms it.
  The second program is where the line from the state alone reaches the
  capacity, which is too early: every program needs some memory whatever its
  batch. If the third does not fit, one or two more lie between.

  Args:
    peak_of: function n -> bytes of its program; compiles.
    first, first_peak: an n that is already compiled, and its bytes.
    state: bytes at n = 0.
    capacity: bytes of a chip.
    say: called with a line before and after each program.
  """
  known = {0: state, first: first_peak}
  # Near the capacity the compiler saves memory by recomputation, which takes it
  # long and makes the step slower.
  goal = capacity * (1 - .5 / RESOLUTION)
  for trial in range(1, _MOST_TRIALS + 1):
    fits = max(n for n, peak in known.items() if peak <= capacity)
    fails = min((n for n in known if n > fits), default=None)
    gap = max(1, fits // RESOLUTION)
    guess = _where(goal, known)
    if fails is None:
      if trial > 1 and guess - fits <= gap:
        break
      guess = min(max(guess, fits + 1), _MOST_TIMES * max(fits, 1))
    elif fails - fits <= gap:
      break
    elif not fits + gap <= guess < fails:
      guess = (fits + fails) // 2
    say(f'search, program {trial} of at most {_MOST_TRIALS}: compiling a batch '
        f'of {guess} a chip and micro-step')
    known[guess] = peak_of(guess)
    say(f'batch of {guess} a chip and micro-step: '
        f'{_size(known[guess])} of {_size(capacity)}')
  return max(n for n, peak in known.items() if peak <= capacity)


def _where(goal, known):
  """The n at which a line through two known (n: bytes) reaches `goal` bytes."""
  finite = sorted(n for n in known if known[n] < float('inf'))
  a, b = finite[-2:] if len(finite) > 1 else (0, max(known))
  slope = max((known[b] - known[a]) / (b - a), 1.)
  return int(min(a + (goal - known[a]) / slope, 2**31))


def _roofline(program, chip, mesh, config):
  """A lower bound on the time of a step; see profiling/roofline.py."""
  # Rows are split over data and fsdp; 'tensor' shares work only by rules.
  shards = mesh.size if config.sharding_rules else (
      mesh.shape['data'] * mesh.shape['fsdp'])
  return roofline.bound(chip, program.flops / shards, program.traffic,
                        sum(c.traffic for c in program.collectives))


def _by_kind(collectives):
  out = {}
  for c in collectives:
    out[c.kind] = out.get(c.kind, 0) + c.bytes * c.times
  return out


# --- What does not fit ------------------------------------------------------
def _check_state(shapes, state, chip, topology, mesh):
  """UserError if the state alone is more than a chip has."""
  if not chip.hbm or state <= chip.hbm:
    return

  def split(parts):
    def one(x):
      cut = parts if any(sharding.fsdp_spec(x, parts)) else 1
      return x.size * x.dtype.itemsize / cut
    return sum(one(x) for x in jax.tree.leaves(shapes)
               if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
  fits = [n for n in range(1, mesh.size + 1)
          if mesh.size % n == 0 and split(n) < chip.hbm]
  advice = f'--config.mesh.fsdp={fits[0]} would fit' if fits else ''
  if not fits and topology != chips.LOCAL:
    name = topology.split(':')[0]
    size = lambda s: math.prod(int(n) for n in s.split('x'))
    larger = [s for s in chips.SLICES[name] if size(s) > mesh.size
              and split(size(s)) < chip.hbm]
    advice = (f'{name}:{larger[0]} with --config.mesh.fsdp={size(larger[0])} '
              'would fit' if larger else
              f'no slice of {name} is large enough')
  raise errors.UserError(
      f'--topology {topology}: parameters and optimizer state take '
      f'{_size(state)} of a chip that has {_size(chip.hbm)}: '
      f'{_size(state - chip.hbm)} too much; '
      + (advice or 'take more devices'))


def _too_large(config, program, chip, shards, largest):
  need = (f'batch_size: {config.batch_size} ({config.batch_size // shards} a '
          f'chip) needs {_size(program.peak)} of the {_size(chip.hbm)} of a '
          f'{chip.name}: {_size(program.peak - chip.hbm)} too much')
  if largest:
    need += (f'; {largest} a chip fit: --config.batch_size={largest * shards} '
             'or more chips')
    parts = _parts(config.batch_size // shards, largest // config.accumulate)
    if parts:
      return (f'{need}; or --config.accumulate={parts}, which keeps the batch; '
              'or --config.model.remat=full, --config.mesh.fsdp')
  return need + ('; or more micro-steps (--config.accumulate), '
                 '--config.model.remat=full, --config.mesh.fsdp')


def _parts(rows, fit):
  """Least number of equal parts of at most `fit` rows, or None."""
  return next((n for n in range(1, rows + 1)
               if not rows % n and 0 < rows // n <= fit), None)


# --- For people -------------------------------------------------------------
def _size(n):
  return 'unknown' if n is None else f'{n / chips.GIB:.2f} GiB'


def table(report):
  """The report as aligned lines."""
  r, hbm, roof = report, report['hbm_bytes_per_chip'], report['roofline']
  mesh = ' x '.join(f'{k} {v}' for k, v in r['mesh'].items())
  rows = [
      ('model', f'{r["config"]}, {r["parameters"]:,} parameters, '
                f'{r["dtype"]}'),
      ('chips', f'{r["chips"]} x {r["chip"]} ({r["topology"]}), {mesh}'),
      ('batch', f'{r["batch_size"]} ({r["batch_per_chip"]} a chip) of '
                f'{r["bucket"][0]}x{r["bucket"][1]}'),
      ('memory a chip', f'arguments {_size(hbm["arguments"])}, temporaries '
                        f'{_size(hbm["temporaries"])}, peak '
                        f'{_size(hbm["peak"])} of {_size(hbm["capacity"])}'),
      ('FLOPs a step', f'{r["flops_per_step"]:.3e} '
                       f'({r["flops_per_step"] / r["chips"]:.3e} a chip)'),
      ('collectives', ', '.join(
          f'{k} {v / 2**20:.1f} MiB'
          for k, v in r['collective_bytes'].items()) or 'none')]
  if roof['step_time_s'] is None:
    rows.append(('step time', f'unknown: {roof["reason"]}'))
  else:
    parts = ', '.join(f'{k[:-2]} {v * 1e3:.1f}' for k, v in roof.items()
                      if k.endswith('_s') and k != 'step_time_s')
    rows += [
        ('step time', f'at least {roof["step_time_s"] * 1e3:.1f} ms, bound '
                      f'by {roof["bound"]} ({parts} ms)'),
        ('run', f'{r["total_steps"]:,} steps: at least {r["days"]:.2f} days'
                f' ({r["days"] * 24:.1f} hours)')]
  if r['largest_batch_per_chip'] is not None:
    rows.append(('largest batch', f'{r["largest_batch_per_chip"]} a chip'))
  rows.append(('compiled in', f'{r["compile_s"]:.0f} s'))
  return '\n'.join(f'{name:14} {text}' for name, text in rows)


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required')
    parser.add_argument('--topology', required=True, metavar='v5e:4x4',
                        help=f'a TPU slice, or {chips.LOCAL!r}')
    parser.add_argument('--no-search', action='store_true',
                        help='do not search for the largest batch')
    parser.add_argument('--quick', action='store_true',
                        help='compile with the least optimisation, in a '
                        'quarter of the time; memory is within a tenth')
    parser.add_argument('--json', metavar='OUT', help='write the figures')
    args, config = cli.parse(parser, argv)
    if args.topology != chips.LOCAL:
      # The compiler needs no TPU and must not look for one. Several processes
      # may compile at the same time.
      os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
      os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
      # Without these two, libtpu warns; --topology already tells it.
      os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
      os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-16')
      jax.config.update('jax_platforms', 'cpu')
    if args.quick:
      jax.config.update('jax_optimization_level', 'O0')
    if args.json:  # Fail before minutes of compilation, not after.
      files.check_writable('--json', args.json)
    report = preflight(config, args.topology, not args.no_search)
    print(table(report))
    if args.json:
      with open(args.json, 'w') as f:
        json.dump(report, f, indent=1)


if __name__ == '__main__':
  main()
