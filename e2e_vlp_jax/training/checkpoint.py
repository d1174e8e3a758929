"""The contents of a checkpoint: writing, reading and merging parameters.

A checkpoint is WORKDIR/checkpoints/<step>/, written by Orbax. Its items are
params, model_state, opt_state (with the run's random key), ema_params and meta
(JSON: config, tokenizer, label space). They are stored separately, so that
evaluation reads only what it needs. Prediction needs nothing but a checkpoint.

training/checkpointer.py saves and restores the checkpoints of a run.
"""
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import errors
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.training import old_names
from e2e_vlp_jax.training import sharding


def write(workdir, params, model_state, meta):
  """Writes parameters without an optimizer as step 0 of a new WORKDIR.

  Such a checkpoint works for prediction, evaluation and `init_from`.

  Raises:
    UserError, TryAgain: WORKDIR is in a bucket that cannot be written.
  """
  folder = os.path.join(paths.absolute(workdir), checkpoint_files.CHECKPOINTS)
  items = {'params': params, 'model_state': model_state}
  with paths.writing(workdir), ocp.CheckpointManager(
      folder, options=ocp.CheckpointManagerOptions(
          create=True, atomicity_options=atomicity(folder))) as manager:
    manager.save(0, args=ocp.args.Composite(
        **{k: ocp.args.StandardSave(v) for k, v in items.items() if v},
        meta=ocp.args.JsonSave(meta)))


def atomicity(folder):
  """How Orbax finishes a step in `folder`: by its name, or by a last file.

  The latter where folders are not renamed in one step: in a bucket, also a
  mounted one.
  """
  mode = ocp.options.AtomicityMode
  return ocp.options.AtomicityOptions(
      mode=mode.AUTO if paths.renames_folders(folder) else mode.COMMIT_FILE)


def load(path):
  """Parameters and meta of a checkpoint, as numpy arrays on this host.

  Args:
    path: see `checkpoint_files.step_folder`.

  Returns:
    (params, model_state, meta); params are the averaged ones if there are
    any. meta is that of `checkpoint_files.meta`, with 'config' under current
    names.

  Raises:
    UserError: nothing there, or a damaged checkpoint; names the newest whole
      step.
  """
  return checkpoint_files.read(path, _load)


def _load(folder):
  """`load` of a step's folder; raises `checkpoint_files.Damaged`."""
  checkpoint_files.check_items(folder)
  meta = checkpoint_files.meta_of(folder)
  meta['config'] = old_names.modernise(meta['config'], f'checkpoint {folder}')
  has = lambda name: paths.is_folder(os.path.join(folder, name))
  params = _load_tree(folder, 'ema_params' if has('ema_params') else 'params')
  model_state = _load_tree(folder, 'model_state') if has('model_state') else {}
  return params, model_state, meta


def _load_tree(folder, name):
  """An item of a step's folder as a tree of numpy arrays."""
  item = os.path.join(folder, name)
  try:
    with ocp.StandardCheckpointer() as c:
      target = jax.tree.map(
          lambda m: jax.ShapeDtypeStruct(
              m.shape, m.dtype,
              sharding=jax.sharding.SingleDeviceSharding(
                  jax.local_devices()[0])), _described(c, item))
      return jax.tree.map(np.asarray, c.restore(item, target))
  except Exception as e:  # Damaged files make Orbax raise many classes.
    raise checkpoint_files.damaged(folder, name, e) from e


def _described(checkpointer, item):
  """The tree of shapes and types that an item's folder describes."""
  described = checkpointer.metadata(item)
  tree = dict(getattr(described, 'item_metadata', described))
  if not jax.tree.leaves(tree):  # Nobody saves an empty tree.
    raise ValueError('it describes no arrays')
  return tree


def _flat(tree):
  return {sharding.path_name(path): tuple(x.shape) for path, x in
          jax.tree_util.tree_flatten_with_path(tree)[0]}


def check_tree(folder, name, wanted):
  """UserError with the first differences between a saved tree and ours."""
  item = os.path.join(folder, name)
  if not paths.is_folder(item):
    raise errors.UserError(f'checkpoint: {folder!r} has no {name}')
  with ocp.StandardCheckpointer() as c:
    tree = _described(c, item)
  # Orbax stores tuples and named tuples under their own key names.
  compare(_flat(tree), _flat(wanted), f'checkpoint {item}')


def compare(found, wanted, where):
  """UserError naming the first differences of two {name: shape} dicts."""
  missing = [k for k in wanted if k not in found]
  surplus = [k for k in found if k not in wanted]
  other = [f'{k} is {found[k]}, expected {wanted[k]}' for k in wanted
           if k in found and found[k] != wanted[k]]
  if not (missing or surplus or other):
    return
  parts = []
  for title, names in (('missing', missing), ('surplus', surplus),
                       ('other shapes', other)):
    if names:
      more = f' and {len(names) - 3} more' if len(names) > 3 else ''
      parts.append(f'{title}: {", ".join(names[:3])}{more}')
  raise errors.UserError(f'{where} is of another model or size; '
                         + '; '.join(parts))


def check_names(folder, held, ours):
  """UserError if classes, attributes or answers are not those of a run.

  The ids that its parameters have learnt would stand for other names.

  Args:
    folder: of the run's checkpoint.
    held, ours: the metas of the checkpoint and of this run, with the
      vocabularies as `Vocabularies.to_dict` writes them.
  """
  for what, path in (('class', ('labels', 'classes')),
                     ('attribute', ('labels', 'attributes')),
                     ('answer', ('answers',))):
    pairs = itertools.zip_longest(_names(held, path), _names(ours, path))
    for k, (there, here) in enumerate(pairs):
      if there != here:
        word = lambda name: 'none' if name is None else repr(name)
        raise errors.UserError(
            f'checkpoint {folder}: its {path[0]} are not those of the data: '
            f'{what} {k} is {word(there)} there, {word(here)} here; is '
            'data.dir right? A run with other names needs another --workdir; '
            'init_from takes what fits')


def _names(meta, path):
  """The list of names under `path` in a meta, [] if there is none."""
  for key in path:
    meta = meta.get(key) or {}
  return list(meta)


def start_from(path, state, adapt):
  """Copies all that fits of another run's parameters and state into `state`.

  Args:
    path: path of a checkpoint, see `checkpoint_files.step_folder`.
    state: TrainState.
    adapt: function that converts saved parameters to the model's shapes.

  Returns:
    (state, report): see `merge`; 'resized' are those that `adapt` changed.

  Raises:
    UserError: no checkpoint, or nothing of it fits.
  """
  loaded, model_state, _ = load(path)
  adapted = adapt(loaded)
  params, report = merge(state.params, adapted)
  if not report['loaded']:
    raise errors.UserError(f'init_from: {path!r} has no parameter that fits '
                           'this model')
  model_state, others = merge(state.model_state, model_state)
  before, after = _flat(loaded), _flat(adapted)
  report = {kind: names + others[kind] for kind, names in report.items()}
  report['resized'] = [k for k in report['loaded']
                       if before.get(k) != after.get(k)]
  average = state.ema_params and jax.tree.map(jnp.copy, params)
  return state.replace(params=params, model_state=model_state,
                       ema_params=average), report


def merge(params, loaded):
  """Copies from `loaded` into `params` where path and shape match.

  Returns:
    (params, report): report = {'loaded': [...], 'missing': [...],
    'surplus': [...], 'other_shape': [...]} of path names.
  """
  flat, tree = jax.tree_util.tree_flatten_with_path(params)
  source = {sharding.path_name(p): x for p, x in
            jax.tree_util.tree_flatten_with_path(loaded)[0]}
  report = {'loaded': [], 'missing': [], 'surplus': [], 'other_shape': []}
  out = []
  for path, x in flat:
    name = sharding.path_name(path)
    y = source.pop(name, None)
    kind = ('missing' if y is None else
            'loaded' if y.shape == x.shape else 'other_shape')
    report[kind].append(name)
    out.append(jax.device_put(np.asarray(y, x.dtype), x.sharding)
               if kind == 'loaded' else x)
  report['surplus'] = sorted(source)
  return jax.tree_util.tree_unflatten(tree, out), report
