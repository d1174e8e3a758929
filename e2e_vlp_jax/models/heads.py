"""Output heads. Each is a small module; logits are float32."""
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.ops import boxes as box_ops

# Initialisers of a classifier: flax's, Kaiming's (SOHO's heads) and BERT's.
INITS = {'lecun': nn.initializers.lecun_normal(),
         'kaiming': nn.initializers.variance_scaling(2., 'fan_in', 'normal'),
         'bert': nn.initializers.normal(.02)}


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
    """The object of every query, without suppression, as in DETR.

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


class GridClasses(nn.Module):
  """Object class of each grid cell, to warm-start a trunk (our addition)."""
  num_classes: int
  num_attributes: int

  @nn.compact
  def __call__(self, x):
    """[B, N, C] -> dict of [B, N, K+1] (last = background) and [B, N, A]."""
    x = x.astype(jnp.float32)
    out = {'grid_logits': nn.Dense(self.num_classes + 1, name='classes')(x)}
    if self.num_attributes:
      out['grid_attributes'] = nn.Dense(self.num_attributes,
                                        name='attributes')(x)
    return out


class Classifier(nn.Module):
  """Dense -> LayerNorm -> activation -> dropout -> dense.

  Heads of `config.model.heads` with kind 'classifier'. SOHO's released VQA head
  is hidden=3072, act='relu', dropout=.5; FIBER's are hidden=1536, norm=True,
  act='gelu'.

  Attributes:
    outputs: number of classes.
    hidden: width of the hidden layer; 0 = no hidden layer.
    act: activation after the hidden layer.
    norm: LayerNorm between hidden layer and activation.
    dropout: dropout rate before the output layer.
    epsilon: epsilon of the LayerNorm.
    init: key of `INITS`.
  """
  outputs: int
  hidden: int = 0
  act: str = 'relu'
  norm: bool = False
  dropout: float = 0.
  epsilon: float = 1e-5
  init: str = 'lecun'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False):
    """[..., D] -> logits [..., outputs]."""
    if self.init not in INITS:
      raise errors.UserError(f'model.heads: init={self.init!r}'
                             + errors.nearest(self.init, INITS))
    init = INITS[self.init]
    if self.hidden:
      x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=init,
                   name='hidden')(x)
      if self.norm:
        x = layers.LayerNorm(self.epsilon, name='norm')(x)
      x = layers.activation(self.act)(x)
    x = layers.Dropout(self.dropout)(x, train)
    return nn.Dense(self.outputs, kernel_init=init, name='out')(
        x.astype(layers.wide(x)))


# Kinds of heads for `config.model.heads`.
KINDS = {'classifier': Classifier}
