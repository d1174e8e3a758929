"""Checkpoints: WORKDIR/checkpoints/<step>/, written by Orbax.

Items: params, model_state, opt_state (with the key of the run), ema_params,
and meta (JSON: config, tokenizer, label space), kept apart so that evaluation
reads only what it needs. A checkpoint is enough to predict from.
"""
import contextlib
import logging
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.training import distributed
from e2e_vlp_jax.training import old_names
from e2e_vlp_jax.training import sharding


def _key_data(rng):
  """The numbers of a typed key, or their shape if `rng` is only a shape."""
  if not isinstance(rng, jax.ShapeDtypeStruct):
    return jax.random.key_data(rng)
  data = jax.eval_shape(jax.random.key_data, rng)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=rng.sharding)


def _items(state):
  """A TrainState as a dict of trees, the form in which it is saved."""
  items = {
      'params': state.params, 'model_state': dict(state.model_state),
      'opt_state': {'optimizer': state.opt_state,
                    'rng': _key_data(state.rng),
                    'bad_steps': state.bad_steps}}
  if state.ema_params is not None:
    items['ema_params'] = state.ema_params
  # Orbax refuses empty trees.
  return {k: v for k, v in items.items() if jax.tree.leaves(v)}


class Checkpointer:
  """Saves and restores the states of one run.

  Args:
    workdir: the run's folder.
    meta: JSON-able dict stored with every checkpoint.
    options: `config.checkpoint`; saves every `every_steps` and every
      `every_minutes`, whichever comes (0 = never); keeps the newest `keep`,
      those whose step `keep_every` divides (0 = none), and the one with the
      highest metric `best` ('eval/<name>/<metric>'; '' = none).
  """

  def __init__(self, workdir, meta, options):
    self._meta, self._options = meta, options
    self._root = os.path.join(os.path.abspath(workdir), files.CHECKPOINTS)
    kept = [preservation_policy.LatestN(options.keep)]
    if options.keep_every:
      kept.append(preservation_policy.EveryNSteps(options.keep_every))
    if options.best:
      kept.append(preservation_policy.BestN(
          get_metric_fn=lambda metrics: metrics[options.best], n=1,
          keep_checkpoints_without_metrics=False))
    self._manager = ocp.CheckpointManager(
        self._root, options=ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                kept), create=True))
    self._saved_at = time.monotonic()

  @property
  def latest_step(self):
    return self._manager.latest_step()

  def due(self, step, look_at_clock=False):
    """Whether a checkpoint is to be saved at `step`.

    Args:
      step: steps done.
      look_at_clock: also by time. A collective call then, since hosts must
        save at the same step: process 0's clock decides.
    """
    every, minutes = self._options.every_steps, self._options.every_minutes
    if every and step % every == 0:
      return True
    return bool(minutes and look_at_clock) and distributed.agreed(
        time.monotonic() - self._saved_at >= 60 * minutes)

  def save(self, step, state, metrics=None):
    """Starts an asynchronous save; `metrics` rank it for `best`.

    Raises:
      UserError: this or the previous save failed (a full disk, say).
    """
    self._saved_at = time.monotonic()
    best = self._options.best
    if best and metrics is not None and best not in metrics:
      raise errors.UserError(f'checkpoint.best: no metric {best!r}'
                             + errors.nearest(best, metrics))
    with self._failing('save'):
      self._manager.check_for_errors()
      if step in self._manager.all_steps():
        return
      items = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
      self._manager.save(
          step, metrics=metrics, args=ocp.args.Composite(
              **items, meta=ocp.args.JsonSave(self._meta)))

  def check(self):
    """UserError if a save in the background has failed."""
    with self._failing('save'):
      self._manager.check_for_errors()

  def wait(self):
    """Blocks until every save is on disk. UserError if one failed."""
    with self._failing('save'):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _failing(self, what):
    """Turns what the file system says into one line."""
    try:
      yield
    except errors.UserError:
      raise
    except Exception as e:  # Orbax and tensorstore have many classes for it.
      text = ' '.join(str(e).split())
      known = [t for t in ('No space left on device', 'File too large',
                           'Disk quota exceeded', 'Read-only file system',
                           'Permission denied') if t.lower() in text.lower()]
      if not known and not isinstance(e, OSError):
        raise
      raise errors.UserError(
          f'checkpoint: cannot {what} in {self._root!r}: '
          f'{known[0] if known else text[:200]}; the checkpoints before it '
          'are intact, run the same command again once there is room'
      ) from e

  def restore(self, state):
    """The newest readable checkpoint, in the shape and sharding of `state`.

    A checkpoint that cannot be read is set aside (renamed, with a warning)
    and the one before is used.

    Args:
      state: TrainState of ShapeDtypeStructs with shardings, or of arrays.

    Returns:
      a TrainState, or None if there is no checkpoint.

    Raises:
      UserError: the checkpoint is of another model (first differences), or
        there are checkpoints and none can be read.
    """
    wanted = _items(state)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      out = None
      try:
        out = self._restore_step(step, wanted)
      except errors.UserError:
        raise
      except Exception as e:  # Whatever a damaged file makes Orbax raise.
        logging.warning('checkpoint %d cannot be read (%s: %s)', step,
                        type(e).__name__,
                        str(e).splitlines()[0] if str(e) else '')
      # One host may meet the damage alone, but all must go back together.
      if not distributed.everywhere(out is not None):
        self._set_aside(step)
        continue
      number = np.int32(step)
      if isinstance(state.step, jax.ShapeDtypeStruct):
        number = jax.device_put(number, state.step.sharding)
      return state.replace(
          step=number, params=out['params'],
          model_state=out.get('model_state') or {},
          opt_state=out['opt_state']['optimizer'],
          ema_params=out.get('ema_params'),
          rng=jax.random.wrap_key_data(out['opt_state']['rng']),
          bad_steps=out['opt_state']['bad_steps'])
    if steps:
      raise errors.UserError(
          f'checkpoint: none of {len(steps)} in {self._root!r} can be read; '
          'they were set aside beside it, run again to start from step 0')
    return None

  def _set_aside(self, step):
    """Renames a damaged checkpoint, out of the way of the next save."""
    aside = os.path.join(os.path.dirname(self._root),
                         f'damaged_checkpoint_{step}')
    if jax.process_index() == 0:
      while os.path.exists(aside):
        aside += '_again'
      os.rename(os.path.join(self._root, str(step)), aside)
      logging.warning('checkpoint %d is set aside as %s', step, aside)
    distributed.wait_for_all(f'set_aside_{step}')
    self._manager.reload()

  def _restore_step(self, step, wanted):
    """The items of a step, in the shapes and shardings of `wanted`."""
    for name, tree in wanted.items():
      _check_tree(os.path.join(self._root, str(step)), name, tree)
    return self._manager.restore(step, args=ocp.args.Composite(
        **{k: ocp.args.StandardRestore(v) for k, v in wanted.items()}))


def write(workdir, params, model_state, meta):
  """Writes parameters without an optimizer as step 0 of a new WORKDIR.

  Such a checkpoint can be predicted from, evaluated, and named as `init_from`.
  """
  folder = os.path.join(os.path.abspath(workdir), files.CHECKPOINTS)
  items = {'params': params, 'model_state': model_state}
  with ocp.CheckpointManager(folder) as manager:
    manager.save(0, args=ocp.args.Composite(
        **{k: ocp.args.StandardSave(v) for k, v in items.items() if v},
        meta=ocp.args.JsonSave(meta)))


def load(path):
  """Parameters and meta of a checkpoint, as numpy arrays on this host.

  Args:
    path: see `files.step_folder`.

  Returns:
    (params, model_state, meta); params are the averaged ones if there are
    any. meta: 'config' (under today's names) and what else
    `files.checkpoint_meta` has.

  Raises:
    UserError: nothing there, or not readable.
  """
  folder = files.step_folder(path)
  meta = files.checkpoint_meta(folder)
  meta['config'] = old_names.modernise(meta['config'], f'checkpoint {folder}')
  try:
    name = ('ema_params' if os.path.isdir(os.path.join(folder, 'ema_params'))
            else 'params')
    params = _load_tree(os.path.join(folder, name))
    state = os.path.join(folder, 'model_state')
    model_state = _load_tree(state) if os.path.isdir(state) else {}
  except (OSError, ValueError, KeyError) as e:
    raise errors.UserError(f'checkpoint: {folder!r} cannot be read: {e}'
                           ) from e
  return params, model_state, meta


def _load_tree(folder):
  with ocp.StandardCheckpointer() as c:
    described = c.metadata(folder)
    tree = getattr(described, 'item_metadata', described)
    target = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(
            m.shape, m.dtype,
            sharding=jax.sharding.SingleDeviceSharding(
                jax.local_devices()[0])), dict(tree))
    return jax.tree.map(np.asarray, c.restore(folder, target))


def _flat(tree):
  return {sharding.path_name(path): tuple(x.shape) for path, x in
          jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_tree(folder, name, wanted):
  """UserError with the first differences between a saved tree and ours."""
  item = os.path.join(folder, name)
  if not os.path.isdir(item):
    raise errors.UserError(f'checkpoint: {folder!r} has no {name}')
  with ocp.StandardCheckpointer() as c:
    described = c.metadata(item)
  tree = getattr(described, 'item_metadata', described)
  # Orbax stores tuples and named tuples under their own key names.
  compare(_flat(dict(tree)), _flat(wanted), f'checkpoint {item}')


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


def start_from(path, state, adapt):
  """A fresh state with what fits of another run's parameters and state.

  Args:
    path: of a checkpoint, see `files.step_folder`.
    state: TrainState.
    adapt: parameters as they are saved -> as the model wants them.

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
  """Copies into `params` what fits of `loaded`, by path and shape.

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
