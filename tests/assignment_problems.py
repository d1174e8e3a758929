"""Random assignment problems, and scipy's answer to them."""
import numpy as np
import scipy.optimize

KINDS = ('uniform', 'detr', 'ties', 'equal', 'scales')


def problems(count, queries, targets, kind, draw):
  """(cost [count, Q, M], mask [count, M]); from no target to all of them."""
  shape = (count, queries, targets)
  if kind == 'uniform':
    cost = draw.uniform(-1, 1, shape)
  elif kind == 'detr':  # 1 class, 5 L1, 2 GIoU
    cost = (-draw.random(shape) + 5 * draw.random(shape) * 4
            - 2 * draw.uniform(-1, 1, shape))
  elif kind == 'ties':
    cost = draw.integers(0, 4, shape)
  elif kind == 'scales':  # huge costs in one problem, tiny ones in another
    cost = draw.normal(0, 1, shape) * draw.choice([1e-6, 1e6], (count, 1, 1))
  else:
    cost = np.full(shape, 2.5)
  mask = np.arange(targets) < draw.integers(0, targets + 1, (count, 1))
  # Targets may be anywhere, and padding may hold anything.
  mask = draw.permuted(mask, axis=1)
  cost = np.where(mask[:, None], cost, draw.normal(0, 1e3, shape))
  return cost.astype(np.float32), mask


def best(cost, mask):
  """scipy's optimal cost of one problem."""
  real = cost[:, mask].astype(float)
  return real[scipy.optimize.linear_sum_assignment(real)].sum()


def cost_of(cost, mask, index):
  """The cost of an assignment `index` [M]."""
  return cost[index, np.arange(len(index))].astype(float)[mask].sum()
