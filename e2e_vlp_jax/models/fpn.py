"""Feature pyramid (Lin et al., CVPR 2017) with two more levels (RetinaNet).

As in FIBER's fine stage: 1x1 convolutions on the trunk's stages, nearest
up-sampling from the top down, a 3x3 convolution on each level, and two levels
by convolutions of stride 2 on the coarsest one. No norms.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class DropBlock(nn.Module):
  """Drops squares of a feature map in training (Ghiasi et al., NeurIPS 2018).

  All channels of a cell are dropped together, and the kept cells are scaled up
  by cells / kept cells of the image. (The released code takes that share over a
  device's batch, which in the published setting is one image.)

  Attributes:
    rate: about the share of cells to drop; 0 = none.
    side: of a square, in cells, odd.
  """
  rate: float
  side: int = 3

  @nn.compact
  def __call__(self, x, train=False):
    """[B, h, w, C] -> [B, h, w, C]."""
    if not train or not self.rate:
      return x
    seeds = jax.random.bernoulli(self.make_rng('dropout'),
                                 self.rate / self.side**2, x.shape[:3])
    reach = self.side // 2
    dropped = jax.lax.reduce_window(
        seeds.astype(jnp.float32), -jnp.inf, jax.lax.max,
        (1, self.side, self.side), (1, 1, 1),
        ((0, 0), (reach, reach), (reach, reach)))
    keep = 1. - dropped
    scale = keep[0].size / jnp.maximum(keep.sum((1, 2), keepdims=True), 1.)
    return x * (keep * scale)[..., None].astype(x.dtype)


class Pyramid(nn.Module):
  """Stages of a trunk -> levels of equal width.

  Attributes:
    width: channels of every level.
    drop_block: `DropBlock.rate`, before the 3x3 convolutions of all levels but
      the coarsest stage.
  """
  width: int = 256
  drop_block: float = 0.
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, stages, train=False):
    """[[B, h, w, C] of each stage, finest first] -> two levels more than that.

    Every level is [B, h', w', width]; of the last two, each has half the side
    of the one before, rounded up.
    """
    conv = lambda name, side, stride=1: nn.Conv(
        self.width, (side,) * 2, (stride,) * 2, side // 2, dtype=self.dtype,
        name=name)
    last = len(stages) - 1
    out, x = [], None
    for k in range(last, -1, -1):
      lateral = conv(f'lateral{k}', 1)(stages[k])
      x = lateral if x is None else lateral + nearest(x, lateral.shape[1:3])
      y = x if k == last else DropBlock(self.drop_block,
                                        name=f'drop{k}')(x, train)
      out.insert(0, conv(f'level{k}', 3)(y))
    more = conv('coarser0', 3, 2)(out[-1])
    return [*out, more, conv('coarser1', 3, 2)(nn.relu(more))]


def nearest(x, size):
  """[B, h, w, C] -> [B, *size, C], each cell repeated (torch 'nearest')."""
  rows, columns = (np.arange(new) * old // new
                   for old, new in zip(x.shape[1:3], size))
  return x[:, rows][:, :, columns]
