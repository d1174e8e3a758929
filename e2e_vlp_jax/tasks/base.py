"""The contract of a task."""
import dataclasses
from typing import Any, Mapping, Optional, Tuple

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors

_PACKAGE = 'e2e_vlp_jax.tasks'


def names():
  """Names of all tasks, sorted."""
  return [n for n in discovery.names(_PACKAGE, 'Task') if n != 'base']


def load(name, key='task'):
  """The task of a name.

  Args:
    name: of a file of this package.
    key: the argument or config key that gave the name, for the error.

  Raises:
    UserError: no such task; names the nearest.
  """
  if name not in names():
    raise errors.UserError(f'{key}: no task {name!r}'
                           + errors.nearest(name, names()))
  return discovery.load(_PACKAGE, name, 'Task', key)()


@dataclasses.dataclass(frozen=True)
class Finetuning:
  """How a model is trained for a task; plain data, which configs read.

  Attributes:
    unit: what a row of a batch is made from (`config.data.unit`).
    objectives: {name: weight}.
    head: options of `config.model.heads[<task>]`, or None where every model
      brings the head along.
    train_ops, eval_ops: pp ops that follow those of the image.
    evaluator: type of the evaluator.
    metric: the evaluator's metric by which the best checkpoint is chosen.
    data: dataset where the config names none.
    splits: {dataset: (split to train on, split to evaluate)}.
    answers: {dataset: name of its answer list}.
  """
  unit: str
  objectives: Mapping[str, float]
  train_ops: str
  eval_ops: str
  evaluator: str
  metric: str
  data: str
  splits: Mapping[str, Tuple[str, str]]
  head: Optional[Mapping[str, Any]] = None
  answers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Task:
  """A task; subclasses override what differs from these defaults."""
  finetuning: Optional[Finetuning] = None

  @property
  def name(self):
    """Name of the task: that of its file."""
    return type(self).__module__.rpartition('.')[2]
