"""Transformer pieces that the three systems share.

Masks are True where valid. Softmax and LayerNorm run in float32; matrix
products run in `dtype`; parameters are float32.
"""
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.ops import attention as attention_ops
from e2e_vlp_jax.ops import place

Array = jax.Array
# Added to the logits of masked positions. Finite, so that a row without any
# valid key (an all-padding example) stays finite instead of becoming NaN.
MASKED = -1e9
REMAT = ('none', 'dots', 'full')
POOLS = ('cls', 'mean')


@jax.custom_vjp
def gelu(x):
  """The exact GELU, x * P(normal < x), in float32; keeps only x.

  By erf, as in torch. jax.nn's form by erfc chooses between two polynomials,
  and a TPU makes a pass over x for the choice alone.
  """
  y = x.astype(wide(x))
  return (y * _normal_cdf(y)).astype(x.dtype)


def _normal_cdf(x):
  return .5 * (1 + jax.lax.erf(x * math.sqrt(.5)))


def _gelu_bwd(x, gradient):
  y = x.astype(wide(x))
  density = jnp.exp(-.5 * y * y) / math.sqrt(2 * math.pi)
  return ((gradient.astype(y.dtype)
           * (_normal_cdf(y) + y * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_bwd)
_ACTIVATIONS = {'relu': jax.nn.relu, 'gelu': gelu}


def activation(name: str) -> Callable[[Array], Array]:
  """'relu' | 'gelu' (the exact erf form, as in BERT and torch)."""
  if name not in _ACTIVATIONS:
    raise errors.UserError(f'model.act: {name!r}'
                           + errors.nearest(name, _ACTIVATIONS))
  return _ACTIVATIONS[name]


def check_heads(heads, width, where):
  """UserError unless heads divide the width of `where` (a module's path)."""
  if heads < 1 or width % heads:
    fitting = min((n for n in range(1, width + 1) if width % n == 0),
                  key=lambda n: abs(n - heads))
    raise errors.UserError(
        f'heads: {heads} heads do not divide the width {width} of '
        f'{"/".join(where)}; expected a divisor, such as {fitting}')


def pool(states: Array, mask: Array, how: str) -> Array:
  """One vector per text, by `model.text_pool`: its first token or the mean.

  Args:
    states: [..., L, D].
    mask: [..., L].
    how: one of `POOLS`.
  """
  if how not in POOLS:
    raise errors.UserError(f'model.text_pool: {how!r}'
                           + errors.nearest(how, POOLS))
  return states[..., 0, :] if how == 'cls' else masked_mean(states, mask)


def wide(x: Array) -> Any:
  """Accumulation dtype for x: at least float32."""
  return jnp.promote_types(x.dtype, jnp.float32)


def is_frozen(groups, path):
  """Whether `config.optim.groups` freeze a parameter.

  Args:
    groups: ((regex, bool), ...); the first regex that matches the whole path
      decides, as in the optimizer. () = nothing is frozen.
    path: path of the parameter, such as 'backbone/bn1/scale'.
  """
  return next((frozen for pattern, frozen in groups
               if re.fullmatch(pattern, path)), False)


def normalise(image, image_mask, mean, std, dtype):
  """Pixels [B, H, W, 3] in 0..255 -> (pixels / 255 - mean) / std.

  Padding is zero after normalisation, as in DETR, whatever its values were.

  Args:
    image: [B, H, W, 3].
    image_mask: [B, H, W] True on real pixels.
    mean, std: three values each.
    dtype: dtype of the result; the arithmetic uses at least float32.
  """
  full = jnp.promote_types(dtype, jnp.float32)
  pixels = image.astype(full) / 255.
  pixels = (pixels - jnp.asarray(mean, full)) / jnp.asarray(std, full)
  return (pixels * image_mask[..., None]).astype(dtype)


def remat(module, policy, static_argnums=()):
  """`module` (a Linen class) with rematerialisation by `policy`.

  Args:
    module: class of a layer.
    policy: 'none': everything is kept; 'dots': the results of products with
      weights and of attention are kept, the rest (norms, activations, attention
      weights) is recomputed; 'full': only the layer's input and the result of
      its attention are kept.
    static_argnums: static arguments of `__call__`, counting self.

  Raises:
    UserError: no such policy.
  """
  if policy not in REMAT:
    raise errors.UserError(f'remat: {policy!r}'
                           + errors.nearest(policy, REMAT))
  if policy == 'none':
    return module
  policies = jax.checkpoint_policies
  keep = policies.save_only_these_names(attention_ops.RESULT)
  if policy == 'dots':
    keep = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, keep)
  return nn.remat(module, policy=keep, static_argnums=static_argnums)


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, computed in float32 (torch eps 1e-5)."""
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = nn.LayerNorm(epsilon=self.epsilon, dtype=wide(x), name='norm')
    return norm(x).astype(x.dtype)


class Dropout(nn.Module):
  """Dropout whose mask is not kept for the backward pass but drawn again.

  A mask in memory costs a byte per activation, written once and read twice.
  This one is a hash of the positions and of one random number, which the
  compiler computes where it is used.

  Attributes:
    rate: probability of dropping a value.
    rows: drop whole rows of the batch (stochastic depth).
  """
  rate: float
  rows: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    if not train or not self.rate:
      return x
    seed = attention_ops.draw_dropout(self.make_rng('dropout'), self.rate,
                                      1).seeds[0]
    return _drop(self.rate, self.rows, x, seed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _drop(rate, rows, x, seed):
  shape = (len(x), *[1] * (x.ndim - 1)) if rows else x.shape
  position = sum(jax.lax.broadcasted_iota(jnp.int32, shape, axis)
                 * math.prod(shape[axis + 1:]) for axis in range(len(shape)))
  keep = attention_ops.kept(position, seed, rate)
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _drop_fwd(rate, rows, x, seed):
  return _drop(rate, rows, x, seed), seed


def _drop_bwd(rate, rows, seed, gradient):
  if not rows:
    # Otherwise the compiler finds the forward pass's mask and keeps it.
    seed = jax.lax.optimization_barrier(seed)
  return _drop(rate, rows, gradient, seed), None


_drop.defvjp(_drop_fwd, _drop_bwd)


def attention(query: Array, key: Array, value: Array,
              bias: Array | None = None,
              dropout: attention_ops.Dropout | None = None) -> Array:
  """Softmax attention.

  Args:
    query: [B, T, H, D/H].
    key, value: [B, N, H, D/H].
    bias: added to the logits; broadcasts to [B, H, T, N].
    dropout: of the attention weights, or None.

  Returns:
    [B, T, H, D/H].
  """
  if bias is not None and jnp.ndim(bias) == 4:
    bias = bias[:, None]
  return attention_ops.attention(query[:, None], key[:, None], value[:, None],
                                 bias, dropout=dropout)[:, 0]


def mask_bias(mask: Array) -> Array:
  """True-where-valid mask -> float32 bias for attention logits."""
  return jnp.where(mask, 0., MASKED).astype(jnp.float32)


class KeysValues(NamedTuple):
  """Projected keys and values, each [B, N, H, D/H]."""
  key: Array
  value: Array


def product(x, kernel, *args, **kwargs):
  """The product of a dense layer that may run twice in a step.

  Its kernel's gradient is then a sum of two products. On a GPU, XLA would
  compute it as one product of both inputs joined. Joining them took 2 of 54 ms
  of a step of E2E-VLP `r50` on an H100. The barrier keeps the two apart.
  """
  if place.platform() == 'gpu':
    kernel = jax.lax.optimization_barrier(kernel)
  return jax.lax.dot_general(x, kernel, *args, **kwargs)


class MultiHeadAttention(nn.Module):
  """Multi-head attention with separate query, key and value inputs.

  DETR adds positions to queries and keys only, so the three inputs differ.
  """
  width: int
  heads: int
  dropout: float = 0.
  dtype: Any = jnp.float32
  kernel_init: Callable[..., Array] = nn.initializers.xavier_uniform()

  def setup(self):
    check_heads(self.heads, self.width, self.path)
    for name in ('query', 'key', 'value', 'out'):
      setattr(self, name, nn.Dense(self.width, dtype=self.dtype,
                                   dot_general=product,
                                   kernel_init=self.kernel_init))

  def __call__(self, query, key, value, bias=None, train=False):
    """[B, T, D], [B, N, D], [B, N, D], bias to [B, H, T, N] -> [B, T, D]."""
    return self.attend(query, self.keys_values(key, value), bias, train)

  def keys_values(self, key, value):
    """[B, N, D], [B, N, D] -> KeysValues, which a decoder may cache."""
    return KeysValues(self._split(self.key(key)),
                      self._split(self.value(value)))

  def attend(self, query, kept, bias=None, train=False):
    """[B, T, D], KeysValues, bias to [B, H, T, N] -> [B, T, D]."""
    dropout = None
    if train and self.dropout:
      dropout = attention_ops.draw_dropout(self.make_rng('dropout'),
                                           self.dropout, len(query))
    y = attention(self._split(self.query(query)), kept.key, kept.value, bias,
                  dropout)
    return self.out(y.reshape(*y.shape[:2], self.width))

  def _split(self, x):
    return x.reshape(*x.shape[:-1], self.heads, self.width // self.heads)


def empty_cache(rows, length, heads, width, dtype):
  """KeysValues [rows, length, heads, width / heads] for `extend` to fill."""
  zeros = jnp.zeros((rows, length, heads, width // heads), dtype)
  return KeysValues(zeros, zeros)


def extend(cache, new, position):
  """Writes one token's keys and values into a cache.

  Args:
    cache: KeysValues [B, L, H, D/H].
    new: KeysValues [B, 1, H, D/H].
    position: [B] int, where each row's token goes.

  Returns:
    (cache, bias [B, 1, 1, L] that hides the positions after it).
  """
  rows = jnp.arange(len(position))
  cache = KeysValues(*(old.at[rows, position].set(x[:, 0].astype(old.dtype))
                       for old, x in zip(cache, new)))
  seen = jnp.arange(cache.key.shape[1]) <= position[:, None]
  return cache, mask_bias(seen)[:, None, None]


class FeedForward(nn.Module):
  """Dense -> activation -> dropout -> dense."""
  width: int
  hidden: int
  dropout: float = 0.
  act: str = 'relu'
  dtype: Any = jnp.float32
  kernel_init: Callable[..., Array] = nn.initializers.xavier_uniform()

  @nn.compact
  def __call__(self, x, train=False):
    dense = lambda n, name: nn.Dense(n, dtype=self.dtype, name=name,
                                     dot_general=product,
                                     kernel_init=self.kernel_init)
    x = activation(self.act)(dense(self.hidden, 'in')(x))
    x = Dropout(self.dropout)(x, train)
    return dense(self.width, 'out')(x)


class EncoderLayer(nn.Module):
  """Self-attention and feed-forward, post-norm (DETR) or pre-norm."""
  width: int
  heads: int
  ffn: int
  dropout: float = 0.1
  pre_norm: bool = False
  act: str = 'relu'
  epsilon: float = 1e-5
  dtype: Any = jnp.float32
  # Inside the feed-forward; None = `dropout`, as in DETR.
  inner_dropout: float | None = None

  @nn.compact
  def __call__(self, x, pos, bias, train=False, last=0):
    """Self-attention over all tokens, output for all or for the last ones.

    Args:
      x, pos: [B, T, D]; pos may be None.
      bias: broadcasts to [B, H, T, T], equal for all queries if `last`.
      train: dropout on.
      last: if > 0, return only the last `last` tokens.

    Returns:
      [B, T or last, D].
    """
    drop = Dropout(self.dropout)
    norm = lambda name: LayerNorm(self.epsilon, name=name)
    attend = MultiHeadAttention(self.width, self.heads, self.dropout,
                                self.dtype, name='self_attention')
    inner = self.dropout if self.inner_dropout is None else self.inner_dropout
    feed = FeedForward(self.width, self.ffn, inner, self.act, self.dtype,
                       name='ffn')
    def self_attention(y):
      q = y if pos is None else y + pos
      return drop(attend(q[:, -last:], q, y, bias, train), train)
    if self.pre_norm:
      x = x[:, -last:] + self_attention(norm('norm1')(x))
      return x + drop(feed(norm('norm2')(x), train), train)
    x = norm('norm1')(x[:, -last:] + self_attention(x))
    return norm('norm2')(x + drop(feed(x, train), train))


def layer_patterns(stack, count):
  """Regexes of the parameters of each layer of a stack, the first one first.

  Args:
    stack: its name in the model, such as 'encoder'.
    count: number of layers. The stack's last norm belongs to the last layer.
  """
  return [f'{stack}/layer{i}/.*' for i in range(count - 1)] + [
      f'{stack}/(layer{count - 1}|norm)/.*']


class Encoder(nn.Module):
  """A stack of encoder layers; pre-norm stacks end in a LayerNorm."""
  layers: int
  width: int
  heads: int
  ffn: int
  dropout: float = 0.1
  pre_norm: bool = False
  act: str = 'relu'
  epsilon: float = 1e-5
  remat: str = 'none'
  dtype: Any = jnp.float32
  inner_dropout: float | None = None

  @nn.compact
  def __call__(self, x, pos, mask, train=False, last=0):
    """x, pos [B, T, D], mask [B, T] -> [B, T, D], or the last tokens of it.

    With `last`, the last layer computes nothing for the other tokens.
    """
    layer = remat(EncoderLayer, self.remat, static_argnums=(4, 5))
    bias = mask_bias(mask)[:, None, None, :]
    for i in range(self.layers):
      x = layer(self.width, self.heads, self.ffn, self.dropout, self.pre_norm,
                self.act, self.epsilon, self.dtype, self.inner_dropout,
                name=f'layer{i}')(
                    x, pos, bias, train,
                    last if i == self.layers - 1 else 0)
    if self.pre_norm:
      x = LayerNorm(self.epsilon, name='norm')(x)
    return x


class MLP(nn.Module):
  """`layers` dense layers with ReLU between them (DETR's box head)."""
  hidden: int
  out: int
  layers: int = 3
  last_kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    for i in range(self.layers - 1):
      x = jax.nn.relu(nn.Dense(self.hidden, dtype=self.dtype,
                               name=f'dense{i}')(x))
    return nn.Dense(self.out, dtype=self.dtype, name=f'dense{self.layers-1}',
                    kernel_init=self.last_kernel_init)(x)


def sine_features(position: Array, dims: int, temperature=1e4) -> Array:
  """Sine/cosine features of a coordinate; sin on even, cos on odd channels.

  Args:
    position: [...], in radians-like units (DETR: 0 to 2 pi over the image).
    dims: number of channels, even.

  Returns:
    [..., dims] float32. (DETR, models/position_encoding.py.)
  """
  k = jnp.arange(dims // 2, dtype=jnp.float32)
  angle = position[..., None] / temperature**(2 * k / dims)
  return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(
      *position.shape, dims)


def sine_position_2d(mask: Array, width: int) -> Array:
  """DETR's sine positions of a feature map, measured in valid cells only.

  Args:
    mask: [B, h, w] True where valid.
    width: channels; the first half encodes y, the second x.

  Returns:
    [B, h, w, width] float32.
  """
  valid = mask.astype(jnp.float32)
  y, x = jnp.cumsum(valid, 1), jnp.cumsum(valid, 2)
  y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
  x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
  return jnp.concatenate([sine_features(y, width // 2),
                          sine_features(x, width // 2)], -1)


def cell_centers(mask: Array) -> Array:
  """[B, h, w] mask -> [B, h, w, 2] (x, y) of cell centers in [0, 1].

  Relative to the valid part of the map, hence comparable with boxes, which
  are relative to the unpadded image.
  """
  valid = mask.astype(jnp.float32)
  y, x = jnp.cumsum(valid, 1) - .5, jnp.cumsum(valid, 2) - .5
  y = y / jnp.maximum(valid.sum(1, keepdims=True), 1)
  x = x / jnp.maximum(valid.sum(2, keepdims=True), 1)
  return jnp.stack([x, y], -1)


def downsample_mask(mask: Array, height: int, width: int) -> Array:
  """Nearest-neighbour [B, H, W] -> [B, height, width] (torch 'nearest')."""
  rows = (np.arange(height) * mask.shape[1]) // height
  cols = (np.arange(width) * mask.shape[2]) // width
  return mask[:, rows][:, :, cols]


def check_canvas(image, multiple):
  """UserError unless the sides of [B, H, W, 3] are multiples of `multiple`.

  Cells that reach beyond the canvas would shift the positions of all others.
  """
  h, w = image.shape[1:3]
  if h % multiple or w % multiple:
    near = lambda n: max(1, round(n / multiple)) * multiple
    raise errors.UserError(
        f'data.buckets: {h}x{w}: sides must be multiples of {multiple}, the '
        f'stride of model.backbone; try {near(h)}x{near(w)}')


def hide_padding(x: Array, mask: Array | None) -> Array:
  """Zeroes the padded cells of a feature map [B, h, w, C].

  A following convolution then has the same results at an image's edge as
  without padding. This is exact if the canvas is a multiple of the trunk's
  stride, as buckets are. mask: [B, H, W] of the pixels, or None.
  """
  if mask is None:
    return x
  return x * downsample_mask(mask, x.shape[1], x.shape[2])[..., None].astype(
      x.dtype)


def masked_mean(x: Array, mask: Array) -> Array:
  """Mean of [..., L, D] over the valid tokens of mask [..., L]."""
  weight = mask[..., None].astype(x.dtype)
  return (x * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1)


class TextEmbedding(nn.Module):
  """Word + learned position embeddings, LayerNorm, dropout (BERT's form).

  Attributes:
    types: rows of a token-type table, as in BERT; all tokens of a single text
      have type 0. 0 = no table.
  """
  vocab_size: int
  width: int
  max_length: int
  types: int = 0
  dropout: float = 0.1
  epsilon: float = 1e-12
  dtype: Any = jnp.float32

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.words = nn.Embed(self.vocab_size, self.width, embedding_init=init)
    self.positions = nn.Embed(self.max_length, self.width,
                              embedding_init=init)
    if self.types:
      self.token_types = nn.Embed(self.types, self.width, embedding_init=init)
    self.norm = LayerNorm(self.epsilon)
    self.drop = Dropout(self.dropout)

  def __call__(self, ids: Array, train: bool = False,
               positions: Array | None = None) -> Array:
    """[..., L] token ids and their positions (0, 1, ...) -> [..., L, D]."""
    if positions is None:
      if ids.shape[-1] > self.max_length:
        raise errors.UserError(
            f'data.max_text: texts of {ids.shape[-1]} tokens for '
            f'model.max_text: {self.max_length} positions; expected '
            'data.max_text <= model.max_text')
      positions = jnp.arange(ids.shape[-1])
    x = self.words(ids) + self.positions(positions)
    if self.types:
      x = x + self.token_types(jnp.zeros((1,), jnp.int32))
    x = self.norm(x).astype(self.dtype)
    return self.drop(x, train)

  def attend(self, x: Array) -> Array:
    """Tied output layer: [..., D] -> [..., V] logits (float32 sums)."""
    table = self.words.embedding.astype(x.dtype)
    return jnp.einsum('...d,vd->...v', x, table,
                      preferred_element_type=jnp.float32)
