"""Models: batch -> outputs. models/contract.py defines what a model is."""
import jax.numpy as jnp
import ml_collections

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def build(config, *, vocab_size, num_classes, num_attributes, num_answers=0):
  """Builds the model of a config.

  Args:
    config: whole config; reads `model`, `dtype` and which groups of
      `optim.groups` are frozen.
    vocab_size, num_classes, num_attributes, num_answers: see
      `data.vocabularies.Vocabularies.sizes`.

  Raises:
    UserError: an unknown model, backbone, head or dtype (suggests the nearest).
  """
  cls = discovery.load(__name__, config.model.name, 'Model', 'model.name')
  if config.dtype not in DTYPES:
    raise errors.UserError(f'dtype: {config.dtype!r}'
                           + errors.nearest(config.dtype, DTYPES))
  if 'backbone' in config.model:
    discovery.load(__name__, config.model.backbone.name, 'BACKBONE',
                   'model.backbone.name')
  model = cls(
      config=ml_collections.FrozenConfigDict(config.model),
      vocab_size=vocab_size, num_classes=num_classes,
      num_attributes=num_attributes, num_answers=num_answers,
      dtype=jnp.dtype(config.dtype), frozen=frozen_groups(config))
  _ = model.views  # Raises for bad heads.
  return model


def frozen_groups(config):
  """((regex, whether the group is frozen), ...) of `config.optim.groups`."""
  return tuple((pattern, bool(dict(options).get('freeze')))
               for pattern, options in config.optim.groups)


def adapt(model, loaded, params):
  """Adapts a checkpoint's parameters to `params` where the model can.

  Args:
    model: from `build`.
    loaded: nested dict of arrays.
    params: nested dict of the wanted parameters (arrays or shapes).
  """
  return model.adapt(loaded, params)
