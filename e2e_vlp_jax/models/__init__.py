"""Models: batch -> outputs. `build` finds one by its config's name.

A model is one file of this package with a class `Model`; see e2e_vlp.py for
the methods that the rest of the library relies on.
"""
import importlib

import jax
import jax.numpy as jnp
import ml_collections

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import synthetic

MODELS = ('e2e_vlp', 'soho', 'fiber')
BACKBONES = {'resnet': ('resnet', 'ResNet'),
             'patch_cnn': ('patch_cnn', 'PatchCNN')}


def build(config, *, vocab_size, num_classes, num_attributes):
  """The model of a config.

  Args:
    config: whole config; reads `model` and `dtype`.
    vocab_size, num_classes, num_attributes: of the tokenizer and label space.

  Raises:
    UserError: an unknown model or backbone (names the nearest).
  """
  model = config.model
  try:
    cls = importlib.import_module(f'e2e_vlp_jax.models.{model.name}').Model
  except (ModuleNotFoundError, AttributeError) as e:
    raise errors.UserError(f'model.name: no model {model.name!r}'
                           + errors.nearest(model.name, MODELS)) from e
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


def check_parameters(model, config, params, path):
  """UserError unless `params` (of a checkpoint at `path`) fit the model.

  Heads that were never trained may be absent altogether.
  """
  data = config.data
  batch = synthetic.synthetic_batch(
      data, vocab_size=max(model.vocab_size, 5),
      num_classes=model.num_classes, num_attributes=model.num_attributes,
      batch_size=1)
  shapes = jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, model.views), batch)['params']
  flat = lambda tree: {
      tuple(str(k.key) for k in path): tuple(x.shape)
      for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
  want, found = flat(shapes), flat(params)
  for name, shape in found.items():
    if want.get(name) != shape:
      expected = ('no such parameter' if name not in want
                  else f'shape {want[name]}')
      raise errors.UserError(
          f'checkpoint {path}: of another model or size: {"/".join(name)} '
          f'has shape {shape}, --config expects {expected}')
  modules = {name[0] for name in found}
  lacking = [n for n in want if n not in found and n[0] in modules]
  if lacking:
    raise errors.UserError(
        f'checkpoint {path}: of another model or size: '
        f'{"/".join(lacking[0])} is missing ({len(lacking)} parameters)')
