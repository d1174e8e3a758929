"""Settings of the compiler, all in one place; the commands apply them.

- Compiled programs for GPUs and TPUs are kept on disk, in
  `JAX_COMPILATION_CACHE_DIR` or else ~/.cache/e2e_vlp_jax/xla, so that a
  machine compiles a program once and not once a run.
- With `--deterministic`, GPUs use only kernels that give the same bits in every
  run, chosen without timing them.
- On TPUs, collectives run beside matrix products (`LIBTPU_INIT_ARGS`).

What a user has set in `XLA_FLAGS` or `LIBTPU_INIT_ARGS` is left alone.
docs/pods.md has measurements.
"""
import logging
import os

import jax

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.storage import paths

_DETERMINISTIC = {'xla_gpu_deterministic_ops': 'true'}
# From maxtext's benchmarks/xla_flags_library.py.
_TPU = {
    'xla_tpu_enable_async_collective_fusion': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
    'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
    'xla_tpu_overlap_compute_collective_tc': 'true',
    'xla_enable_async_all_gather': 'true',
}


def set_flags(deterministic=False):
  """Sets the compiler's flags; call it before jax looks for devices.

  Args:
    deterministic: whether runs on GPUs must repeat to the bit.
  """
  if deterministic:
    _add('XLA_FLAGS', _DETERMINISTIC)
  _add('LIBTPU_INIT_ARGS', _TPU)


def _add(variable, flags):
  """Appends `flags` to an environment variable, unless they are in it."""
  present = os.environ.get(variable, '')
  missing = [f'--{k}={v}' for k, v in flags.items() if f'--{k}' not in present]
  os.environ[variable] = ' '.join([*present.split(), *missing])


def use_cache():
  """Keeps compiled programs for GPUs and TPUs on disk.

  Looks for devices, so processes must have joined. On a CPU, programs fit only
  the processor that compiled them; set JAX_COMPILATION_CACHE_DIR if you want
  them kept.

  Raises:
    UserError: JAX_COMPILATION_CACHE_DIR cannot be written. It may be in a
      bucket.
  """
  folder = jax.config.jax_compilation_cache_dir
  if folder and paths.in_bucket(folder):
    # jax itself reads and writes there; XLA's own cache, on GPUs, cannot.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
    return
  if folder:
    files.check_folder('JAX_COMPILATION_CACHE_DIR', folder)
    return
  if jax.default_backend() == 'cpu':
    return
  folder = os.path.join(os.environ.get('XDG_CACHE_HOME')
                        or os.path.expanduser('~/.cache'), 'e2e_vlp_jax/xla')
  try:
    files.check_folder('compilation cache', folder)
  except errors.UserError as e:
    logging.warning('%s; programs are compiled anew in every run; '
                    'JAX_COMPILATION_CACHE_DIR names another folder', e)
    return
  jax.config.update('jax_compilation_cache_dir', folder)
