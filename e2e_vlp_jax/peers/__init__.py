"""Training steps of other libraries, for `benchmark --peer`; one file each.

A peer is a class `Peer(config, batch, num_classes)` with `step()`, `name`,
`version` and `parameters`. It is built from the same batch that we train on.
`step()` runs one whole optimisation step and returns when it is finished. The
library behind a peer is an optional extra, so it is imported only when the
peer is built.
"""
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors


def names():
  """Names of all peers."""
  return discovery.names('e2e_vlp_jax.peers', 'Peer')


def build(name, config, batch, num_classes):
  """Builds the peer called `name`.

  Raises:
    UserError: no such peer, or its library is not installed.
  """
  peer = discovery.load('e2e_vlp_jax.peers', name, 'Peer', '--peer')
  try:
    return peer(config, batch, num_classes)
  except ModuleNotFoundError as e:
    raise errors.UserError(
        f'--peer {name}: needs {e.name}, which is not installed; pip install '
        "-e '.[torch]'") from e
