"""A lower bound on the time of a step, from its FLOPs and bytes.

The bound is the longest of three times, as if everything overlapped: of matrix
products at the chip's peak, of main memory's traffic, and of the collectives'
traffic over all links (Williams et al., 2009, with the interconnect added).
"""


def bound(chip, flops, traffic, exchanged):
  """The bound for one chip.

  Args:
    chip: a `chips.Chip`.
    flops: FLOPs of a step on this chip.
    traffic: bytes from and to its memory (`program.memory_traffic`).
    exchanged: bytes that it sends to other chips.

  Returns:
    {'step_time_s', 'bound', 'compute_s', 'memory_s', 'interconnect_s'}, the
    last if the chip's links are known; 'step_time_s' and 'bound' are None, and
    'reason' says why, for a chip without a data sheet.
  """
  if chip.flops is None:
    return {'step_time_s': None, 'bound': None,
            'reason': f'peak rates of {chip.name} are not known'}
  times = {'compute': flops / chip.flops,
           'memory': traffic / chip.hbm_bandwidth}
  if chip.ici_bandwidth:
    times['interconnect'] = exchanged / chip.ici_bandwidth
  slowest = max(times, key=times.get)
  return {'step_time_s': times[slowest], 'bound': slowest,
          **{f'{k}_s': v for k, v in times.items()}}
