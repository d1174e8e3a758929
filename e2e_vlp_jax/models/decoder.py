"""One Transformer decoder for object queries and for caption tokens.

Both run in a single pass over [queries ; caption tokens]: queries attend to
queries, tokens causally to the tokens of their own sentence, nothing crosses.
So the two tasks share every weight (E2E-VLP, section 3) and the memory's keys
and values are projected once.

Queries come in two kinds:
- 'learned': DETR's; content starts at zero, a learned vector is added to
  queries and keys. Boxes are a sigmoid of an MLP.
- 'reference': every query owns a reference box which each layer refines
  (as in DAB-DETR), and cross-attention gets a Gaussian locality bias around
  the reference (as in SMCA), one learned width a head. Our choice for small
  runs: localisation is learnt in a fraction of the steps.
"""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax.models import layers


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention, feed-forward; post- or pre-norm."""
  width: int
  heads: int
  ffn: int
  dropout: float = 0.1
  pre_norm: bool = False
  act: str = 'relu'
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, pos, self_bias, memory, memory_pos, cross_bias,
               train=False):
    """x, pos [B, T, D]; memory [B, N, D]; biases to [B, H, T, T | N]."""
    drop = nn.Dropout(self.dropout, deterministic=not train)
    norm = lambda name: layers.LayerNorm(self.epsilon, name=name)
    attend = lambda name: layers.MultiHeadAttention(
        self.width, self.heads, self.dropout, self.dtype, name=name)
    own, cross = attend('self_attention'), attend('cross_attention')
    feed = layers.FeedForward(self.width, self.ffn, self.dropout, self.act,
                              self.dtype, name='ffn')
    key = memory + memory_pos
    branches = (
        lambda y: own(y + pos, y + pos, y, self_bias, train),
        lambda y: cross(y + pos, key, memory, cross_bias, train),
        lambda y: feed(y, train))
    for i, branch in enumerate(branches, 1):
      if self.pre_norm:
        x = x + drop(branch(norm(f'norm{i}')(x)))
      else:
        x = norm(f'norm{i}')(x + drop(branch(x)))
    return x


def block_mask(num_queries: int, text_mask: jax.Array) -> jax.Array:
  """Who may attend to whom in [queries ; S sentences of L tokens].

  Args:
    num_queries: Q; 0 for a caption-only pass.
    text_mask: [B, S, L] True where a token is real.

  Returns:
    [B, T, T] True where row may see column, T = Q + S * L. Padded tokens are
    never seen (they still see themselves, so no row is empty).
  """
  b, s, l = text_mask.shape
  t = num_queries + s * l
  # Queries are sentence -1; positions within a sentence order its tokens.
  sentence = jnp.concatenate([jnp.full(num_queries, -1),
                              jnp.repeat(jnp.arange(s), l)])
  position = jnp.concatenate([jnp.zeros(num_queries, int),
                              jnp.tile(jnp.arange(l), s)])
  allowed = (sentence[:, None] == sentence[None]) & (
      position[None] <= position[:, None])
  valid = jnp.concatenate([jnp.ones((b, num_queries), bool),
                           text_mask.reshape(b, s * l)], 1)
  return (allowed[None] & valid[:, None, :]) | jnp.eye(t, dtype=bool)


def _grid_references(key, shape, dtype=jnp.float32):
  """Reference boxes on a regular grid, as logits of (cx, cy, w, h)."""
  del key
  side = math.ceil(math.sqrt(shape[0]))
  k = jnp.arange(shape[0])
  xy = (jnp.stack([k % side, k // side], -1) + .5) / side
  logits = jnp.log(xy / (1 - xy))
  return jnp.concatenate([logits, jnp.full((shape[0], 2), -1.2)], -1).astype(
      dtype)


def _locality_init(key, shape, dtype=jnp.float32):
  """Widths from a twelfth of the image to all of it, in log space."""
  del key
  return jnp.log(jnp.geomspace(.08, 1., shape[0])).astype(dtype)


class Decoder(nn.Module):
  """See the module's docstring."""
  layers: int
  width: int
  heads: int
  ffn: int
  num_queries: int
  queries: str = 'learned'
  dropout: float = 0.1
  pre_norm: bool = False
  act: str = 'relu'
  epsilon: float = 1e-5
  remat: str = 'none'
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, memory, memory_pos, memory_mask, memory_xy,
               text=None, text_mask=None, detect=True, train=False):
    """Runs queries (if `detect`) and caption tokens (if `text`) together.

    Args:
      memory, memory_pos: [B, N, D].
      memory_mask: [B, N] True where valid.
      memory_xy: [B, N, 2] cell centres relative to the unpadded image.
      text: [B, S, L, D] embedded caption tokens, or None.
      text_mask: [B, S, L].
      detect: run the object queries.
      train: dropout on.

    Returns:
      (queries, boxes, tokens): [layers, B, Q, D] and [layers, B, Q, 4]
      (cx, cy, w, h in [0, 1]) after every layer, or None without `detect`;
      [B, S, L, D] or None without `text`.
    """
    b, n, _ = memory.shape
    q = self.num_queries if detect else 0
    if text is None:
      text_mask = jnp.zeros((b, 0, 1), bool)
      tokens = jnp.zeros((b, 0, self.width), memory.dtype)
    else:
      tokens = text.reshape(b, -1, self.width)
    t = q + tokens.shape[1]
    self_bias = layers.mask_bias(block_mask(q, text_mask))[:, None]
    key_bias = layers.mask_bias(memory_mask)[:, None, None, :]
    # Tokens carry their positions in their embedding.
    token_pos = jnp.zeros((b, t - q, self.width), memory.dtype)

    box_head = layers.MLP(self.width, 4, name='box_head',
                          last_kernel_init=nn.initializers.zeros
                          if self.queries == 'reference'
                          else nn.initializers.lecun_normal())
    final_norm = layers.LayerNorm(self.epsilon, name='norm')
    by_reference = self.queries == 'reference'
    reference = None
    if by_reference:
      content = self.param('query_content', nn.initializers.normal(.02),
                           (self.num_queries, self.width))
      reference = self.param('query_reference', _grid_references,
                             (self.num_queries, 4))
      locality = self.param('locality', _locality_init, (self.heads,))
      position_mlp = nn.Dense(self.width, name='query_position')
      reference = jnp.broadcast_to(reference[:q], (b, q, 4))
      start = jnp.broadcast_to(content[:q], (b, q, self.width))
    else:
      embedding = self.param('query_embedding', nn.initializers.normal(1.),
                             (self.num_queries, self.width))
      query_pos = jnp.broadcast_to(embedding[:q], (b, q, self.width))
      start = jnp.zeros((b, q, self.width))
    x = jnp.concatenate([start.astype(memory.dtype), tokens], 1)

    layer = layers.remat(DecoderLayer, self.remat, static_argnums=(7,))
    states, boxes = [], []
    for i in range(self.layers):
      cross_bias = key_bias
      if by_reference:
        box = jax.nn.sigmoid(reference)
        features = layers.sine_features(box * 2 * math.pi,
                                        self.width // 2)
        query_pos = position_mlp(features.reshape(b, q, 2 * self.width))
        squared = jnp.sum((box[:, :, None, :2] - memory_xy[:, None])**2, -1)
        near = -squared[:, None] / (
            2 * jnp.exp(2 * locality)[None, :, None, None])
        near = jnp.pad(near, ((0, 0), (0, 0), (0, t - q), (0, 0)))
        cross_bias = key_bias + near
      pos = jnp.concatenate([query_pos.astype(memory.dtype), token_pos], 1)
      x = layer(self.width, self.heads, self.ffn, self.dropout,
                self.pre_norm, self.act, self.epsilon, self.dtype,
                name=f'layer{i}')(
                    x, pos, self_bias, memory, memory_pos, cross_bias, train)
      if detect:
        h = final_norm(x[:, :q])
        delta = box_head(h.astype(jnp.float32))
        if by_reference:
          delta = delta + reference
          # Each layer is trained on its own correction (DAB-DETR detaches).
          reference = jax.lax.stop_gradient(delta)
        states.append(h)
        boxes.append(jax.nn.sigmoid(delta))
    out_tokens = None
    if text is not None:
      out_tokens = final_norm(x[:, q:]).reshape(text.shape)
    if not detect:
      return None, None, out_tokens
    return jnp.stack(states), jnp.stack(boxes), out_tokens
