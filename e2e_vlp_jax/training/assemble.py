"""Puts config, model and mesh together: the state and steps of a run.

`train` runs the steps, `preflight` compiles them for machines that are not
attached, `benchmark` times them. All three use this module, so that they run
the same program.
"""
import jax
import numpy as np

from e2e_vlp_jax import objectives as objectives_lib
from e2e_vlp_jax.profiling import program
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.training import stages as stages_lib
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import train_step


class Assembly:
  """The state and steps of a config; creating it uses no device.

  Args:
    config: whole config.
    model: from `models.build`.
    mesh: from `sharding.make_mesh`; its devices need not be attached.
    example: a batch of any size; only shapes and types matter.

  Attributes:
    stages: from `stages.stages`.
    objectives: [{name: (weight, objective)}], one dict per stage.
    requests: {view: heads} that the stages need from the model, and all heads
      of `config.model.heads`: the state has their parameters.
    shapes: TrainState of ShapeDtypeStructs.
    shardings: TrainState of NamedShardings.

  Raises:
    UserError: parts of the config do not fit together.
  """

  def __init__(self, config, model, mesh, example):
    self.config, self.model, self.mesh, self._example = (
        config, model, mesh, example)
    self.stages = stages_lib.stages(config)
    self.objectives = [
        objectives_lib.build(config, mesh, sharding.BATCH_AXES,
                             stage.objectives) for stage in self.stages]
    for stage, built in zip(self.stages, self.objectives):
      objectives_lib.check(built, model, config)
      self.schedule(stage)  # Fails now, not when the stage begins.
    needed = objectives_lib.requests(
        {f'{i}/{k}': v for i, built in enumerate(self.objectives)
         for k, v in built.items()})
    for name, options in model.head_options.items():
      for view in options['views']:
        needed[view] = tuple(sorted({*needed.get(view, ()), name}))
    self.requests = dict(sorted(needed.items()))
    # An argument of the program, so that all seeds share it.
    self._root = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
    self.shapes = jax.eval_shape(self._init, self._root)
    self.shardings = sharding.state_shardings(
        self.shapes, mesh, tuple(config.sharding_rules))

  def describe(self, data, first_step):
    """Model, training examples (of a Pipeline) and devices in one line."""
    counts = program.count_parameters(self.shapes.params)
    total = counts.pop('total')
    parts = ', '.join(f'{k} {v:,}' for k, v in counts.items())
    return (f'{self.config.model.name}: {total:,} parameters ({parts}); '
            f'{data.num_examples:,} examples; '
            + (f'{data.left_out}; ' if data.left_out else '')
            + f'{self.mesh.size} {self.mesh.devices.flat[0].platform} device(s)'
            + (f'; resumed at step {first_step}' if first_step else ''))

  def schedule(self, stage):
    """Learning rate as a function of the steps since the stage's start."""
    return optim.make_schedule(stage.schedule, stage.end, stage.start,
                               stage.key)

  def learning_rate(self, index, step):
    """Learning rate of step `step` (from 0) in stage number `index`."""
    stage = self.stages[index]
    return float(self.schedule(stage)(step - stage.start))

  def optimizer(self, stage, params=None):
    """The stage's optax transformation."""
    return optim.make_optimizer(
        self.config.optim, self.shapes.params if params is None else params,
        self.schedule(stage), self.model.towers)

  def _init(self, root):
    return train_step.init_state(
        self.model, lambda params: self.optimizer(self.stages[0], params),
        self._example, self.requests, jax.random.wrap_key_data(root),
        ema=self.config.ema_decay > 0)

  def init(self):
    """A new TrainState; each array is created on the devices that store it."""
    return jax.jit(self._init, out_shardings=self.shardings)(self._root)

  def begin_stage(self, index, state):
    """Prepares `state` for a stage: resets the optimizer where it starts.

    Otherwise the moments of parameters that the previous stage did not train
    would be wrong for many steps.
    """
    stage = self.stages[index]
    if not 0 < stage.start == int(state.step):
      return state
    start = jax.jit(self.optimizer(stage).init,
                    out_shardings=self.shardings.opt_state)
    return state.replace(opt_state=start(state.params))

  def step(self, index=-1):
    """The jitted function (state, batch) -> (state, metrics) of a stage.

    It donates the state that it is given.
    """
    function = train_step.make_train_step(
        self.model, self.objectives[index],
        self.optimizer(self.stages[index]), mesh=self.mesh,
        shardings=self.shardings.params,
        accumulate=self.config.accumulate, ema_decay=self.config.ema_decay)
    return jax.jit(function, donate_argnums=0,
                   out_shardings=(self.shardings,
                                  sharding.replicated(self.mesh)))

  def state_target(self):
    """`shapes` with their shardings, to restore into or to compile for."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        self.shapes, self.shardings)

  def feeding(self, index=-1):
    """The objective of a stage that has a feeder, or None."""
    found = [o for _, o in self.objectives[index].values()
             if hasattr(o, 'feeder')]
    return found[0] if found else None

  def fed(self, batch):
    """`batch` with zeros for what the last stage's feeder adds."""
    objective = self.feeding()
    return objective.placeholder(batch) if objective else batch

  def batch_target(self, batch_size):
    """Shapes and shardings of a global batch of this size, as it is fed."""
    where = sharding.batch_sharding(self.mesh)
    return {k: jax.ShapeDtypeStruct(
        (batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype),
        sharding=where) for k, x in self.fed(self._example).items()}

  def trace(self, batch_size):
    """Traces the last stage's step for a batch of this size, to compile it."""
    return self.step().trace(self.state_target(),
                             self.batch_target(batch_size))
