"""One Transformer decoder for object queries and for caption tokens.

Both run in a single pass over [queries ; caption tokens]. Queries attend to
queries, tokens causally to the tokens of their own sentence, and neither
attends to the other. The two tasks thus share every weight (E2E-VLP, section 3)
and the memory's keys and values are projected once.

Queries come in two kinds:
- 'learned': DETR's; content starts at zero, a learned vector is added to
  queries and keys. Boxes are a sigmoid of an MLP.
- 'reference': every query owns a reference box which each layer refines
  (as in DAB-DETR), and cross-attention gets a Gaussian locality bias around
  the reference (as in SMCA), one learned width per head. Our choice for small
  runs: localisation is learned in a fraction of the steps.
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
  ffn_width: int
  dropout: float = 0.1
  pre_norm: bool = False
  act: str = 'relu'
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  def setup(self):
    attention = lambda: layers.MultiHeadAttention(
        self.width, self.heads, self.dropout, self.dtype)
    self.self_attention, self.cross_attention = attention(), attention()
    self.ffn = layers.FeedForward(self.width, self.ffn_width, self.dropout,
                                  self.act, self.dtype)
    for i in (1, 2, 3):
      setattr(self, f'norm{i}', layers.LayerNorm(self.epsilon))
    self.drop = layers.Dropout(self.dropout)

  def __call__(self, x, pos, self_bias, memory, memory_pos, cross_bias,
               train=False):
    """x, pos [B, T, D]; memory [B, N, D]; biases to [B, H, T, T | N]."""
    return self._residuals(
        x, train,
        lambda y: self.self_attention(y + pos, y + pos, y, self_bias, train),
        lambda y: self.cross_attention(y + pos, memory + memory_pos, memory,
                                       cross_bias, train),
        lambda y: self.ffn(y, train))

  def project_memory(self, memory, memory_pos):
    """The memory's KeysValues, for `step`."""
    return self.cross_attention.keys_values(memory + memory_pos, memory)

  def step(self, x, position, cache, memory, cross_bias):
    """Decodes one more token, without position or dropout.

    Args:
      x: [B, 1, D].
      position: [B] position of the token.
      cache: KeysValues of the tokens before it.
      memory: from `project_memory`.
      cross_bias: to [B, H, 1, N].

    Returns:
      ([B, 1, D], cache).
    """
    def attend_to_text(y):
      nonlocal cache
      cache, bias = layers.extend(
          cache, self.self_attention.keys_values(y, y), position)
      return self.self_attention.attend(y, cache, bias)
    x = self._residuals(
        x, False, attend_to_text,
        lambda y: self.cross_attention.attend(y, memory, cross_bias),
        self.ffn)
    return x, cache

  def _residuals(self, x, train, *branches):
    for i, branch in enumerate(branches, 1):
      norm = getattr(self, f'norm{i}')
      drop = lambda y: self.drop(y, train)
      x = (x + drop(branch(norm(x))) if self.pre_norm
           else norm(x + drop(branch(x))))
    return x


def block_mask(num_queries: int, text_mask: jax.Array) -> jax.Array:
  """Attention mask of [queries ; S sentences of L tokens].

  Args:
    num_queries: Q; 0 for a caption-only pass.
    text_mask: [B, S, L] True where a token is real.

  Returns:
    [B, T, T] True where the row may attend to the column, T = Q + S * L. Padded
    tokens only attend to themselves, so that no row is empty, and no other
    token attends to them.
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

  def setup(self):
    layer = layers.remat(DecoderLayer, self.remat, static_argnums=(7,))
    for i in range(self.layers):
      setattr(self, f'layer{i}', layer(
          self.width, self.heads, self.ffn, self.dropout, self.pre_norm,
          self.act, self.epsilon, self.dtype))
    self.by_reference = self.queries == 'reference'
    self.box_head = layers.MLP(
        self.width, 4, last_kernel_init=nn.initializers.zeros
        if self.by_reference else nn.initializers.lecun_normal())
    self.norm = layers.LayerNorm(self.epsilon)
    if self.by_reference:
      self.query_content = self.param(
          'query_content', nn.initializers.normal(.02),
          (self.num_queries, self.width))
      self.query_reference = self.param('query_reference', _grid_references,
                                        (self.num_queries, 4))
      self.locality = self.param('locality', _locality_init, (self.heads,))
      self.query_position = nn.Dense(self.width)
    else:
      self.query_embedding = self.param(
          'query_embedding', nn.initializers.normal(1.),
          (self.num_queries, self.width))

  def __call__(self, memory, memory_pos, memory_mask, memory_xy,
               text=None, text_mask=None, detect=True, train=False):
    """Runs queries (if `detect`) and caption tokens (if `text`) together.

    Args:
      memory, memory_pos: [B, N, D].
      memory_mask: [B, N] True where valid.
      memory_xy: [B, N', 2] cell centers relative to the unpadded image, of the
        first N' tokens of the memory. The others (a text) are near to every
        query.
      text: [B, S, L, D] embedded caption tokens, or None.
      text_mask: [B, S, L].
      detect: run the object queries.
      train: dropout on.

    Returns:
      (queries, boxes, tokens): [layers, B, Q, D] and [layers, B, Q, 4]
      (cx, cy, w, h in [0, 1]) after every layer, or None without `detect`;
      [B, S, L, D] or None without `text`.
    """
    b = memory.shape[0]
    q = self.num_queries if detect else 0
    if text is None:
      text_mask = jnp.zeros((b, 0, 1), bool)
      tokens = jnp.zeros((b, 0, self.width), memory.dtype)
    else:
      tokens = text.reshape(b, -1, self.width)
    self_bias = layers.mask_bias(block_mask(q, text_mask))[:, None]
    key_bias = layers.mask_bias(memory_mask)[:, None, None, :]
    start = (self.query_content[:q] if self.by_reference
             else jnp.zeros((q, self.width)))
    start = jnp.broadcast_to(start, (b, q, self.width))
    x = jnp.concatenate([start.astype(memory.dtype), tokens], 1)

    reference = None
    if self.by_reference:
      reference = jnp.broadcast_to(self.query_reference[:q], (b, q, 4))
    states, boxes = [], []
    for i in range(self.layers):
      query_pos, near = self._places(reference, memory_xy, q)
      # Tokens carry their positions in their embedding.
      pos = jnp.pad(query_pos.astype(memory.dtype),
                    ((0, 0), (0, tokens.shape[1]), (0, 0)))
      cross_bias = key_bias
      if near is not None:
        cross_bias = key_bias + jnp.pad(
            near, ((0, 0), (0, 0), (0, tokens.shape[1]),
                   (0, memory.shape[1] - near.shape[-1])))
      x = getattr(self, f'layer{i}')(x, pos, self_bias, memory, memory_pos,
                                     cross_bias, train)
      if detect:
        h = self.norm(x[:, :q])
        delta = self.box_head(h.astype(jnp.float32))
        if self.by_reference:
          delta = delta + reference
          # Each layer is trained on its own correction (DAB-DETR detaches).
          reference = jax.lax.stop_gradient(delta)
        states.append(h)
        boxes.append(jax.nn.sigmoid(delta))
    out_tokens = None
    if text is not None:
      out_tokens = self.norm(x[:, q:]).reshape(text.shape)
    if not detect:
      return None, None, out_tokens
    return jnp.stack(states), jnp.stack(boxes), out_tokens

  def _places(self, reference, memory_xy, q):
    """Positions of the queries [B, Q, D], and locality [B, H, Q, N] or None.

    Args:
      reference: [B, Q, 4] logits of the reference boxes, or None.
      memory_xy: [B, N, 2].
      q: number of queries, 0 for a caption-only pass.
    """
    b = memory_xy.shape[0]
    if reference is None:
      return jnp.broadcast_to(self.query_embedding[:q],
                              (b, q, self.width)), None
    box = jax.nn.sigmoid(reference)
    features = layers.sine_features(box * 2 * math.pi, self.width // 2)
    query_pos = self.query_position(features.reshape(b, q, 2 * self.width))
    squared = jnp.sum((box[:, :, None, :2] - memory_xy[:, None])**2, -1)
    return query_pos, -squared[:, None] / (
        2 * jnp.exp(2 * self.locality)[None, :, None, None])

  def start(self, memory, memory_pos, memory_mask, length):
    """A cache for `step`.

    Args:
      memory, memory_pos: [B, N, D].
      memory_mask: [B, N].
      length: number of tokens of the longest text.

    Returns:
      {'image': arrays that are the same for every token, 'text': KeysValues of
      each layer}.
    """
    every = [getattr(self, f'layer{i}') for i in range(self.layers)]
    empty = layers.empty_cache(len(memory), length, self.heads, self.width,
                               memory.dtype)
    return {'image': {'memory': [layer.project_memory(memory, memory_pos)
                                 for layer in every],
                      'mask': memory_mask},
            'text': [empty] * self.layers}

  def step(self, cache, x, position):
    """One caption token x [B, 1, D] -> (its state [B, 1, D], cache)."""
    bias = layers.mask_bias(cache['image']['mask'])[:, None, None]
    text = list(cache['text'])
    for i in range(self.layers):
      x, text[i] = getattr(self, f'layer{i}').step(
          x, position, text[i], cache['image']['memory'][i], bias)
    return self.norm(x), {**cache, 'text': text}
