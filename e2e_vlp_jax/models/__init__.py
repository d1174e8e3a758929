"""Models: batch -> outputs. `build` finds one by its config's name.

A model is one file of this package with a class `Model`; see e2e_vlp.py for
the methods that the rest of the library relies on.
"""
import importlib

import jax.numpy as jnp
import ml_collections

from e2e_vlp_jax import errors

MODELS = ('e2e_vlp', 'soho', 'fiber')
DTYPES = ('float32', 'bfloat16', 'float16', 'float64')
BACKBONES = {'resnet': ('resnet', 'ResNet'),
             'patch_cnn': ('patch_cnn', 'PatchCNN')}


def build(config, *, vocab_size, num_classes, num_attributes, num_answers=0):
  """The model of a config.

  Args:
    config: whole config; reads `model` and `dtype`.
    vocab_size, num_classes, num_attributes, num_answers: see
      `data.vocabularies.Vocabularies.sizes`.

  Raises:
    UserError: an unknown model or backbone (names the nearest).
  """
  del num_answers  # No model has a head for answers yet.
  model = config.model
  try:
    cls = importlib.import_module(f'e2e_vlp_jax.models.{model.name}').Model
  except (ModuleNotFoundError, AttributeError) as e:
    raise errors.UserError(f'model.name: no model {model.name!r}'
                           + errors.nearest(model.name, MODELS)) from e
  if config.dtype not in DTYPES:
    raise errors.UserError(f'dtype: {config.dtype!r}'
                           + errors.nearest(config.dtype, DTYPES))
  if 'backbone' in model:
    _backbone_class(model.backbone.name)
  return cls(ml_collections.FrozenConfigDict(model),
             vocab_size if model.get('text', True) else 0, num_classes,
             num_attributes, jnp.dtype(config.dtype))


def adapt(model, loaded, params):
  """Parameters of a checkpoint, made to fit `params` where the model can.

  A model whose parameters depend on the input's size says how in a method
  `adapt(loaded, params)`.

  Args:
    model: from `build`.
    loaded: nested dict of arrays.
    params: nested dict of what they should be (arrays or shapes).
  """
  return model.adapt(loaded, params) if hasattr(model, 'adapt') else loaded


def build_backbone(options, dtype):
  """The CNN of `config.model.backbone`, to be called in a model's `setup`."""
  options = dict(options)
  return _backbone_class(options.pop('name'))(dtype=dtype, **options)


def _backbone_class(name):
  if name not in BACKBONES:
    raise errors.UserError(f'model.backbone.name: no backbone {name!r}'
                           + errors.nearest(name, BACKBONES))
  file, class_name = BACKBONES[name]
  return getattr(importlib.import_module(f'e2e_vlp_jax.models.{file}'),
                 class_name)
