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
  from e2e_vlp_jax import temporary
  model = temporary.old_model(config)
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


def check_variables(model, config, found, path, changes):
  """UserError unless the variables of a checkpoint fit the model.

  Heads that were never trained may be absent altogether, and so may state
  that another setting alone needs.

  Args:
    model: from `build`.
    config: whole config.
    found: {'params': ..., other collections}, nested dicts of arrays.
    path: of the checkpoint, for the message.
    changes: {key of config.model: (value in the checkpoint's config, value
      here)}, for the message.
  """
  data = config.data
  batch = synthetic.synthetic_batch(
      data, vocab_size=max(model.vocab_size, 5),
      num_classes=model.num_classes, num_attributes=model.num_attributes,
      batch_size=1)
  shapes = jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, model.views), batch)
  flat = lambda tree: {
      tuple(str(k.key) for k in path): tuple(x.shape)
      for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
  want, found = flat(shapes), flat(found)
  modules = {name[:2] for name in found}
  wrong = [f'has {found[n]}, --config expects '
           + (f'{want[n]}' if n in want else 'none') + f' for {"/".join(n)}'
           for n in found if found[n] != want.get(n)
           and (n in want or n[0] == 'params')]
  wrong += [f'lacks {"/".join(n)}' for n in want if n not in found
            and n[0] == 'params' and n[:2] in modules]
  if wrong:
    more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
    keys = [f'model.{k} is {a!r} there, {b!r} here'
            for k, (a, b) in changes.items()]
    raise errors.UserError(
        f'checkpoint {path}: of another model or size: it {wrong[0]}{more}'
        + ('; its config has other values: ' + ', '.join(keys[:4])
           + (f' and {len(keys) - 4} more' if len(keys) > 4 else '')
           if keys else ''))
