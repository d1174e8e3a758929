"""From a trunk's features to visual tokens (SOHO).

The order of the released code: max-pool, 1x1 convolution, BatchNorm, codes of
the visual dictionary, a learned mixture of features and codes; then the mask
of masked visual modelling, positions and LayerNorm. Without a dictionary it is
the neck of the released VQA fine-tuning.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.models import visual_dictionary

MIXTURES = ('gate', 'add')


def grid_mask(mask, height, width, square=False):
  """Mask of the grid cells that lie on the image.

  Args:
    mask: [B, H, W] mask of the pixels.
    height, width: size of the grid.
    square: reproduce the released code, which uses the padded height also as
      the padded width: the right columns of a portrait image are hidden, and
      padding at the right of a landscape image is not.

  Returns:
    [B, height, width] bool.
  """
  if not square:
    return layers.downsample_mask(mask, height, width)
  side, right = mask.shape[1:]
  rows, columns = ((np.arange(n) * side) // n for n in (height, width))
  wide = jnp.pad(mask, ((0, 0), (0, 0), (0, max(side - right, 0))))
  return wide[:, rows][:, :, columns]


def same_code_mask(codes, mask, cell, keep):
  """Cells that masked visual modelling hides: all with the chosen cell's code.

  A neighbour with the same code would reveal it (section 3.3).

  Args:
    codes: [..., N] index of each cell's code in the dictionary.
    mask: [..., N] True where a cell is valid.
    cell: [...] the chosen cell; if it is padding, nothing is hidden.
    keep: [...] bool, False = hide nothing.

  Returns:
    [..., N] bool.
  """
  at = lambda x: jnp.take_along_axis(x, cell[..., None], -1)
  return (codes == at(codes)) & at(mask) & mask & keep[..., None]


class Neck(nn.Module):
  """Features -> visual tokens.

  Attributes:
    width: D of the tokens.
    dictionary: fields of `VisualDictionary`, size 0 = none, and
      count_padding: whether padded cells update the codes (released code).
    pool: side of the max-pool; odd rows and columns at the end are dropped.
    mix: 'gate': two weights per cell from a softmax; 'add': the sum.
    begin_align, pos_align: a dense layer before and after the look-up.
    norm: BatchNorm after a convolution without bias; else one with bias.
    act: 'none' or an activation after the convolution.
    square_mask: see `grid_mask`.
    frozen: groups of `layers.is_frozen`.
  """
  width: int
  dictionary: Any
  pool: int = 2
  mix: str = 'gate'
  begin_align: bool = False
  pos_align: bool = True
  norm: bool = True
  act: str = 'none'
  square_mask: bool = False
  frozen: Any = ()
  dtype: Any = jnp.float32

  def setup(self):
    if self.mix not in MIXTURES:
      raise errors.UserError(f'model.neck.mix: no mixture {self.mix!r}'
                             + errors.nearest(self.mix, MIXTURES))
    he = nn.initializers.variance_scaling(2., 'fan_out', 'normal')
    torch = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    project = lambda n: nn.Dense(n, not self.norm, dtype=self.dtype,
                                 kernel_init=he)
    align = lambda: nn.Dense(self.width, dtype=self.dtype, kernel_init=torch)
    self.conv = project(self.width)
    if self.norm:
      self.conv_norm = resnet.BatchNorm(self.frozen)
    self.token_norm = layers.LayerNorm(1e-5)
    options = dict(self.dictionary)
    self.count_padding = options.pop('count_padding')
    if not options['size']:
      return
    # Named 'words' in checkpoints.
    self.words = visual_dictionary.VisualDictionary(width=self.width,
                                                    **options)
    self.mask_token = self.param('mask_token', nn.initializers.normal(1.),
                                 (1, self.width))
    if self.begin_align:
      self.begin = align()
    if self.pos_align:
      self.after = align()
    if self.mix == 'gate':
      self.gate = project(2)
      if self.norm:
        self.gate_norm = resnet.BatchNorm(self.frozen)

  def __call__(self, features, image_mask, repeats=1, train=False):
    """Computes cells, before masking and before positions are added.

    Args:
      features: [B, h, w, C].
      image_mask: [B, H, W] of the pixels.
      repeats: in training, each image counts this many times in the
        dictionary and in BatchNorm's unbiased variance, because the released
        code repeats it for each of its texts before the neck.
      train: batch statistics; the dictionary is updated.

    Returns:
      dict: cells [B, N, D], pos [B, N, D], mask [B, N] and, with a
      dictionary, codes [B, N].
    """
    side = self.pool
    x = nn.max_pool(features, (side, side), (side, side))
    b, h, w, _ = x.shape
    x = self.conv(x)
    if self.norm:
      x = self.conv_norm(x, train, repeats)
    x = self._activate(x)
    mask = grid_mask(image_mask, h, w, self.square_mask)
    flat = lambda y: y.reshape(b, h * w, *y.shape[3:])
    out = {'mask': flat(mask),
           'pos': flat(layers.sine_position_2d(mask, self.width))}
    if self.dictionary['size']:
      weight = jnp.full(mask.shape, float(repeats))
      if not self.count_padding:
        weight = weight * mask
      quantised, codes = self.words(
          self.begin(x) if self.begin_align else x, weight, train)
      quantised = quantised.astype(self.dtype)
      if self.pos_align:
        quantised = self.after(quantised)
      x = self._mixed(quantised, x, repeats, train)
      out['codes'] = flat(codes)
    return {**out, 'cells': flat(x)}

  def _mixed(self, quantised, x, repeats, train):
    if self.mix == 'add':
      return quantised + x
    score = self.gate(jnp.concatenate([quantised, x], -1))
    if self.norm:
      score = self.gate_norm(score, train, repeats)
    score = jax.nn.softmax(self._activate(score).astype(jnp.float32)).astype(
        x.dtype)
    return score[..., :1] * quantised + score[..., 1:] * x

  def _activate(self, x):
    return x if self.act == 'none' else layers.activation(self.act)(x)

  def tokens(self, cells, pos, hidden=None):
    """[..., N, D] cells, `hidden` [..., N] ones masked -> visual tokens."""
    if hidden is not None:
      cells = jnp.where(hidden[..., None], self.mask_token.astype(cells.dtype),
                        cells)
    return self.token_norm(cells.astype(jnp.float32) + pos).astype(self.dtype)
