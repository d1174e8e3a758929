"""RoBERTa (Liu et al. 2019), layer by layer.

Post-norm, as in BERT. Valid tokens have the positions 2, 3, ..., padding has
position 1. A layer can also attend to an image (models/fusion.py).
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
  ffn_width: int
  dropout: float = .1
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  from_scratch: bool = False

  def setup(self):
    init = fusion.text_init(self.from_scratch)
    self.self_attention = layers.MultiHeadAttention(
        self.width, self.heads, self.dropout, self.dtype, init)
    self.cross = fusion.TextFromImage(self.width, self.heads, self.dropout,
                                      self.dtype, self.from_scratch)
    self.ffn = layers.FeedForward(self.width, self.ffn_width, act='gelu',
                                  dtype=self.dtype, kernel_init=init)
    self.norm1 = layers.LayerNorm(self.epsilon)
    self.norm2 = layers.LayerNorm(self.epsilon)
    self.drop = layers.Dropout(self.dropout)

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
    drop = lambda y: self.drop(y, train)
    y = drop(self.self_attention(x, x, x, bias, train))
    if image is not None:
      y = y + self.cross(x=y, image=image, train=train)
    x = self.norm1(x + y)
    x = x + drop(self.ffn(x))
    # Always create the norm, so that all views have the same parameters.
    normed = self.norm2(x)
    return normed if last_norm else x

  def step(self, x, position, cache, image=None):
    """Decodes one more token, without dropout.

    Args:
      x: [B, 1, D].
      position: [B] position of the token.
      cache: KeysValues of the tokens before it.
      image: KeysValues from `cross.keys_values`, or None.

    Returns:
      ([B, 1, D], cache).
    """
    cache, bias = layers.extend(
        cache, self.self_attention.keys_values(x, x), position)
    y = self.self_attention.attend(x, cache, bias)
    if image is not None:
      y = y + self.cross.attend(y, image)
    x = self.norm1(x + y)
    return self.norm2(x + self.ffn(x)), cache

  def project_image(self, image):
    """[B, N, C] -> KeysValues of the cross-attention, for `step`."""
    return self.cross.keys_values(image)


class TextEncoder(nn.Module):
  """The trunk: `embed`, then layers one at a time.

  Attributes:
    positions: rows of the position table, two more than the longest text.
    types: rows of the token-type table; all tokens have type 0.
    from_scratch: initial weights by fan-in instead of 0.02, gates open (ours).
    remat: policy for each layer; see `layers.remat`.
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
  from_scratch: bool = False
  remat: str = 'none'
  dtype: Any = jnp.float32

  def setup(self):
    layer = layers.remat(Layer, self.remat, static_argnums=(4, 5))
    self.embedding = layers.TextEmbedding(
        self.vocab_size, self.width, self.positions, self.types, self.dropout,
        self.epsilon, self.dtype)
    self.layers = [layer(self.width, self.heads, self.ffn, self.dropout,
                         self.epsilon, self.dtype, self.from_scratch)
                   for _ in range(self.depth)]

  @property
  def longest(self):
    """Maximum number of tokens of a text."""
    return self.positions - _FIRST_POSITION

  def embed(self, ids, mask, train=False):
    """[B, L] ids, [B, L] True on tokens -> [B, L, D].

    Raises:
      UserError: more tokens than positions.
    """
    if ids.shape[-1] > self.longest:
      raise errors.UserError(
          f'data.max_text: {ids.shape[-1]} tokens, but model.roberta.positions='
          f'{self.positions} hold {self.longest}; lower data.max_text')
    positions = jnp.where(mask, jnp.cumsum(mask, -1) + _FIRST_POSITION - 1,
                          _FIRST_POSITION - 1)
    return self.embedding(ids, train, positions)

  def embed_one(self, ids, position):
    """[B] ids of the position-th valid tokens (0, 1, ...) -> [B, 1, D]."""
    return self.embedding(ids[:, None], False,
                          position[:, None] + _FIRST_POSITION)

  def layer(self, i, x, bias, image=None, train=False, last_norm=True):
    """Layer i; see Layer."""
    return self.layers[i](x, bias, image, train, last_norm)

  def run(self, x, bias, start, stop, train=False):
    """Layers start .. stop - 1 without image."""
    for i in range(start, stop):
      x = self.layer(i, x, bias, train=train)
    return x
