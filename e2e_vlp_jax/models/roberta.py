"""RoBERTa (Liu et al. 2019), layer by layer.

Post-norm as BERT; positions count the valid tokens from 2 on, padding has
position 1. A layer can read an image too (models/fusion.py).
"""
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import fusion
from e2e_vlp_jax.models import layers

_FIRST_POSITION = 2  # fairseq's padding index plus 1


class Layer(nn.Module):
  """Self-attention, optionally gated cross-attention, feed-forward."""
  width: int
  heads: int
  ffn: int
  dropout: float = .1
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  scratch: bool = False

  @nn.compact
  def __call__(self, x, bias, image=None, train=False, last_norm=True):
    """One layer.

    Args:
      x: [B, L, D].
      bias: broadcasts to [B, H, L, L].
      image: [B, N, C] tokens to attend to as well, or None.
      train: dropout on.
      last_norm: False leaves out the LayerNorm after the feed-forward.

    Returns:
      [B, L, D].
    """
    drop = nn.Dropout(self.dropout, deterministic=not train)
    norm = lambda name: layers.LayerNorm(self.epsilon, name=name)
    attend = layers.MultiHeadAttention(
        self.width, self.heads, self.dropout, self.dtype,
        fusion.text_init(self.scratch), name='self_attention')
    feed = layers.FeedForward(
        self.width, self.ffn, act='gelu', dtype=self.dtype,
        kernel_init=fusion.text_init(self.scratch), name='ffn')
    y = drop(attend(x, x, x, bias, train))
    if image is not None:
      y = y + fusion.TextFromImage(
          self.heads, self.dropout, self.dtype, self.scratch, name='cross')(y, image, train)
    x = norm('norm1')(x + y)
    x = x + drop(feed(x))
    # The norm exists in any case: the last layer has it in other views.
    normed = norm('norm2')(x)
    return normed if last_norm else x


class TextEncoder(nn.Module):
  """The trunk: `embed`, then layers one at a time.

  Attributes:
    positions: rows of the position table, two more than the longest text.
    types: rows of the token-type table; texts are of type 0 throughout.
    scratch: initial weights by fan-in instead of 0.02, gates open (ours).
    remat: of each layer; see `layers.remat`.
  """
  vocab_size: int
  depth: int
  width: int
  heads: int
  ffn: int
  positions: int = 514
  types: int = 1
  dropout: float = .1
  epsilon: float = 1e-5
  scratch: bool = False
  remat: str = 'none'
  dtype: Any = jnp.float32

  def setup(self):
    layer = layers.remat(Layer, self.remat, static_argnums=(4, 5))
    self.embedding = layers.TextEmbedding(
        self.vocab_size, self.width, self.positions, self.types, self.dropout,
        self.epsilon, self.dtype)
    self.layers = [layer(self.width, self.heads, self.ffn, self.dropout,
                         self.epsilon, self.dtype, self.scratch)
                   for _ in range(self.depth)]

  def embed(self, ids, mask, train=False):
    """[B, L] ids, [B, L] True on tokens -> [B, L, D].

    Raises:
      UserError: more tokens than positions.
    """
    longest = self.positions - _FIRST_POSITION
    if ids.shape[-1] > longest:
      raise errors.UserError(
          f'data.max_text: {ids.shape[-1]} tokens, but model.text.positions='
          f'{self.positions} hold {longest}; lower data.max_text')
    positions = jnp.where(mask, jnp.cumsum(mask, -1) + _FIRST_POSITION - 1,
                          _FIRST_POSITION - 1)
    return self.embedding(ids, train, positions)

  def layer(self, i, x, bias, image=None, train=False, last_norm=True):
    """Layer i; see Layer."""
    return self.layers[i](x, bias, image, train, last_norm)

  def run(self, x, bias, start, stop, train=False):
    """Layers start .. stop - 1 without image."""
    for i in range(start, stop):
      x = self.layer(i, x, bias, train=train)
    return x
