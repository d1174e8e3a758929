"""Gated cross-attention inside two trunks (FIBER, Dou et al., NeurIPS 2022).

The last layers of an image and of a text trunk are paired. Each layer of a
pair attends to the other trunk's tokens as they were before the pair, and
adds the result, times a learned gate, to the output of its self-attention.
The gates start at 0, so the trunks initially compute the same as alone.
"""
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from e2e_vlp_jax.models import layers

# FIBER was published in two variants: v3, the coarse stage's and RefCOCO's, and
# v2, that of the other fine-grained checkpoints, without the query's norm.
VARIANTS = ('v2', 'v3')
# Swin's and BERT's initialisations, which FIBER's new weights share. The third
# one is for narrow trunks that train from scratch. Their gates start open, as
# there are no pre-trained features to protect, but the text's only by .1: no
# norm bounds Swin's stream, whose values grow to 8 times the text's own and
# would drown it.
IMAGE_INIT = nn.initializers.truncated_normal(.02, lower=-100, upper=100)
TEXT_INIT = nn.initializers.normal(.02)
_FROM_SCRATCH_INIT = nn.initializers.lecun_normal()


def image_init(from_scratch):
  return _FROM_SCRATCH_INIT if from_scratch else IMAGE_INIT


def text_init(from_scratch):
  return _FROM_SCRATCH_INIT if from_scratch else TEXT_INIT


_TEXT_GATE, _IMAGE_GATE = .1, 1.  # from scratch; ours


def _gate_init(from_scratch, opened):
  return nn.initializers.constant(opened if from_scratch else 0.)


class ImageFromText(nn.Module):
  """Cross-attention of an image block, added to its window attention.

  Attributes:
    query_norm: LayerNorm before the query (variant v3), or none (v2).
  """
  heads: int
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  from_scratch: bool = False
  query_norm: bool = True

  @nn.compact
  def __call__(self, x, text, bias):
    """[B, N, C], [B, L, D], bias to [B, H, N, L] -> [B, N, C]."""
    c = x.shape[-1]
    split = lambda y: y.reshape(*y.shape[:2], self.heads, c // self.heads)
    dense = lambda n, name: nn.Dense(n, dtype=self.dtype, name=name,
                                     kernel_init=image_init(self.from_scratch))
    gate = self.param('gate', _gate_init(self.from_scratch, _IMAGE_GATE), (1,))
    read = (layers.LayerNorm(self.epsilon, name='norm')(x)
            if self.query_norm else x)
    query = dense(c, 'query')(read)
    key, value = jnp.split(dense(2 * c, 'key_value')(text), 2, -1)
    y = layers.attention(split(query), split(key), split(value), bias)
    return dense(c, 'out')(y.reshape(x.shape)) * gate.astype(x.dtype)


class TextFromImage(nn.Module):
  """Cross-attention of a text layer, added to its self-attention."""
  width: int
  heads: int
  dropout: float = 0.
  dtype: Any = jnp.float32
  from_scratch: bool = False

  def setup(self):
    self.gate = self.param('gate', _gate_init(self.from_scratch, _TEXT_GATE),
                           (1,))
    self.attention = layers.MultiHeadAttention(
        self.width, self.heads, self.dropout, self.dtype,
        text_init(self.from_scratch))
    self.drop = layers.Dropout(self.dropout)

  def __call__(self, x, image, train=False):
    """[B, L, D], [B, N, C] -> [B, L, D]."""
    y = self.attention(x, image, image, train=train)
    return self.drop(y, train) * self.gate.astype(x.dtype)

  def keys_values(self, image):
    """[B, N, C] -> KeysValues, for `attend`."""
    return self.attention.keys_values(image, image)

  def attend(self, x, image):
    """`__call__` without dropout, on what `keys_values` returned."""
    return self.attention.attend(x, image) * self.gate.astype(x.dtype)
