"""A small convolutional trunk for training from scratch on CPU cores.

Our choice, not from a paper: XLA's CPU convolutions with few channels run far
below its matrix products, so every convolution here is a gather of shifted
slices followed by one matrix product, and the first one sees 8x8 patches at
stride 4. Total stride 12: a 96x96 image gives 8x8 cells.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax.models import layers

STRIDE = 12


def gather_patches(x, kernel, stride=1, pad=0):
  """[B, H, W, C] -> [B, h, w, kernel*kernel*C] (im2col)."""
  if pad:
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  h = (x.shape[1] - kernel) // stride + 1
  w = (x.shape[2] - kernel) // stride + 1
  slices = [x[:, i:i + stride * (h - 1) + 1:stride,
              j:j + stride * (w - 1) + 1:stride]
            for i in range(kernel) for j in range(kernel)]
  return jnp.concatenate(slices, -1)


def space_to_depth(x, n):
  """[B, H, W, C] -> [B, H/n, W/n, n*n*C]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // n, w // n, n * n * c)


class PatchCNN(nn.Module):
  """8x8/4 stem, 3x3/3 reduction, `blocks` bottlenecks; LayerNorm throughout.

  Attributes:
    stem: channels after the stem.
    width: channels of the cells.
    blocks: number of residual bottlenecks at stride 12.
    multiple: the sides of a canvas must be multiples of this.
    frozen: unused; there is no BatchNorm, and the optimizer freezes the rest.
  """
  stem: int = 64
  width: int = 128
  blocks: int = 2
  frozen: Any = ()
  dtype: Any = jnp.float32

  multiple = STRIDE

  @staticmethod
  def layer_patterns(blocks=2, **_):
    """Regexes of the layers' parameters, from the input on."""
    return ('stem(_norm)?/.*', 'reduce(_norm)?/.*',
            *(f'block{i}_.*' for i in range(blocks - 1)),
            f'(block{blocks - 1}_|norm/).*')

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    """Trunk.

    Args:
      x: normalised pixels [B, H, W, 3], zero where padded.
      train: has no effect.
      mask: [B, H, W] True on real pixels; None if nothing is padded.

    Returns:
      [map [B, H/12, W/12, width]], which does not depend on the padding.
    """
    del train
    dense = lambda n, name, **kw: nn.Dense(n, dtype=self.dtype, name=name,
                                           **kw)
    norm = lambda name: layers.LayerNorm(name=name)
    x = x.astype(self.dtype)
    b, h, w, _ = x.shape
    edge = (0, -h % STRIDE), (0, -w % STRIDE)
    x = jnp.pad(x, ((0, 0), *edge, (0, 0)))
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), *edge))
    # 8x8 patches at stride 4 are 2x2 neighbourhoods of 4x4 blocks.
    x = space_to_depth(x, 4)
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    x = jax.nn.relu(norm('stem_norm')(
        dense(self.stem, 'stem')(gather_patches(x, 2))))
    x = jax.nn.relu(norm('reduce_norm')(
        dense(self.width, 'reduce')(gather_patches(x, 3, 3))))
    for i in range(self.blocks):
      y = jax.nn.relu(norm(f'block{i}_norm1')(
          dense(self.width // 2, f'block{i}_in')(x)))
      y = jax.nn.relu(norm(f'block{i}_norm2')(
          dense(self.width // 2, f'block{i}_mid')(
              gather_patches(layers.hide_padding(y, mask), 3, 1, 1))))
      x = x + dense(self.width, f'block{i}_out',
                    kernel_init=nn.initializers.normal(.02))(y)
    return [norm('norm')(x)]


BACKBONE = PatchCNN
