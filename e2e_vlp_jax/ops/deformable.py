"""Modulated deformable convolution (DCNv2; Zhu et al., CVPR 2019).

Every tap of a 3x3 convolution reads the image at a place of its own, which the
network predicts, and is multiplied by a weight of its own. Here the taps of all
places are gathered together, corner by corner of the bilinear interpolation,
and one product with the kernel follows. All of it is in float32, as fractions
of a pixel matter.
"""
import jax
import jax.numpy as jnp
import numpy as np

TAPS = 9
_SIDE = 3


@jax.named_scope('deformable')  # `profiling.by_module` looks for it.
def convolve(x, kernel, offset, mask, stride=1):
  """A 3x3 deformable convolution with padding 1.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, C'].
    offset: [B, h, w, 9, 2] (dy, dx) of each tap, in pixels of x, in the order
      of the kernel's rows and columns.
    mask: [B, h, w, 9] weight of each tap.
    stride: pixels of x between outputs.

  Returns:
    [B, h, w, C'] float32. x is zero outside its edges.
  """
  b, h, w = offset.shape[:3]
  rows, columns = np.mgrid[:h, :w] * stride - 1
  tap = np.stack(np.mgrid[:_SIDE, :_SIDE], -1).reshape(TAPS, 2)
  start = np.stack([rows, columns], -1)[:, :, None] + tap  # [h, w, 9, 2]
  place = offset.astype(jnp.float32) + start
  taps = _sample(x.astype(jnp.float32), place.reshape(b, -1, 2),
                 mask.astype(jnp.float32).reshape(b, -1))
  return taps.reshape(b, h, w, -1) @ kernel.astype(jnp.float32).reshape(
      -1, kernel.shape[-1])


@jax.checkpoint
def _sample(image, place, weight):
  """Bilinear samples of an image, zero outside, times `weight`.

  What was gathered is not kept for the backward pass, but gathered again: it is
  nine times as large as the image.

  Args:
    image: [B, H, W, C].
    place: [B, N, 2] (y, x) in pixels.
    weight: [B, N].

  Returns:
    [B, N, C].
  """
  b, h, w, c = image.shape
  flat = image.reshape(b, h * w, c)
  low = jnp.floor(place)
  part = place - low
  low = low.astype(jnp.int32)
  out = 0.
  for down in (0, 1):
    for right in (0, 1):
      row, column = low[..., 0] + down, low[..., 1] + right
      inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
      y, x = part[..., 0], part[..., 1]
      share = (y if down else 1 - y) * (x if right else 1 - x)
      index = jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)
      corner = jax.vmap(lambda rows, i: rows.at[i].get(
          mode='promise_in_bounds'))(flat, index)
      out = out + corner * jnp.where(inside, share * weight, 0.)[..., None]
  return out


def read_flat(maps, size):
  """Maps [B, H, W, K] read as if they were h x w, as the released DyHead does.

  In that code a deformable convolution of a coarser level gets the offsets of
  the finer one. Its kernel does not check their size: the K x H x W values of
  an image are taken as K x h x w, from the first value on. Published weights
  were trained this way.

  Args:
    maps: [B, H, W, K].
    size: (h, w), at most (H, W).

  Returns:
    [B, h, w, K].
  """
  b, k = maps.shape[0], maps.shape[-1]
  h, w = size
  flat = maps.transpose(0, 3, 1, 2).reshape(b, -1)[:, :k * h * w]
  return flat.reshape(b, k, h, w).transpose(0, 2, 3, 1)


def resize(x, size):
  """Bilinear resizing of [B, H, W, C] whose corners stay at the corners.

  (torch's align_corners=True; jax.image.resize has the other form.)
  """
  if x.shape[1:3] == tuple(size):
    return x
  rows, columns = (jnp.asarray(_weights(a, b), x.dtype)
                   for a, b in zip(x.shape[1:3], size))
  return jnp.einsum('ij,kl,bjlc->bikc', rows, columns, x)


def _weights(old, new):
  """[new, old] weights of linear interpolation, corners aligned."""
  at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.)
  low = np.minimum(np.floor(at).astype(int), old - 1)
  out = np.zeros((new, old))
  np.add.at(out, (np.arange(new), low), 1 - (at - low))
  np.add.at(out, (np.arange(new), np.minimum(low + 1, old - 1)), at - low)
  return out
