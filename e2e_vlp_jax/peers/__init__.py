"""What other libraries need for the same work, for `benchmark --peer`.

A peer is one file with a class `Peer(config, batch, sizes)`. It is built from
the batch that we run on and from the sizes of the vocabularies. It has:

  task         name of the task whose inference it times; None if it times a
               training step
  extra        the extra of setup.py that installs its libraries
  version      versions of its libraries, and how it runs
  parameters   number of its parameters
  step()       runs one optimisation step or one inference, and returns when it
               is finished
  details()    what else is known after some steps, as a JSON-able dict

Libraries of a peer are optional, so they are imported only when the peer is
built. It is built in a process of its own (`peers.process`): a compiler that
does not come to an end cannot be stopped in any other way.
"""
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors


def names():
  """Names of all peers."""
  return discovery.names('e2e_vlp_jax.peers', 'Peer')


def load(name):
  """Class of the peer called `name`; its libraries are not imported.

  Raises:
    UserError: no such peer.
  """
  return discovery.load('e2e_vlp_jax.peers', name, 'Peer', '--peer')


def build(name, config, batch, sizes):
  """Builds the peer called `name` in this process.

  Args:
    name: one of `names()`.
    config: whole config of our model.
    batch: dict of numpy arrays, see `data.synthetic`.
    sizes: sizes of the vocabularies, see
      `data.vocabularies.Vocabularies.sizes`.

  Raises:
    UserError: no such peer, its library is not installed, or it does not fit
      the config.
  """
  peer = load(name)
  try:
    return peer(config, batch, sizes)
  except ModuleNotFoundError as e:
    raise errors.UserError(
        f'--peer {name}: needs {e.name}, which is not installed; pip install '
        f"-e '.[{peer.extra}]'") from e
