"""Swin Transformer (Liu et al., ICCV 2021), block by block.

Fusion with a text happens between blocks, so the trunk is a list of blocks
that are called one at a time: `embed`, then for i in range(depth):
`enter(i)`, `block(i)`. It is numerically equal to the public code and timm's
swin_*: qkv in one layer, relative positions as a table with one value per head
and offset, shifted windows with a mask.

As there, an image is refused if the window does not divide its grid, and a
window larger than a grid shrinks to it and is not shifted. With `pad`, as in
detectors, a grid of any size is padded to whole windows instead, and windows
neither shrink nor stay unshifted.
"""
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import fusion
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.ops import attention

_PATCH_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
_OTHER_REGION = -100.  # added to the logits between regions of a window


def relative_index(window):
  """[n, n] table row for each pair of the n tokens of a window."""
  h, w = window
  y, x = np.mgrid[:h, :w].reshape(2, -1)
  return ((y[:, None] - y + h - 1) * (2 * w - 1) + x[:, None] - x + w - 1)


def partition(x, window):
  """[B, H, W, C] -> [B, windows, tokens of a window, C], row by row."""
  b, h, w, c = x.shape
  r, s = window
  x = x.reshape(b, h // r, r, w // s, s, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, -1, r * s, c)


def unpartition(x, window, grid):
  """The inverse of `partition` for a grid (H, W)."""
  (r, s), (h, w) = window, grid
  x = x.reshape(x.shape[0], h // r, w // s, r, s, -1)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], h, w, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def roll(x, shift):
  """x [B, H, W, C] moved cyclically by `shift` rows and columns.

  As jnp.roll, but in one step: four quarters change places.
  """
  (_, h, w, _), (r, c) = x.shape, shift
  r, c = h - r % h, w - c % w
  return jnp.concatenate(
      [jnp.concatenate([rows[:, :, c:], rows[:, :, :c]], 2)
       for rows in (x[:, r:], x[:, :r])], 1)


roll.defvjp(lambda x, shift: (roll(x, shift), None),
            lambda shift, _, y: (roll(y, (-shift[0], -shift[1])),))


def shift_bias(grid, window, shift):
  """[windows, 1, n, n]: 0 within a region of the shifted grid, else -100.

  After the cyclic shift a window at the edge holds tokens from opposite
  sides of the image, which must not attend to each other.
  """
  def region(size, r, s):  # 0 | 1 | 2 along one axis
    i = np.arange(size)
    return (i >= size - r).astype(int) + (i >= size - s)
  rows, cols = (region(*a) for a in zip(grid, window, shift))
  ids = partition((3 * rows[:, None] + cols)[None, ..., None], window)[0, ...,
                                                                      0]
  same = ids[:, :, None] == ids[:, None, :]
  return np.where(same, 0., _OTHER_REGION).astype(np.float32)[:, None]


def _cubic(x, a=-.75):
  """Keys' cubic convolution kernel with torch's coefficient."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((x - 5) * x + 8) * a * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.))


def _resize_matrix(old, new):
  """[new, old] weights of torch's bicubic interpolation along one axis.

  Half-pixel centres, no antialiasing, edges repeated. `jax.image.resize` uses
  another coefficient (-0.5).
  """
  at = (np.arange(new) + .5) * old / new - .5
  first = np.floor(at).astype(int) - 1
  out = np.zeros((new, old))
  for k in range(4):
    np.add.at(out, (np.arange(new), np.clip(first + k, 0, old - 1)),
              _cubic(at - first - k))
  return out


def resize_relative_bias(table, rows):
  """A relative position table for windows of another size.

  Args:
    table: [(2a-1)^2, H] of windows a x a.
    rows: (2b-1)^2 of the new windows.

  Returns:
    [rows, H] float32 numpy array, as FIBER's code resizes it at loading.
  """
  table = np.asarray(table, np.float64)
  old, new = (int(round(n**.5)) for n in (table.shape[0], rows))
  if old**2 != table.shape[0] or new**2 != rows:
    raise errors.UserError(
        f'relative positions: tables of {table.shape[0]} and {rows} rows; '
        'only tables of square windows can be resized')
  m = _resize_matrix(old, new)
  out = np.einsum('ij,kl,jlh->ikh', m, m, table.reshape(old, old, -1))
  return out.reshape(rows, -1).astype(np.float32)


class WindowAttention(nn.Module):
  """Self-attention within windows."""
  heads: int
  dtype: Any = jnp.float32
  from_scratch: bool = False

  @nn.compact
  def __call__(self, x, window, bias=None):
    """[B, windows, n, C], (rows, columns), bias to [windows, H, n, n] -> x."""
    c = x.shape[-1]
    layers.check_heads(self.heads, c, self.path)
    dense = functools.partial(nn.Dense, dtype=self.dtype,
                              kernel_init=fusion.image_init(self.from_scratch))
    qkv = dense(3 * c, name='qkv')
    rows = np.prod([2 * r - 1 for r in window])
    table = self.param('relative_bias', fusion.IMAGE_INIT,
                       (rows, self.heads))
    position = jnp.moveaxis(table[relative_index(window)], -1, 0)
    position = position.astype(layers.wide(x))
    if attention.projects(x.shape, self.dtype, self.heads, bias):
      weights = {k: w.astype(self.dtype)
                 for k, w in self.variables['params']['qkv'].items()}
      y = attention.projected(x.astype(self.dtype), weights['kernel'],
                              weights['bias'], self.heads, bias, position)
    else:
      split = lambda y: y.reshape(*y.shape[:-1], self.heads, c // self.heads)
      q, k, v = map(split, jnp.split(qkv(x), 3, -1))
      y = attention.attention(q, k, v, bias, position).reshape(x.shape)
    return dense(c, name='out')(y)


class Block(nn.Module):
  """(Shifted-)window attention and feed-forward, both pre-norm.

  Attributes:
    window: side of the square windows.
    shift: rows and columns of the cyclic shift; 0 = none.
    drop_path: probability of dropping a residual branch of a sample.
    pad: see `Swin`.
    query_norm: see `fusion.ImageFromText`.
  """
  heads: int
  window: int
  shift: int = 0
  mlp_ratio: float = 4.
  drop_path: float = 0.
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  from_scratch: bool = False
  pad: bool = False
  query_norm: bool = True

  @nn.compact
  def __call__(self, x, text=None, text_bias=None, train=False):
    """One block.

    Args:
      x: [B, H, W, C].
      text: [B, L, D] tokens to attend to as well, or None.
      text_bias: broadcasts to [B, heads, HW, L].
      train: stochastic depth; drops the cross-attention with its branch.

    Returns:
      [B, H, W, C].

    Raises:
      UserError: the window does not divide the grid.
    """
    c = x.shape[-1]
    size, (grid, side, shift) = x.shape[1:3], self._windows(x.shape[1:3])
    window = side, side
    drop = lambda y: layers.Dropout(self.drop_path, rows=True)(y, train)
    norm = lambda name: layers.LayerNorm(self.epsilon, name=name)
    y = norm('norm1')(x)
    if grid != size:
      y = jnp.pad(y, ((0, 0), *((0, a - b) for a, b in zip(grid, size)),
                      (0, 0)))
    bias = None
    if shift:
      y = roll(y, (-shift, -shift))
      bias = shift_bias(grid, window, (shift, shift))
    y = WindowAttention(
        self.heads, self.dtype, self.from_scratch, name='attention')(
            partition(y, window), window, bias)
    if text is not None:
      # Every window attends to the whole text, so windows can be merged.
      cross = fusion.ImageFromText(self.heads, self.epsilon, self.dtype,
                                   self.from_scratch, self.query_norm,
                                   name='cross')
      tokens = y.reshape(y.shape[0], -1, c)
      y = (tokens + cross(tokens, text, text_bias)).reshape(y.shape)
    y = unpartition(y, window, grid)
    if shift:
      y = roll(y, (shift, shift))
    x = x + drop(y[:, :size[0], :size[1]])
    feed = layers.FeedForward(c, int(c * self.mlp_ratio), act='gelu',
                              dtype=self.dtype, name='ffn',
                              kernel_init=fusion.image_init(self.from_scratch))
    return x + drop(feed(norm('norm2')(x)))

  def _windows(self, size):
    """(H, W) of a grid -> (H, W) of whole windows, their side, their shift."""
    if self.pad:
      return (tuple(-(-n // self.window) * self.window for n in size),
              self.window, self.shift)
    side = min(self.window, *size)
    if size[0] % side or size[1] % side:
      raise errors.UserError(
          f'model.swin.window: {self.window} does not divide a grid of '
          f'{size[0]}x{size[1]} tokens; choose data.buckets that are '
          'multiples of patch * window * 2**(stages - 1) pixels')
    return size, side, self.shift if min(size) > self.window else 0


class Merge(nn.Module):
  """Patch merging: 2x2 tokens become one of twice the width."""
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  from_scratch: bool = False

  @nn.compact
  def __call__(self, x):
    """[B, H, W, C] -> [B, H/2, W/2, 2C]."""
    if x.shape[1] % 2 or x.shape[2] % 2:
      raise errors.UserError(
          f'data.buckets: a grid of {x.shape[1]}x{x.shape[2]} tokens cannot '
          'be halved; choose multiples of patch * 2**(stages - 1) pixels, and '
          'without model.swin.pad of the window, too')
    x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)],
                        -1)
    x = layers.LayerNorm(self.epsilon, name='norm')(x)
    return nn.Dense(x.shape[-1] // 2, use_bias=False, dtype=self.dtype,
                    kernel_init=fusion.image_init(self.from_scratch),
                    name='reduce')(x)


def layer_patterns(depths):
  """Regexes of the parameters of Swin's layers: the patches, then each block.

  Merging patches belongs to the block after it, the last norm to the last one.
  """
  found = ['(patch_embed|patch_norm)/.*']
  for stage, depth in enumerate(depths):
    for k in range(depth):
      names = [f'blocks_{stage}_{k}']
      if stage and not k:
        names.append(f'merges_{stage - 1}')
      if stage == len(depths) - 1 and k == depth - 1:
        names.append('norm')
      found.append(f'({"|".join(names)})/.*')
  return found


class Swin(nn.Module):
  """The trunk.

  Attributes:
    depths, heads: blocks and heads of each stage.
    width: channels of the first stage; doubled with each stage.
    window: side of the windows; odd blocks of a stage shift by half of it.
    patch: pixels per token along each axis.
    drop_path: rate of the last block; rises linearly from 0 at the first.
    from_scratch: initial weights by fan-in instead of 0.02, gates open (ours).
    pad: whether grids of any size are padded to whole windows, by zeros after
      the norm, which are attended to.
    fusion: variant of the cross-attention, see `fusion.VARIANTS`.
    remat: policy for each block; see `layers.remat`.
  """
  depths: Sequence[int]
  heads: Sequence[int]
  width: int = 128
  window: int = 12
  patch: int = 4
  mlp_ratio: float = 4.
  drop_path: float = 0.
  epsilon: float = 1e-5
  from_scratch: bool = False
  pad: bool = False
  fusion: str = 'v3'
  remat: str = 'none'
  dtype: Any = jnp.float32

  def setup(self):
    if self.fusion not in fusion.VARIANTS:
      raise errors.UserError(f'model.swin.fusion: {self.fusion!r}'
                             + errors.nearest(self.fusion, fusion.VARIANTS))
    if len(self.heads) != len(self.depths):
      raise errors.UserError(
          f'model.swin.heads: {tuple(self.heads)} for model.swin.depths '
          f'{tuple(self.depths)}; expected as many, one a stage')
    self.patch_embed = nn.Conv(
        self.width, (self.patch,) * 2, (self.patch,) * 2, 'VALID',
        dtype=self.dtype, kernel_init=_PATCH_INIT)
    self.patch_norm = layers.LayerNorm(self.epsilon)
    rates = np.linspace(0, self.drop_path, self.depth)
    block = layers.remat(Block, self.remat, static_argnums=(4,))
    self.blocks = [[
        block(self.heads[s], self.window, self.window // 2 * (k % 2),
              self.mlp_ratio, float(rates[self.first(s) + k]), self.epsilon,
              self.dtype, self.from_scratch, self.pad, self.fusion == 'v3')
        for k in range(depth)] for s, depth in enumerate(self.depths)]
    self.merges = [Merge(self.epsilon, self.dtype, self.from_scratch)
                   for _ in self.depths[1:]]
    self.norm = layers.LayerNorm(self.epsilon)

  @property
  def depth(self):
    """Number of blocks."""
    return sum(self.depths)

  def first(self, stage):
    """Number of a stage's first block."""
    return sum(self.depths[:stage])

  def stage(self, i):
    """Stage of block i."""
    return next(s for s in range(len(self.depths))
                if i < self.first(s + 1))

  def width_at(self, i):
    """Width of the tokens that block i reads."""
    return self.width * 2**self.stage(i)

  def ends_stage(self, i):
    """Whether block i is the last one of its stage."""
    return i + 1 == self.first(self.stage(i) + 1)

  def embed(self, pixels):
    """[B, H, W, 3] normalised pixels -> tokens [B, h, w, width]."""
    if pixels.shape[1] % self.patch or pixels.shape[2] % self.patch:
      raise errors.UserError(
          f'data.buckets: {pixels.shape[1]}x{pixels.shape[2]} pixels are no '
          f'multiple of model.swin.patch, {self.patch}')
    return self.patch_norm(self.patch_embed(pixels))

  def enter(self, i, x):
    """Prepares tokens for block i: merges patches if a stage begins there."""
    s = self.stage(i)
    return self.merges[s - 1](x) if s and i == self.first(s) else x

  def block(self, i, x, text=None, text_bias=None, train=False):
    """Block i, with cross-attention if there is a text; see Block."""
    s = self.stage(i)
    return self.blocks[s][i - self.first(s)](x, text, text_bias, train)

  def run(self, x, start, stop, train=False, stages=None):
    """Blocks start .. stop - 1 without text.

    Args:
      x: tokens that block `start` reads, before `enter`.
      start, stop: blocks.
      train: stochastic depth.
      stages: a list, to which the output of each stage is appended.
    """
    for i in range(start, stop):
      x = self.block(i, self.enter(i, x), train=train)
      if stages is not None and self.ends_stage(i):
        stages.append(x)
    return x
