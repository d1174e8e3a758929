"""Dynamic head (Dai et al., CVPR 2021), as in GLIP and FIBER's fine stage.

A block lets each level of a pyramid see its neighbours: deformable
convolutions of the level itself, of the finer and of the coarser one, all with
offsets that the level predicts; weights for the three; and an activation whose
slopes the level's mean decides.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.ops import deformable

GROUPS = 16
_OFFSETS = 2 * deformable.TAPS  # of the maps' channels; masks follow
_SMALL = nn.initializers.normal(.01)
# Uniform in +-1 / sqrt(inputs of an output), as in the released code.
_UNIFORM = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def hard_sigmoid(x):
  """clip(x + 3, 0, 6) / 6."""
  return jnp.clip(x + 3, 0, 6) / 6


class DeformableConv(nn.Module):
  """Deformable 3x3 convolution, bias, GroupNorm; float32 inside."""
  width: int

  @nn.compact
  def __call__(self, x, offset, mask, stride=1):
    """See `deformable.convolve`; offset: [B, h, w, 18], (dy, dx) by tap."""
    offset = offset.reshape(*offset.shape[:3], deformable.TAPS, 2)
    kernel = self.param('kernel', _UNIFORM,
                        (3, 3, x.shape[-1], self.width))
    bias = self.param('bias', nn.initializers.zeros, (self.width,))
    y = deformable.convolve(x, kernel, offset, mask, stride) + bias
    return nn.GroupNorm(GROUPS, epsilon=1e-5, name='norm')(y)


class DyReLU(nn.Module):
  """max(a1 x + b1, a2 x + b2); the mean of x decides on the four, by channel.

  Chen et al., ECCV 2020.
  """
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[B, h, w, C] -> [B, h, w, C]."""
    c = x.shape[-1]
    y = x.mean((1, 2)).astype(self.dtype)
    dense = lambda n, name: nn.Dense(n, dtype=self.dtype, name=name,
                                     kernel_init=_UNIFORM)
    y = dense(4 * c, 'out')(nn.relu(dense(c // 4, 'in')(y))).astype(x.dtype)
    theta = hard_sigmoid(y)[:, None, None] - .5
    a1, b1, a2, b2 = jnp.split(theta, 4, -1)
    return jnp.maximum(x * (2 * a1 + 1) + b1, x * 2 * a2 + b2)


class Block(nn.Module):
  """One block over all levels; its modules serve every level.

  Attributes:
    released_offsets: the coarser level reads the offsets as the released code
      does, see `deformable.read_flat`, which published weights need. False:
      the offsets are resized to the coarser level.
  """
  width: int = 256
  released_offsets: bool = True
  dtype: Any = jnp.float32

  def setup(self):
    self.offset = nn.Conv(3 * deformable.TAPS, (3, 3), padding=1,
                          dtype=self.dtype, kernel_init=_UNIFORM)
    self.same, self.finer, self.coarser = (
        DeformableConv(self.width) for _ in range(3))
    self.level_weight = nn.Dense(1, kernel_init=_SMALL)
    self.activation = DyReLU(self.dtype)

  def __call__(self, levels):
    """[[B, h, w, C] of each level, finest first] -> the same shapes."""
    return [self.activation(self.mixed(levels, k)).astype(self.dtype)
            for k in range(len(levels))]

  def mixed(self, levels, k):
    """Level k and its neighbours, weighted and averaged: float32."""
    x = levels[k]
    maps = self.offset(x).astype(jnp.float32)
    maps = [maps[..., :_OFFSETS], jax.nn.sigmoid(maps[..., _OFFSETS:])]
    parts = [self.same(x, *maps)]
    if k:
      parts.append(self.finer(levels[k - 1], *maps, 2))
    if k + 1 < len(levels):
      size = levels[k + 1].shape[1:3]
      fit = (deformable.read_flat if self.released_offsets
             else deformable.resize)
      y = self.coarser(levels[k + 1], *(fit(m, size) for m in maps))
      parts.append(deformable.resize(y, x.shape[1:3]))
    return sum(self.weighted(y) for y in parts) / len(parts)

  def weighted(self, x):
    """x times the weight that its mean gives it."""
    weight = hard_sigmoid(nn.relu(self.level_weight(x.mean((1, 2)))))
    return x * weight[:, None, None]


class Tower(nn.Module):
  """A stack of blocks.

  Attributes:
    blocks: number of them.
    remat: policy for each block; see `layers.remat`.
  """
  blocks: int = 6
  width: int = 256
  released_offsets: bool = True
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, levels):
    """[[B, h, w, C] of each level, finest first] -> the same shapes."""
    if self.width % GROUPS:
      raise errors.UserError(
          f'model.head.width: {self.width}; expected a multiple of {GROUPS}, '
          'the groups of the head\'s norms')
    block = layers.remat(Block, self.remat)
    for i in range(self.blocks):
      levels = block(self.width, self.released_offsets, self.dtype,
                     name=f'block{i}')(levels)
    return levels
