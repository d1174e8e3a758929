"""Data sheets of accelerators, and the TPU slices on offer.

TPU figures are Google Cloud's ("TPU v4", "v5e", "v5p", "v6e",
docs.cloud.google.com/tpu/docs): peak bf16 FLOP/s, HBM bandwidth, slices, and
the interconnect of a chip in one direction, all links together (half of the
bidirectional figure of those pages; v4: 6 links of 50 GB/s, Jouppi et al.
2023). TPU memory is what libtpu 0.0.42 lets a program use, a little less than
the pages' 32, 16, 95 and 32 GB. GPU figures are from NVIDIA's data
sheets for the SXM part: dense bf16 without sparsity, NVLink in one direction.
"""
import os
from typing import NamedTuple

import jax

from e2e_vlp_jax import errors

GIB = 2**30


class Chip(NamedTuple):
  """One accelerator; None where a figure is unknown or does not exist.

  Attributes:
    name: name for output.
    kind: start of jax's `device_kind`.
    hbm: bytes of memory that a program may use.
    flops: peak dense bfloat16 FLOP/s.
    hbm_bandwidth, ici_bandwidth: bytes/s.
  """
  name: str
  kind: str
  hbm: float
  flops: float = None
  hbm_bandwidth: float = None
  ici_bandwidth: float = None


TPUS = {
    'v4': Chip('TPU v4', 'TPU v4', 30.75 * GIB, 275e12, 1200e9, 300e9),
    'v5e': Chip('TPU v5e', 'TPU v5 lite', 15.75 * GIB, 197e12, 819e9,
                200e9),
    'v5p': Chip('TPU v5p', 'TPU v5', 95.74 * GIB, 459e12, 2765e9, 600e9),
    'v6e': Chip('TPU v6e', 'TPU v6 lite', 31.25 * GIB, 918e12, 1638e9,
                400e9),
}
GPUS = (
    Chip('H200', 'NVIDIA H200', 141e9, 989e12, 4800e9, 450e9),
    Chip('H100', 'NVIDIA H100', 80e9, 989e12, 3350e9, 450e9),
    Chip('A100 80GB', 'NVIDIA A100-SXM4-80GB', 80e9, 312e12, 2039e9, 300e9),
    Chip('A100 40GB', 'NVIDIA A100-SXM4-40GB', 40e9, 312e12, 1555e9, 300e9),
    Chip('L4', 'NVIDIA L4', 24e9, 121e12, 300e9),
)
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8',
          '8x8x8', '8x8x16', '8x16x16', '16x16x16')
SLICES = {'v4': _CUBES, 'v5e': _FLAT, 'v5p': _CUBES, 'v6e': _FLAT}
LOCAL = 'local'


def of_device(device):
  """The `Chip` of an attached jax device; memory from the device itself."""
  known = [c for c in (*GPUS, *sorted(TPUS.values(), key=lambda c: c.kind,
                                      reverse=True))
           if device.device_kind.startswith(c.kind)]
  chip = known[0] if known else Chip(device.device_kind, '', None)
  limit = (device.memory_stats() or {}).get('bytes_limit')
  return chip._replace(hbm=limit) if limit else chip


def slices():
  """Every TPU topology that `devices` accepts, such as 'v5e:2x2'."""
  return [f'{chip}:{shape}' for chip, shapes in SLICES.items()
          for shape in shapes]


def devices(topology):
  """(Chip, devices) of 'v5e:4x4' or 'local'; TPUs need not be attached.

  Raises:
    UserError: an unknown topology, or libtpu is not installed.
  """
  if topology == LOCAL:
    found = jax.devices()
    chip = of_device(found[0])
    if found[0].platform == 'cpu':  # They share the machine's memory.
      memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
      chip = chip._replace(hbm=memory // len(found))
    return chip, found
  if topology not in slices():
    raise errors.UserError(
        f'--topology: no {topology!r}'
        + errors.nearest(topology, [*slices(), LOCAL]) + '; there are '
        + '; '.join(f'{c}: {" ".join(s)}' for c, s in SLICES.items())
        + f'; and {LOCAL!r}: the devices of this machine')
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  chip, shape = topology.split(':')
  options = {}
  if chip == 'v4':  # One device per chip, as on real machines; not two cores.
    options['chip_config_name'] = 'megacore'
  if shape == '1x1':  # By default libtpu expects hosts of 2x2 chips.
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(topology, 'tpu', **options).devices
  except RuntimeError as e:
    if 'not installed' not in str(e):
      raise
    raise errors.UserError(
        '--topology: compiling for a TPU that is not attached needs libtpu '
        "(700 MB): pip install -e '.[preflight]'") from e
  return TPUS[chip], found
