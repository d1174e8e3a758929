"""Checks whether the variables of a checkpoint fit a model."""
import jax

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import pp
from e2e_vlp_jax.data import synthetic


def check(model, config, sizes, found, path, changes, trained=None):
  """UserError unless the variables of a checkpoint fit the model.

  Heads that were never trained may be missing, and so may state that only
  another setting needs.

  Args:
    model: from `models.build`.
    config: whole config.
    sizes: sizes of the vocabularies, see
      `data.vocabularies.Vocabularies.sizes`.
    found: {'params': ..., other collections}, nested dicts of arrays.
    path: path of the checkpoint, for the error message.
    changes: {key of config.model: (value in the checkpoint's config, value
      here)}, for the message.
    trained: {view: heads} that were trained, None = all. Others may share a
      module with them (the decoder), and be missing.
  """
  data = config.data.copy_and_resolve_references()
  if 'text' not in dict(pp.bind(data.pp_train)):
    data.pp_train += '|text'  # Views that the run did not train read texts.
  batch = synthetic.synthetic_batch(data, batch_size=1, **sizes)
  # Nor need its rows show two images, which other views read.
  batch = {f'second_{k}': batch[k] for k in ('image', 'image_mask')} | batch
  shapes = lambda requests: _shapes(jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, requests), batch))
  want, found = shapes(model.views), _shapes(found)
  modules = {name[:2] for name in found}
  wrong = [f'has {found[n]}, --config expects '
           + (f'{want[n]}' if n in want else 'none') + f' for {"/".join(n)}'
           for n in found if found[n] != want.get(n)
           and (n in want or n[0] == 'params')]
  missing = [n for n in want if n not in found and n[0] == 'params'
             and n[:2] in modules]
  if missing and trained is not None:
    needed = shapes(trained)
    missing = [n for n in missing if n in needed]
  wrong += [f'lacks {"/".join(n)}' for n in missing]
  if not wrong:
    return
  more = f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''
  keys = [f'model.{k} is {a!r} there, {b!r} here'
          for k, (a, b) in changes.items()]
  if keys:
    more += '; its config has other values: ' + ', '.join(keys[:4])
  if len(keys) > 4:
    more += f' and {len(keys) - 4} more'
  raise errors.UserError(f'checkpoint {path}: of another model or size: it '
                         f'{wrong[0]}{more}')


def _shapes(tree):
  """{path as a tuple of names: shape}."""
  return {tuple(str(k.key) for k in path): tuple(x.shape)
          for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
