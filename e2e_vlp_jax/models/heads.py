"""Output heads. Each is a small module; logits are float32."""
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax.models import layers
from e2e_vlp_jax.ops import boxes as box_ops


class Detection(nn.Module):
  """Class (last = no object) and attribute logits of decoder states."""
  num_classes: int
  num_attributes: int

  @nn.compact
  def __call__(self, states):
    """[layers, B, Q, D] -> dict of [layers, B, Q, C+1] and [.., A]."""
    states = states.astype(jnp.float32)
    out = {'pred_logits': nn.Dense(self.num_classes + 1, name='classes')(
        states)}
    if self.num_attributes:
      out['pred_attributes'] = nn.Dense(self.num_attributes,
                                        name='attributes')(states)
    return out

  @staticmethod
  def objects(outputs, image_size):
    """Every query's object; nothing is suppressed (DETR).

    Args:
      outputs: pred_logits [B, Q, C+1], pred_boxes [B, Q, 4] (cx, cy, w, h)
        and, if the head has it, pred_attributes [B, Q, A].
      image_size: [B, 2] height and width of the originals, pixels.

    Returns:
      dict, float32: boxes [B, Q, 4] (x0, y0, x1, y1 in pixels), scores and
      labels [B, Q] (the likeliest class that is an object), attributes
      [B, Q, A] (probabilities).
    """
    wide = lambda x: x.astype(jnp.float32)
    scores = jax.nn.softmax(wide(outputs['pred_logits']))[..., :-1]
    boxes = box_ops.to_xyxy(wide(outputs['pred_boxes']))
    attributes = outputs.get('pred_attributes',
                             jnp.zeros((*boxes.shape[:2], 0)))
    return {'boxes': boxes * wide(image_size)[:, None, [1, 0, 1, 0]],
            'scores': scores.max(-1), 'labels': scores.argmax(-1),
            'attributes': jax.nn.softmax(wide(attributes))}


class MaskedLM(nn.Module):
  """BERT's masked-LM head: dense, GELU, LayerNorm, output layer, bias."""
  vocab_size: int
  width: int
  act: str = 'gelu'
  epsilon: float = 1e-12
  dtype: Any = jnp.float32
  kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x, attend):
    """x: [..., D]; attend: the output layer -> [..., V] logits."""
    x = layers.activation(self.act)(
        nn.Dense(self.width, dtype=self.dtype, name='dense',
                 kernel_init=self.kernel_init)(x))
    x = layers.LayerNorm(self.epsilon, name='norm')(x)
    bias = self.param('bias', nn.initializers.zeros, (self.vocab_size,))
    return attend(x) + bias


class Matching(nn.Module):
  """Two-way image-text matching; index 1 = the pair belongs together."""
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, cls):
    """[..., D] state of [CLS] -> [..., 2] logits."""
    x = jnp.tanh(nn.Dense(self.width, dtype=self.dtype, name='pooler')(cls))
    return nn.Dense(2, name='classifier')(x.astype(jnp.float32))

  @staticmethod
  def probability(outputs):
    """itm_logits [..., 2] -> float32 [...]: how likely the pair is true."""
    return jax.nn.softmax(outputs['itm_logits'].astype(jnp.float32))[..., 1]


class Cells(nn.Module):
  """Dense labels of grid cells, to warm-start a trunk (our addition)."""
  num_classes: int
  num_attributes: int

  @nn.compact
  def __call__(self, x):
    """[B, N, C] -> dict of [B, N, C+1] (last = nothing) and [B, N, A]."""
    x = x.astype(jnp.float32)
    out = {'cell_logits': nn.Dense(self.num_classes + 1, name='classes')(x)}
    if self.num_attributes:
      out['cell_attributes'] = nn.Dense(self.num_attributes,
                                        name='attributes')(x)
    return out
