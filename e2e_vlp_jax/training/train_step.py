"""The train state and one optimisation step, to be jitted over a mesh.

A step is a pure function of state and global batch, so the same config gives
the same losses on one device and on many.
"""
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax.ops import cheap_keys
from e2e_vlp_jax.ops import place
from e2e_vlp_jax.training import sharding


@flax.struct.dataclass
class TrainState:
  """Everything that a run keeps from step to step.

  Attributes:
    step: int32, optimisation steps done.
    params: parameters, float32.
    model_state: other collections: BN statistics, SOHO's codebook.
    opt_state: state of the optimizer.
    ema_params: exponential moving average of params, or None.
    rng: random key of the run; each step folds its number into it.
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
    """Variables for evaluation: averaged parameters if there are any."""
    params = self.params if self.ema_params is None else self.ema_params
    return {'params': params, **self.model_state}


def init_state(model, tx, batch, requests, root, ema):
  """The state at step 0; to be traced or jitted.

  Args:
    model: from `models.build`.
    tx: function parameters -> optax transformation.
    batch: one batch; only shapes matter.
    requests: views and heads to create parameters for.
    root: random key of the run.
    ema: whether to keep an average of the parameters.
  """
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
    losses: {objective: {name: (sum, weight)}}.
    metrics: {name: (sum, weight)}.
    model_state: the model's new state.
  """
  with place.on(mesh, sharding.BATCH_AXES):
    outputs, new_state = model.apply(
        {'params': params, **model_state}, batch, requests, train=True,
        rngs={'dropout': cheap_keys.from_key(rng),
              'sample': jax.random.fold_in(rng, 1)},
        mutable=list(model_state))
  outputs = _constrain_outputs(
      mesh, outputs, model.batchless_outputs,
      len(batch['image']))
  losses, metrics = {}, {}
  for name, (_, objective) in objectives.items():
    with jax.named_scope('losses'):  # `profiling.by_module` looks for it.
      losses[name], extra = objective(outputs, batch)
    metrics.update(extra)
  return losses, metrics, {**model_state, **new_state}


def _constrain_outputs(mesh, outputs, batchless, size):
  """Keeps outputs with a row for each example split over the batch axes.

  GSPMD propagates this backwards through the model, so no device computes rows
  of another one, whatever the parameters' sharding suggests.

  Args:
    mesh: mesh over which the batch is split.
    outputs: {view: {name: array, or tree of arrays}}.
    batchless: names of outputs without such rows (`Model.batchless_outputs`);
      shapes do not tell, as an axis may have the batch's length by chance.
    size: size of the batch.
  """
  def constrain(view, name, x):
    if name in batchless:
      return x
    for leaf in jax.tree.leaves(x):
      if not leaf.ndim or leaf.shape[0] != size:
        raise ValueError(
            f'output {name!r} of view {view!r} has shape {leaf.shape} for a '
            f'batch of {size}: name it in the batchless_outputs of its model')
    return sharding.constrain_batch(mesh, x)
  return {view: {name: constrain(view, name, x) for name, x in found.items()}
          for view, found in outputs.items()}


def make_train_step(model, objectives, tx, *, mesh, shardings, accumulate=1,
                    ema_decay=0.):
  """Returns a function (state, batch) -> (state, metrics), to be jitted.

  Args:
    model, objectives: from `models.build` and `objectives.build`.
    tx: optax transformation.
    mesh: mesh over which batches are split.
    shardings: shardings of the parameters.
    accumulate: micro-batches per step.
    ema_decay: decay of the averaged parameters, if the state has any.

  With `accumulate` > 1 the batch is cut into that many micro-batches, one
  after the other. Their losses are divided by the weights of the *whole*
  batch, so the result is that of one big step (BatchNorm statistics excepted).

  Metrics: {name: scalar}: 'loss' (weighted), one per objective, one per loss
  term of an objective, one per metric, 'grad_norm' and 'skipped' (1 if the
  update was dropped because it was not finite).
  """
  requests = objectives_lib.requests(objectives)

  def terms(params, model_state, batch, rng):
    return loss_terms(model, objectives, requests,
                      sharding.gather_parameters(params, shardings),
                      model_state, batch, rng, mesh)

  def loss(params, model_state, batch, rng, weights=None):
    """The weighted sum of all losses; see `_gradients`."""
    losses, metrics, model_state = terms(params, model_state, batch, rng)
    values = _divided(objectives, losses, weights or _weights(losses))
    return _total(objectives, values), (values, metrics, model_state)

  gradients = jax.grad(loss, has_aux=True)

  def step(state, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    if accumulate == 1:
      grads, (values, metrics, model_state) = gradients(
          state.params, state.model_state, batch, rng)
    else:
      grads, (values, metrics, model_state) = _accumulated(
          terms, gradients, state, batch, rng, mesh, accumulate)
    total = _total(objectives, values)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(total)
    state = _updated(state, tx, grads, model_state, finite, ema_decay)
    return state, {
        'loss': total, 'grad_norm': norm,
        'skipped': 1. - finite.astype(jnp.float32),
        **_scalars(values, metrics)}
  return step


# --- Losses are sums with weights -------------------------------------------
def _weights(losses):
  """{objective: {name: weight}} of the losses of `loss_terms`."""
  return {n: {k: w for k, (_, w) in t.items()} for n, t in losses.items()}


def _divided(objectives, losses, weights):
  """{objective: {name: sum / weight}}.

  Args:
    objectives: see `make_train_step`.
    losses: from `loss_terms`, for a batch or micro-batch.
    weights: from `_weights`, always for the whole batch.
  """
  least = {n: getattr(objectives[n][1], 'least_weight', {}) for n in losses}
  return {n: {k: s / jnp.maximum(weights[n][k], least[n].get(k, 1e-9))
              for k, (s, _) in t.items()} for n, t in losses.items()}


def _total(objectives, values):
  """The loss: objectives weighted by the config, their terms added up."""
  return sum(objectives[n][0] * sum(t.values()) for n, t in values.items())


def _scalars(values, metrics):
  """{name: scalar} of losses (divided) and metrics (sums and weights)."""
  out = {}
  for name, terms in values.items():
    out.update(terms)
    out[name] = sum(terms.values())
  out.update({k: s / jnp.maximum(w, 1e-9) for k, (s, w) in metrics.items()})
  return out


# --- Gradients and update ---------------------------------------------------
def _accumulated(terms, gradients, state, batch, rng, mesh, count):
  """Result of `gradients` for the whole batch, from `count` micro-batches.

  Args:
    terms, gradients: see `make_train_step`.
    state: TrainState.
    batch: the whole batch.
    rng: random key of this step.
    mesh: mesh over which the batch is split.
    count: number of micro-batches.
  """
  # Micro-batch k has rows k, k + count, ..., so that each device slices its own
  # rows and none are moved.
  parts = sharding.constrain_batch(mesh, jax.tree.map(
      lambda x: x.reshape(x.shape[0] // count, count,
                          *x.shape[1:]).swapaxes(0, 1), batch), axis=1)

  # Weights depend on the batch alone in most objectives, and XLA then drops
  # the model from this first pass. Otherwise they still equal those of the
  # second pass, because model_state is updated here too.
  def weigh(carry, part):
    model_state, k = carry
    losses, _, model_state = terms(state.params, model_state, part,
                                   jax.random.fold_in(rng, k))
    return (model_state, k + 1), _weights(losses)
  _, weights = jax.lax.scan(weigh, (state.model_state, 0), parts)
  weights = _sum_of_parts(weights)

  def add(carry, part):
    grads, model_state, k = carry
    new, (values, metrics, model_state) = gradients(
        state.params, model_state, part, jax.random.fold_in(rng, k), weights)
    return (jax.tree.map(jnp.add, grads, new), model_state, k + 1), (
        values, metrics)
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  (grads, model_state, _), (values, metrics) = jax.lax.scan(
      add, (zeros, state.model_state, 0), parts)
  return grads, (_sum_of_parts(values), _sum_of_parts(metrics), model_state)


def _sum_of_parts(tree):
  return jax.tree.map(lambda x: x.sum(0), tree)


def _updated(state, tx, grads, model_state, finite, ema_decay):
  """The state after one update, or the old one with the skip counted.

  Args:
    state: TrainState before.
    tx: optax transformation.
    grads: gradients of the parameters.
    model_state: the model's new state.
    finite: scalar, whether to make the update.
    ema_decay: decay of the averaged parameters.
  """
  def choose(new, old):
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  with jax.named_scope('optimizer'):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = choose(optax.apply_updates(state.params, updates), state.params)
    opt_state = choose(opt_state, state.opt_state)
  average = state.ema_params
  if average is not None:
    average = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e),
                           average, params)
  return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state,
      ema_params=average, model_state=choose(model_state, state.model_state),
      bad_steps=jnp.where(finite, 0, state.bad_steps + 1))
