"""What peers in torch share: device, threads, precision, seed."""
import os

import numpy as np


class Torch:
  """torch, set up for a comparison with our model.

  Attributes:
    gpu: whether it runs on a GPU.
    device: the torch.device.
  """

  def __init__(self, config):
    """Sets torch's threads and seed.

    Args:
      config: whole config; reads seed and dtype.
    """
    import torch  # pylint: disable=g-import-not-at-top
    self._torch = torch
    self._bfloat16 = config.dtype == 'bfloat16'
    self.gpu = torch.cuda.is_available()
    self.device = torch.device('cuda' if self.gpu else 'cpu')
    # As many threads as XLA uses.
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(config.seed)

  def autocast(self):
    """Context that computes in bfloat16 where our model does."""
    return self._torch.autocast(self.device.type, self._torch.bfloat16,
                                enabled=self._bfloat16)

  def put(self, array):
    """A numpy array as a tensor on the device."""
    return self._torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

  def wait(self):
    """Waits until the device has finished."""
    if self.gpu:
      self._torch.cuda.synchronize()
