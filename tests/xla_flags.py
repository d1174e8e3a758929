"""XLA's flags for tests, which compile much and run little.

Measured on the train step of tests/small_run.py, one device, jaxlib 0.10.2: it
compiles in 6 instead of 28 CPU seconds, and a step takes half as long again.
"""
import importlib.metadata

_VERSION = [int(x) for x in
            importlib.metadata.version('jaxlib').split('.')[:2]]
_OLD = 'xla_cpu_use_fusion_emitters'  # until jaxlib 0.11
# Options of jax.jit for a test whose tolerance the older code generator's
# rounding comes close to.
EXACT = {_OLD: True} if _VERSION < [0, 11] else {}


def flags(devices):
  """[(flag, value)].

  Args:
    devices: virtual CPU devices of a process.
  """
  out = [('--xla_force_host_platform_device_count', devices),
         ('--xla_backend_optimization_level', 0),
         ('--xla_llvm_disable_expensive_passes', 'true'),
         # Codegen in parallel parts costs more than one part, and tests already
         # run in as many processes as there are cores.
         ('--xla_cpu_parallel_codegen_split_count', 1)]
  if _VERSION < [0, 11]:
    # XLA's older code generator compiles in half the time. Later versions
    # do not have it, and end a process that asks for it.
    out.append((f'--{_OLD}', 'false'))
  return out
