"""Gated cross-attention inside two trunks (FIBER, Dou et al., NeurIPS 2022).

The last layers of an image and of a text trunk are paired. Both members of a
pair read the other's tokens as they were before the pair, and add what they
find to the branch of their self-attention, times a learned gate that starts
at 0: at first the trunks compute what they would alone.
"""
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from e2e_vlp_jax.models import layers

# Swin's and BERT's own, which FIBER's new weights share. The third is for
# narrow trunks that train from scratch; the gates are then open from the
# start, as there is nothing that they could spoil.
IMAGE_INIT = nn.initializers.truncated_normal(.02, lower=-100, upper=100)
TEXT_INIT = nn.initializers.normal(.02)
_SCRATCH_INIT = nn.initializers.lecun_normal()


def image_init(scratch):
  return _SCRATCH_INIT if scratch else IMAGE_INIT


def text_init(scratch):
  return _SCRATCH_INIT if scratch else TEXT_INIT


def _gate_init(scratch):
  return nn.initializers.constant(float(scratch))


class ImageFromText(nn.Module):
  """What an image block adds to the output of its window attention."""
  heads: int
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  scratch: bool = False

  @nn.compact
  def __call__(self, x, text, bias):
    """[B, N, C], [B, L, D], bias to [B, H, N, L] -> [B, N, C]."""
    c = x.shape[-1]
    split = lambda y: y.reshape(*y.shape[:2], -1, self.heads,
                                c // self.heads)
    dense = lambda n, name: nn.Dense(n, dtype=self.dtype, name=name,
                                     kernel_init=image_init(self.scratch))
    gate = self.param('gate', _gate_init(self.scratch), (1,))
    query = dense(c, 'query')(layers.LayerNorm(self.epsilon, name='norm')(x))
    both = split(dense(2 * c, 'key_value')(text))
    y = layers.attention(split(query)[:, :, 0], both[:, :, 0], both[:, :, 1],
                         bias)
    return dense(c, 'out')(y.reshape(x.shape)) * gate.astype(x.dtype)


class TextFromImage(nn.Module):
  """What a text layer adds to the output of its self-attention."""
  heads: int
  dropout: float = 0.
  dtype: Any = jnp.float32
  scratch: bool = False

  @nn.compact
  def __call__(self, x, image, train=False):
    """[B, L, D], [B, N, C] -> [B, L, D]."""
    gate = self.param('gate', _gate_init(self.scratch), (1,))
    y = layers.MultiHeadAttention(
        x.shape[-1], self.heads, self.dropout, self.dtype,
        text_init(self.scratch), name='attention')(x, image, image, train=train)
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return y * gate.astype(x.dtype)
