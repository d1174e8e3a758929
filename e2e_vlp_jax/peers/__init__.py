"""Other people's training steps, for `benchmark --peer`: one file a peer.

A peer is a class `Peer(config, batch, num_classes)`, made from the very
batch that we train on, with `step()` (a whole optimisation step, finished
when it returns), `name` and `version`. What it is written with is an extra,
imported when a peer is made and never before.
"""
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors


def names():
  """All peers."""
  return discovery.names('e2e_vlp_jax.peers', 'Peer')


def build(name, config, batch, num_classes):
  """The peer called `name`.

  Raises:
    UserError: no such peer, or what it needs is not installed.
  """
  peer = discovery.load('e2e_vlp_jax.peers', name, 'Peer', '--peer')
  try:
    return peer(config, batch, num_classes)
  except ModuleNotFoundError as e:
    raise errors.UserError(
        f'--peer {name}: needs {e.name}, which is not installed; pip install '
        "'e2e_vlp_jax[torch]'") from e
