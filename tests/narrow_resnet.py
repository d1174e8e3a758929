"""E2E-VLP on a ResNet with 8 instead of 64 channels, for tests.

A config file like those of configs/: its trunk has a sixtieth of the
parameters, with the same names.
"""
from configs import e2e_vlp


def get_config(arg=None):
  """Args: arg: as for configs/e2e_vlp.py, of a size that has a ResNet."""
  config = e2e_vlp.get_config(arg)
  config.model.backbone.update(dict(stem=8, width=8))
  return config
