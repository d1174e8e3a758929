"""FIBER's trunk: Swin and RoBERTa, fused in their top pairs of layers.

Dou et al., NeurIPS 2022. The last `fused_layers` blocks of Swin and layers of
RoBERTa form pairs with gated cross-attention (models/fusion.py). The trunk runs
in two parts: the blocks and layers below the first pair, which need only one
modality, and the pairs, with or without cross-attention. The coarse stage
(fiber.py) builds on it, and the fine one (fiber_fine.py), which also needs the
output of every stage of Swin (`stages`).
"""
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.models import fusion
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import roberta
from e2e_vlp_jax.models import swin as swin_lib

INIT = fusion.TEXT_INIT  # initialisation of what FIBER adds to the trunks


class Trunk(contract.BaseModel):
  """The two trunks, as attributes `swin` and `text`; see the module."""

  def setup_trunk(self):
    """Makes the modules; a model calls it first in its `setup`."""
    c = self.config
    self.swin = swin_lib.Swin(**c.swin, remat=c.remat, dtype=self.dtype)
    self.text = roberta.TextEncoder(
        self.vocab_size, **c.roberta, remat=c.remat, dtype=self.dtype)
    longest = min(sum(c.swin.depths), c.roberta.depth)
    if not 0 < c.fused_layers <= longest:
      raise errors.UserError(
          f'model.fused_layers: {c.fused_layers}; expected 1 to {longest}, '
          'the number of blocks of the shorter trunk')

  @property
  def first_block(self):
    """Number of Swin's first block with cross-attention."""
    return sum(self.config.swin.depths) - self.config.fused_layers

  @property
  def frozen_blocks(self):
    """How many of Swin's first blocks `optim.groups` freeze."""
    blocks = [f'swin/blocks_{s}_{k}/norm1/norm/scale'
              for s, n in enumerate(self.config.swin.depths)
              for k in range(n)]
    return next((i for i, path in enumerate(blocks)
                 if not layers.is_frozen(self.frozen, path)), len(blocks))

  @property
  def first_layer(self):
    """Number of RoBERTa's first layer with cross-attention."""
    return self.config.roberta.depth - self.config.fused_layers

  def lower_image(self, image, image_mask, train=False, stages=None):
    """Pixels -> tokens below the first pair.

    Args:
      image: [B, H, W, 3] uint8, padded bottom and right.
      image_mask: [B, H, W] True on real pixels.
      train: stochastic depth.
      stages: see `Swin.run`.

    Returns:
      [B, h, w, C]. Padding has the mean colour and is attended to, since Swin
      has no mask; FIBER resizes to squares, which need no padding.
    """
    x = self.swin.embed(self.pixels(image, image_mask))
    frozen = min(self.frozen_blocks, self.first_block)
    if frozen:  # They are in evaluation mode and get no gradient.
      x = jax.lax.stop_gradient(self.swin.run(x, 0, frozen, False, stages))
      if stages:
        stages[:] = jax.lax.stop_gradient(stages)
    return self.swin.run(x, frozen, self.first_block, train, stages)

  def pixels(self, image, image_mask):
    """[B, H, W, 3] uint8 -> normalised, zero on padding."""
    c = self.config
    return layers.normalise(image, image_mask, c.image_mean, c.image_std,
                            self.dtype)

  def lower_text(self, ids, mask, train=False):
    """[B, L] ids and mask -> states below the first pair [B, L, D]."""
    return self.text.run(self.text.embed(ids, mask, train), key_bias(mask), 0,
                         self.first_layer, train)

  def upper_image(self, x, train=False, stages=None):
    """Upper blocks without text: [B, h, w, C] -> [B, N, C'], no last norm."""
    return flatten(self.swin.run(x, self.first_block, self.swin.depth, train,
                                 stages))

  def upper_text(self, x, mask, train=False):
    """Upper layers without image: [B, L, D], [B, L] -> [B, L, D]."""
    return self.text.run(x, key_bias(mask), self.first_layer, self.text.depth,
                         train)

  def fused_pairs(self, image, text, mask, train=False, stages=None,
                  last_norm=False):
    """The pairs of layers, with cross-attention.

    Args:
      image: [B, h, w, C] of `lower_image`, an image for each text.
      text: [B, L, D] of `lower_text`.
      mask: [B, L].
      train: dropout and stochastic depth.
      stages: see `Swin.run`.
      last_norm: whether the text's last LayerNorm is applied, as in the fine
        stage; the coarse one leaves it out.

    Returns:
      (text [B, L, D], image [B, h', w', C']). Swin's last LayerNorm is not
      applied, as in the original.
    """
    bias = key_bias(mask)
    for k in range(self.config.fused_layers, 0, -1):
      i, j = self.swin.depth - k, self.text.depth - k
      image = self.swin.enter(i, image)
      before = flatten(image)  # Both attend to the tokens before the pair.
      image = self.swin.block(i, image, text, bias, train)
      text = self.text.layer(j, text, bias, before, train,
                             last_norm or k > 1)
      if stages is not None and self.swin.ends_stage(i):
        stages.append(image)
    return text, image


def key_bias(mask):
  """[B, L] True on tokens -> [B, 1, 1, L]."""
  return layers.mask_bias(mask)[:, None, None]


def flatten(x):
  """[B, h, w, C] -> [B, N, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def for_each(x, p):
  """[B, ...] -> [B, P, ...], the same for each of P texts."""
  return jnp.broadcast_to(x[:, None], (x.shape[0], p, *x.shape[1:]))
