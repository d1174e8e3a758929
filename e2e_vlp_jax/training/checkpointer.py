"""Saves and restores the checkpoints of one run.

`Checkpointer` writes WORKDIR/checkpoints/<step>/ in the background and keeps
some of them; training/checkpoint.py describes their contents. The scores of an
evaluation are part of a step's meta, so that a resumed run knows its best step.
"""
import contextlib
import logging
import math
import os
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import errors
from e2e_vlp_jax.storage import failures
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.storage import staging
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import distributed


class Checkpointer:
  """Saves and restores the states of one run; a context manager.

  Args:
    workdir: the run's folder; what else changed in it is uploaded before a
      save, if it is in a bucket.
    meta: JSON-able dict stored with every checkpoint.
    options: `config.checkpoint`; saves every `every_steps` and every
      `every_minutes`, whichever comes first (0 = never); keeps the newest
      `keep`, the multiples of `keep_every` (0 = none), and the one with the
      highest metric `best` ('eval/<name>/<metric>'; '' = none).

  Attributes:
    held: meta of the checkpoint that `restore` has read; {} before.
  """

  def __init__(self, workdir, meta, options):
    self._meta, self._options, self.held = meta, options, {}
    self._workdir = workdir
    self._root = os.path.join(paths.absolute(workdir),
                              checkpoint_files.CHECKPOINTS)
    kept = [preservation_policy.LatestN(options.keep)]
    if options.keep_every:
      kept.append(preservation_policy.EveryNSteps(options.keep_every))
    self._scores = {}  # of the steps that can be the best
    if options.best:
      kept.append(_KeepBest(self._best_of))
    with self._file_errors('use'):
      self._manager = ocp.CheckpointManager(
          self._root, options=ocp.CheckpointManagerOptions(
              preservation_policy=preservation_policy.AnyPreservationPolicy(
                  kept), create=True,
              atomicity_options=checkpoint.atomicity(self._root)))
    for step in self._manager.all_steps():
      with contextlib.suppress(checkpoint_files.Damaged):  # See `restore`.
        self._rank(step, checkpoint_files.meta_of(
            os.path.join(self._root, str(step))))
    self._saved_at = time.monotonic()

  def __enter__(self):
    return self

  def __exit__(self, kind, *unused):
    """Finishes the saves without masking an exception in flight."""
    with contextlib.suppress(*[Exception] if kind else []):
      with self._file_errors():
        self._manager.close()

  def due(self, step, scores=None, look_at_clock=False):
    """Whether a checkpoint is to be saved at `step`.

    Args:
      step: steps done.
      scores: scores of an evaluation at this step, which may be the best.
      look_at_clock: also check `every_minutes`. All hosts must then call this
        together: process 0's clock decides, so that all save at the same step.
    """
    o = self._options
    if (o.every_steps and step % o.every_steps == 0) or (o.best and scores):
      return True
    return bool(o.every_minutes and look_at_clock) and distributed.agreed(
        time.monotonic() - self._saved_at >= 60 * o.every_minutes)

  def best(self):
    """(step, score) of the best step that is kept, None if none is scored."""
    step = self._best_of(self._manager.all_steps())
    return None if step is None else (step, self._scores[step])

  def describe_best(self):
    """Where the best step is, in one line; '' if `best` is not asked for."""
    if not self._options.best:
      return ''
    found = self.best()
    if not found:
      return ('checkpoint.best: no evaluation during training gave '
              f'{self._options.best}')
    step, score = found
    return (f'best {self._options.best} during training: {score:.4f} at step '
            f'{step}, {os.path.join(self._root, str(step))}')

  def save(self, step, state, scores=None, **more):
    """Starts an asynchronous save.

    Args:
      step: steps done.
      state: the TrainState.
      scores: of an evaluation at this step; they rank it for `best`.
      **more: further parts of the step's meta, JSON-able.

    Raises:
      UserError: this or the previous save failed: a full disk, say.
      TryAgain: the same, and it may pass: a time-out, say.
    """
    self._saved_at = time.monotonic()
    best = self._options.best
    if best and scores is not None and best not in scores:
      raise errors.UserError(f'checkpoint.best: no metric {best!r}'
                             + errors.nearest(best, scores))
    with self._file_errors():
      self._manager.check_for_errors()
      if step in self._manager.all_steps():
        return
      # A step that was set aside may have had a score.
      self._scores.pop(step, None)
      meta = {**self._meta, **more}
      if scores is not None:
        meta['scores'] = {k: float(v) for k, v in scores.items()
                          if math.isfinite(v)}
        self._rank(step, meta)
      # Metrics may be newer than the newest checkpoint, never older.
      staging.upload(self._workdir)
      items = {k: ocp.args.StandardSave(v) for k, v in _items(state).items()}
      self._manager.save(step, args=ocp.args.Composite(
          **items, meta=ocp.args.JsonSave(meta)))

  def check(self):
    """Raises what `save` does if a save in the background has failed."""
    with self._file_errors():
      self._manager.check_for_errors()

  def wait(self):
    """Blocks until every save is on disk; raises what `save` does."""
    with self._file_errors():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _file_errors(self, what='save in'):
    """Says in one line which error of the file system or bucket it was."""
    try:
      yield
    except (errors.UserError, errors.TryAgain):
      raise
    except Exception as e:  # Orbax and tensorstore raise many classes.
      found = failures.of(
          e, f'checkpoint: cannot {what} {self._root!r}',
          '; earlier checkpoints are intact; mend it and run the same command '
          'again')
      if found is None:
        raise
      raise found from e

  def _rank(self, step, meta):
    """Remembers the score of a step with this meta, if it has one."""
    score = meta.get('scores', {}).get(self._options.best)
    if score is not None:
      self._scores[step] = score

  def _best_of(self, steps):
    """The best of `steps`, the newest of equals; None if none has a score."""
    return max((s for s in steps if s in self._scores), default=None,
               key=lambda s: (self._scores[s], s))

  def restore(self, state):
    """The newest readable checkpoint, in the shape and sharding of `state`.

    A checkpoint that cannot be read, or that lacks an item, is set aside
    (renamed, with a warning) and the one before is used.

    Args:
      state: TrainState of ShapeDtypeStructs with shardings, or of arrays.

    Returns:
      a TrainState, or None if there is no checkpoint.

    Raises:
      UserError: the checkpoint is of another model or has other labels (first
        differences), or there are checkpoints and none can be read.
    """
    wanted = _items(state)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      items = self._read(step, wanted)
      # The damage may show on one host only, but all must go back together.
      if distributed.everywhere(items is not None):
        self.held = checkpoint_files.meta_of(
            os.path.join(self._root, str(step)))
        return _state(step, items, state)
      self._set_aside(step)
    if steps:
      raise errors.UserError(
          f'checkpoint: none of {len(steps)} in {self._root!r} can be read; '
          'they were set aside beside it, run again to start from step 0')
    return None

  def _read(self, step, wanted):
    """The items of a step like those of `wanted`; None if it is damaged."""
    folder = os.path.join(self._root, str(step))
    try:
      checkpoint_files.check_items(folder, (*wanted, 'meta'), optional=())
      checkpoint.check_names(folder, checkpoint_files.meta_of(folder),
                             self._meta)
      for name, tree in wanted.items():
        checkpoint.check_tree(folder, name, tree)
      return self._manager.restore(step, args=ocp.args.Composite(
          **{k: ocp.args.StandardRestore(v) for k, v in wanted.items()}))
    except checkpoint_files.Damaged as e:
      logging.warning('%s', e)
      return None
    except errors.UserError:
      raise
    except Exception as e:  # Damaged files make Orbax raise many classes.
      logging.warning('checkpoint %d cannot be read (%s: %s)', step,
                      type(e).__name__,
                      str(e).splitlines()[0] if str(e) else '')
      return None

  def _set_aside(self, step):
    """Renames a damaged checkpoint, out of the way of the next save."""
    aside = os.path.join(os.path.dirname(self._root),
                         f'damaged_checkpoint_{step}')
    if jax.process_index() == 0:
      while paths.is_folder(aside):
        aside += '_again'
      with self._file_errors('set aside a damaged one in'):
        paths.at(self._root, str(step)).rename(aside)
      logging.warning('checkpoint %d is set aside as %s', step, aside)
    distributed.wait_for_all(f'set_aside_{step}')
    self._manager.reload()


class _KeepBest(preservation_policy.PreservationPolicy):
  """Keeps the step that `best_of` chooses of those that there are.

  Orbax's own policy knows the metrics of this process's saves only.
  """

  def __init__(self, best_of):
    self._best_of = best_of

  def should_preserve(self, checkpoints, *, context):
    del context
    best = self._best_of([c.step for c in checkpoints])
    return [c.step == best for c in checkpoints]


# --- Contents ---------------------------------------------------------------
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


def _key_data(rng):
  """The data of a typed key, or its shape if `rng` is only a shape."""
  if not isinstance(rng, jax.ShapeDtypeStruct):
    return jax.random.key_data(rng)
  data = jax.eval_shape(jax.random.key_data, rng)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=rng.sharding)


def _state(step, items, like):
  """The inverse of `_items`: the TrainState of the restored `items`.

  Args:
    step: step of the checkpoint.
    items: the restored items.
    like: TrainState with the wanted structure.
  """
  step = np.int32(step)
  if isinstance(like.step, jax.ShapeDtypeStruct):
    step = jax.device_put(step, like.step.sharding)
  rest = items['opt_state']
  return like.replace(
      step=step, params=items['params'],
      model_state=items.get('model_state') or {},
      opt_state=rest['optimizer'], ema_params=items.get('ema_params'),
      rng=jax.random.wrap_key_data(rest['rng']), bad_steps=rest['bad_steps'])
