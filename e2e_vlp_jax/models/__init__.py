"""Models: batch -> outputs. models/contract.py says what a model is."""
import jax
import jax.numpy as jnp
import ml_collections

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import synthetic

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def build(config, *, vocab_size, num_classes, num_attributes, num_answers=0):
  """The model of a config.

  Args:
    config: whole config; reads `model`, `dtype` and which groups of
      `optim.groups` are frozen.
    vocab_size, num_classes, num_attributes, num_answers: see
      `data.vocabularies.Vocabularies.sizes`.

  Raises:
    UserError: an unknown model, backbone, head or dtype (names the nearest).
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
  model.views  # pylint: disable=pointless-statement  # Raises for bad heads.
  return model


def frozen_groups(config):
  """((regex, whether it freezes), ...) of `config.optim.groups`."""
  return tuple((pattern, bool(dict(options).get('freeze')))
               for pattern, options in config.optim.groups)


def adapt(model, loaded, params):
  """Parameters of a checkpoint, made to fit `params` where the model can.

  Args:
    model: from `build`.
    loaded: nested dict of arrays.
    params: nested dict of what they should be (arrays or shapes).
  """
  return model.adapt(loaded, params)


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
