"""Which of our own kernels may run on the attached devices."""
import functools
import logging
import os

import jax

_CAPABILITY = 8.  # Compute capability that XLA's Triton needs: Ampere.


def wanted(name):
  """Whether the kernels of an operation may run at all.

  E2E_VLP_MATCHING=xla and E2E_VLP_ATTENTION=xla turn them off, for devices or
  drivers on which a kernel fails.

  Args:
    name: 'matching' or 'attention'.
  """
  return os.environ.get(f'E2E_VLP_{name.upper()}') != 'xla'


def triton_runs():
  """Whether the GPUs run Triton; True where none are attached."""
  if jax.default_backend() != 'gpu':
    return True
  capability = getattr(jax.local_devices()[0], 'compute_capability', '8.0')
  if float(capability) >= _CAPABILITY:
    return True
  _warn(capability)
  return False


@functools.cache
def _warn(capability):
  logging.warning('a GPU of compute capability %s runs no Triton kernels; '
                  'expected %s or more; plain XLA is used for the assignment '
                  'and for attention, which is slower', capability, _CAPABILITY)
