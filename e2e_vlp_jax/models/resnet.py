"""ResNet-18 to -152 as torchvision builds them (stride in the 3x3 conv).

He et al., CVPR 2016. Names and strides follow torchvision so that published
weights map one to one; padding is explicit because XLA's SAME differs from
torch's at stride 2.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.ops import place

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
          101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK = {18: False, 34: False, 50: True, 101: True, 152: True}


class BatchNorm(nn.Module):
  """BatchNorm over B, H, W; trained, or constant if its scale is frozen.

  Running statistics live in the 'batch_stats' collection. As in torch, the
  running variance is the unbiased one, momentum 0.1, eps 1e-5. Under jit over
  a sharded batch the statistics are those of the global batch (SyncBN).

  Attributes:
    frozen: groups of `layers.is_frozen`. A frozen BatchNorm normalises with
      its running statistics in training, too, and passes no gradient to its
      scale and bias.
    zero_init: the scale starts at 0 unless it is frozen.
  """
  frozen: Any = ()
  zero_init: bool = False
  momentum: float = 0.1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x, train=False, repeats=1, conv=None):
    """Normalises x [B, H, W, C], or what a convolution makes of it.

    Constants of a BatchNorm that is not trained scale the convolution's kernel
    and not its result, which saves a GPU a pass over it.

    Args:
      x: features.
      train: use and update the batch's statistics, unless frozen.
      repeats: the unbiased variance counts each row this many times.
      conv: a `Conv`, or None.
    """
    c = conv.features if conv else x.shape[-1]
    frozen = layers.is_frozen(self.frozen, '/'.join((*self.path, 'scale')))
    init = (nn.initializers.zeros if self.zero_init and not frozen
            else nn.initializers.ones)
    scale = self.param('scale', init, (c,))
    bias = self.param('bias', nn.initializers.zeros, (c,))
    mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,))
    var = self.variable('batch_stats', 'var', jnp.ones, (c,))
    if frozen:
      scale, bias = jax.lax.stop_gradient((scale, bias))
    if frozen or not train:
      factor = scale * jax.lax.rsqrt(var.value + self.epsilon)
      x = conv(x, factor) if conv else x * factor.astype(x.dtype)
      return x + (bias - mean.value * factor).astype(x.dtype)
    x = conv(x) if conv else x
    y = x.astype(jnp.float32)
    m, v = y.mean((0, 1, 2)), y.var((0, 1, 2))
    if not self.is_initializing() and self.is_mutable_collection(
        'batch_stats'):
      n = repeats * x.size // c
      a = self.momentum
      mean.value = (1 - a) * mean.value + a * m
      var.value = (1 - a) * var.value + a * v * (n / max(n - 1, 1))
    y = (y - m) * (jax.lax.rsqrt(v + self.epsilon) * scale) + bias
    return y.astype(x.dtype)


class Conv(nn.Module):
  """A bias-free convolution with torch's symmetric padding, He fan-out."""
  features: int
  kernel: int
  stride: int = 1
  dilation: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, factor=None):
    """x [B, H, W, C], and factors [features] of the kernel's last axis."""
    kernel = self.param(
        'kernel', nn.initializers.variance_scaling(2., 'fan_out', 'normal'),
        (self.kernel, self.kernel, x.shape[-1], self.features))
    if factor is not None:
      kernel = kernel * factor
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.kernel == 1 and place.platform() == 'cpu':
      # Gradients of XLA's convolution take 2 to 7 times as long on a CPU.
      return x[:, ::self.stride, ::self.stride] @ kernel[0, 0]
    pad = self.dilation * (self.kernel - 1) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, [self.stride] * 2, [(pad, pad)] * 2,
        rhs_dilation=[self.dilation] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


class Block(nn.Module):
  """Basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) residual block."""
  features: int
  bottleneck: bool
  stride: int = 1
  dilation: int = 1
  frozen: Any = ()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    out = self.features * (4 if self.bottleneck else 1)
    if self.bottleneck:
      plan = ((self.features, 1, 1, 1),
              (self.features, 3, self.stride, self.dilation), (out, 1, 1, 1))
    else:
      plan = ((out, 3, self.stride, 1), (out, 3, 1, self.dilation))
    y = x
    for i, (features, kernel, stride, dilation) in enumerate(plan, 1):
      if kernel > 1:
        y = layers.hide_padding(y, mask)
      y = BatchNorm(self.frozen, zero_init=i == len(plan), name=f'bn{i}')(
          y, train, conv=Conv(features, kernel, stride, dilation, self.dtype,
                              name=f'conv{i}'))
      if i < len(plan):
        y = jax.nn.relu(y)
    if x.shape[-1] != out or self.stride != 1:
      x = BatchNorm(self.frozen, name='downsample_bn')(
          x, train, conv=Conv(out, 1, self.stride, dtype=self.dtype,
                              name='downsample_conv'))
    return jax.nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet trunk.

  Attributes:
    depth: 18, 34, 50, 101 or 152.
    frozen: groups of `layers.is_frozen`: which parameters the optimizer
      freezes. A frozen BatchNorm keeps its statistics. No gradient is computed
      for a stage whose parameters are all frozen, nor for stages below it.
    dilated: stride 1 and dilation 2 in the last stage (DC5).
    out_stages: which of the stages 1..4 are returned.
    mask_padding: zero the padded cells before every convolution that reads
      them, so that features do not depend on the size of the canvas. Without it
      they do, as in DETR (its issues 63 and 217).
    stem, width: channels of the stem and of layer1's blocks, 64 in every
      published ResNet.
    remat: policy for each block; see `layers.remat`.
  """
  depth: int = 50
  frozen: Any = ()
  dilated: bool = False
  out_stages: tuple[int, ...] = (4,)
  mask_padding: bool = True
  stem: int = 64
  width: int = 64
  remat: str = 'none'
  dtype: Any = jnp.float32

  multiple = 1  # Any canvas, as in DETR.

  @staticmethod
  def layer_patterns(**_):
    """Regexes of the layers' parameters, stem and stages."""
    return ('(conv1|bn1)/.*', *(rf'layer{i}_\d+/.*' for i in range(1, 5)))

  @nn.compact
  def __call__(self, x, train=False, mask=None):
    """Trunk.

    Args:
      x: normalised pixels [B, H, W, 3], zero where padded.
      train: update and use batch statistics where they are not frozen.
      mask: [B, H, W] True on real pixels; None if nothing is padded.

    Returns:
      list of [B, h, w, C] maps.
    """
    if self.depth not in BLOCKS:
      raise errors.UserError(
          f'model.backbone.depth: no ResNet of depth {self.depth}; valid '
          f'choices: {", ".join(map(str, BLOCKS))}')
    mask = mask if self.mask_padding else None
    frozen_stages = self._frozen_stages()
    stop = lambda y, stage: (jax.lax.stop_gradient(y)
                             if stage == frozen_stages - 1 else y)
    x = BatchNorm(self.frozen, name='bn1')(x, train, conv=Conv(
        self.stem, 7, 2, dtype=self.dtype, name='conv1'))
    # After the ReLU, zero padding does not change a maximum.
    x = layers.hide_padding(jax.nn.relu(x), mask)
    x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2)
    x = stop(x, 0)
    block = layers.remat(Block, self.remat, static_argnums=(2,))
    maps = []
    for stage, count in enumerate(BLOCKS[self.depth], 1):
      last_dilated = stage == 4 and self.dilated
      for i in range(count):
        stride = 2 if i == 0 and stage > 1 and not last_dilated else 1
        # torchvision dilates a dilated stage's blocks after the first one.
        dilation = 2 if last_dilated and i > 0 else 1
        x = block(self.width * 2**(stage - 1), BOTTLENECK[self.depth], stride,
                  dilation, self.frozen, self.dtype,
                  name=f'layer{stage}_{i}')(x, train, mask)
      x = stop(x, stage)
      if stage in self.out_stages:
        maps.append(x)
      if stage == max(self.out_stages):
        break
    return maps

  def _frozen_stages(self):
    """Number of leading stages, stem first, with only frozen parameters."""
    norm = lambda name: (f'{name}/scale', f'{name}/bias')
    frozen = lambda names: all(layers.is_frozen(
        self.frozen, '/'.join((*self.path, name))) for name in names)
    if not frozen(('conv1/kernel', *norm('bn1'))):
      return 0
    convs = 3 if BOTTLENECK[self.depth] else 2
    for stage, count in enumerate(BLOCKS[self.depth], 1):
      for i in range(count):
        names = [n for k in range(1, convs + 1)
                 for n in (f'conv{k}/kernel', *norm(f'bn{k}'))]
        if i == 0:
          names += ['downsample_conv/kernel', *norm('downsample_bn')]
        if not frozen(f'layer{stage}_{i}/{n}' for n in names):
          return stage
    return 1 + len(BLOCKS[self.depth])


BACKBONE = ResNet
