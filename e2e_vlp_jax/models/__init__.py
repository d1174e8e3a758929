"""Models: batch -> outputs. `build` finds one by its config's name.

A model is one file of this package with a class `Model`; see e2e_vlp.py for
the methods that the rest of the library relies on.
"""
import importlib

import jax.numpy as jnp
import ml_collections

from e2e_vlp_jax import errors

BACKBONES = {'resnet': ('resnet', 'ResNet'),
             'patch_cnn': ('patch_cnn', 'PatchCNN')}


def build(config, *, vocab_size, num_classes, num_attributes):
  """The model of a config.

  Args:
    config: whole config; reads `model` and `dtype`.
    vocab_size, num_classes, num_attributes: of the tokenizer and label space.

  Raises:
    UserError: an unknown model, backbone or option (names the nearest).
  """
  model = config.model
  try:
    module = importlib.import_module(f'e2e_vlp_jax.models.{model.name}')
    cls = module.Model
  except (ModuleNotFoundError, AttributeError) as e:
    raise errors.UserError(
        f'model.name: no model {model.name!r}'
        + errors.nearest(model.name, ['e2e_vlp'])) from e
  dtype = jnp.dtype(config.dtype)
  backbone = dict(model.backbone)
  name = backbone.pop('name')
  if name not in BACKBONES:
    raise errors.UserError(f'model.backbone.name: no backbone {name!r}'
                           + errors.nearest(name, BACKBONES))
  file, class_name = BACKBONES[name]
  trunk = getattr(importlib.import_module(f'e2e_vlp_jax.models.{file}'),
                  class_name)
  return cls(ml_collections.FrozenConfigDict(model), trunk(dtype=dtype, **backbone),
             vocab_size if model.text else 0, num_classes, num_attributes,
             dtype)
