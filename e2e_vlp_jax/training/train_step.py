"""The train state and one jitted optimisation step.

Pure functions of (state, batch): global-batch semantics under jit over a
mesh, so the same config gives the same losses on one device and on many.
"""
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax.training import sharding


@flax.struct.dataclass
class TrainState:
  """Everything that a run must remember.

  Attributes:
    step: int32, optimisation steps done.
    params: parameters, float32.
    model_state: other collections: BN statistics, SOHO's codebook.
    opt_state: of the optimizer.
    ema_params: exponential moving average of params, or None.
    rng: key of the run; a step folds its number in.
    bad_steps: int32, updates in a row skipped for non-finite gradients.
  """
  step: Any
  params: Any
  model_state: Any
  opt_state: Any
  ema_params: Any
  rng: Any
  bad_steps: Any

  @property
  def variables(self):
    """For evaluation: the averaged parameters where there are any."""
    params = self.params if self.ema_params is None else self.ema_params
    return {'params': params, **self.model_state}


def init_state(model, tx, batch, requests, seed, ema):
  """A fresh state. Trace or jit it; `batch` may hold ShapeDtypeStructs' data.

  Args:
    model, tx: the model and the optimizer's *factory* params -> optax
      transformation.
    batch: one batch (only shapes matter).
    requests: views and heads to create parameters for.
    seed: int.
    ema: keep an average of the parameters.
  """
  root = jax.random.key(seed)
  batch = jax.tree.map(jnp.asarray, batch)
  variables = dict(model.init({'params': root, 'dropout': root}, batch,
                              requests, train=False))
  params = variables.pop('params')
  return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, model_state=variables,
      opt_state=tx(params).init(params),
      ema_params=jax.tree.map(jnp.copy, params) if ema else None,
      rng=jax.random.fold_in(root, 1), bad_steps=jnp.zeros((), jnp.int32))


def loss_terms(model, objectives, requests, params, model_state, batch, rng,
               mesh):
  """Runs the model once and every objective on it.

  Returns:
    (losses, metrics, model_state): {objective: {name: (sum, weight)}},
    {name: (sum, weight)} and the updated model_state.
  """
  outputs, new_state = model.apply(
      {'params': params, **model_state}, batch, requests, train=True,
      rngs={'dropout': rng, 'sample': jax.random.fold_in(rng, 1)},
      mutable=list(model_state))
  outputs = _constrain_outputs(mesh, outputs, len(batch['image']))
  losses, metrics = {}, {}
  for name, (_, objective) in objectives.items():
    with jax.named_scope('losses'):  # Names by which `parts` finds them.
      losses[name], extra = objective(outputs, batch)
    metrics.update(extra)
  return losses, metrics, {**model_state, **new_state}


def _constrain_outputs(mesh, outputs, size):
  """Keeps what has a row for each example split over the batch axes.

  GSPMD spreads this backwards through the model: no device computes rows of
  another one, whatever the parameters' sharding suggests.
  """
  return jax.tree.map(
      lambda x: sharding.constrain_batch(mesh, x)
      if x.ndim and x.shape[0] == size else x, outputs)


def make_train_step(model, objectives, tx, *, mesh, shardings, accumulate=1,
                    ema_decay=0.):
  """A function (state, batch) -> (state, metrics), to be jitted.

  Args:
    model, objectives: from `models.build` and `objectives.build`.
    tx: optax transformation.
    mesh: over which batches are spread.
    shardings: of the parameters.
    accumulate: micro-batches a step.
    ema_decay: of the averaged parameters, if the state has any.

  With `accumulate` > 1 the batch is cut in that many micro-batches, scanned
  over. Their losses are divided by the weights of the *whole* batch, so the
  result is that of one big step (BatchNorm statistics excepted).

  Metrics: {name: scalar}: 'loss' (weighted), one an objective and one a loss
  term of it, one a metric, 'grad_norm' and 'skipped' (1 if the update was
  dropped because it was not finite).
  """
  requests = objectives_lib.requests(objectives)

  def terms(params, model_state, batch, rng):
    return loss_terms(model, objectives, requests,
                      sharding.gather_parameters(params, shardings),
                      model_state, batch, rng, mesh)

  def loss_fn(params, model_state, batch, rng, weights):
    losses, metrics, model_state = terms(params, model_state, batch, rng)
    if weights is None:
      weights = {n: {k: w for k, (_, w) in t.items()}
                 for n, t in losses.items()}
    values = {n: {k: s / jnp.maximum(weights[n][k], 1e-9)
                  for k, (s, _) in t.items()} for n, t in losses.items()}
    total = sum(objectives[n][0] * sum(t.values()) for n, t in values.items())
    return total, (values, metrics, model_state)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def accumulated(state, batch, rng):
    # Micro-batch k takes rows k, k + accumulate, ...: each device then cuts
    # the rows that it holds, and none moves.
    split = sharding.constrain_batch(mesh, jax.tree.map(
        lambda x: x.reshape(x.shape[0] // accumulate, accumulate,
                            *x.shape[1:]).swapaxes(0, 1), batch), axis=1)

    # Weights depend on the batch alone in most objectives, and XLA then drops
    # the model from this first pass. Where they do not, they are those of the
    # second pass: model_state moves here, too.
    def count(carry, micro):
      model_state, k = carry
      losses, _, model_state = terms(state.params, model_state, micro,
                                     jax.random.fold_in(rng, k))
      return (model_state, k + 1), {n: {k: w for k, (_, w) in t.items()}
                                    for n, t in losses.items()}
    _, weights = jax.lax.scan(count, (state.model_state, 0), split)
    weights = jax.tree.map(lambda w: w.sum(0), weights)

    def add(carry, micro):
      grads, model_state, k = carry
      (_, (values, metrics, model_state)), g = grad_fn(
          state.params, model_state, micro, jax.random.fold_in(rng, k),
          weights)
      return (jax.tree.map(jnp.add, grads, g), model_state, k + 1), (
          values, metrics)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, model_state, _), (values, metrics) = jax.lax.scan(
        add, (zeros, state.model_state, 0), split)
    total = lambda tree: jax.tree.map(lambda x: x.sum(0), tree)
    return grads, total(values), total(metrics), model_state

  def step(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    if accumulate == 1:
      (_, (values, metrics, model_state)), grads = grad_fn(
          state.params, state.model_state, batch, rng, None)
    else:
      grads, values, metrics, model_state = accumulated(state, batch, rng)
    total = sum(objectives[n][0] * sum(t.values()) for n, t in values.items())
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(total)
    keep = lambda new, old: jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, old)
    with jax.named_scope('optimizer'):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      params = keep(params, state.params)
      opt_state = keep(opt_state, state.opt_state)
    ema = state.ema_params
    if ema is not None:
      ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), ema,
                         params)
    logged = {'loss': total, 'grad_norm': norm,
              'skipped': 1. - finite.astype(jnp.float32)}
    for n, t in values.items():
      logged.update(t)
      logged[n] = sum(t.values())
    logged.update({k: s / jnp.maximum(w, 1e-9)
                   for k, (s, w) in metrics.items()})
    return state.replace(
        step=state.step + 1, params=params, ema_params=ema,
        opt_state=opt_state,
        model_state=keep(model_state, state.model_state),
        bad_steps=jnp.where(finite, 0, state.bad_steps + 1)), logged
  return step


def state_shardings(state, mesh, rules=()):
  """NamedShardings of a TrainState's tree (arrays or ShapeDtypeStructs).

  Optimizer state and averages follow the parameter that they belong to;
  everything else is replicated.
  """
  params = sharding.parameter_specs(state.params, mesh, rules)
  by_path = {
      tuple(str(k) for k in path): s
      for path, s in jax.tree_util.tree_flatten_with_path(params)[0]}
  shapes = {
      tuple(str(k) for k in path): x.shape
      for path, x in jax.tree_util.tree_flatten_with_path(state.params)[0]}

  def find(path, x):
    # An optimizer's leaf ends in its parameter's path.
    names = tuple(str(k) for k in path)
    for i in range(len(names)):
      if names[i:] in by_path and shapes[names[i:]] == x.shape:
        return by_path[names[i:]]
    return sharding.replicated(mesh)
  everything = jax.tree_util.tree_map_with_path(find, state)
  return everything.replace(
      params=params,
      ema_params=None if state.ema_params is None else params)
