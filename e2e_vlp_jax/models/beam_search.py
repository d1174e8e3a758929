"""Caption generation: beam search over a model's `decode_step`.

Keys and values of the tokens so far are kept in a cache, which is reordered
with the beams. A model uses one of two variants (`beam_search`):
- 'standard': candidates are ranked by the sum of their log-probabilities, a
  finished beam is one candidate, and the best mean log-probability wins.
- 'released': as in FIBER's public code (microsoft/FIBER, caption_test_step).
  Candidates are ranked by their mean log-probability, but when beams are
  reordered, their lengths stay in their slots. A finished beam proposes every
  token of the vocabulary at its own score, so it also takes all slots below its
  own. Padding ends a text, too. The search ends when all beams of the batch
  have ended; the first beam wins. Only <mask> is excluded before the softmax.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors

WAYS = ('standard', 'released')
_NEVER = -1e9
_RELEASED_NEVER = -1e4


class Beams(NamedTuple):
  """The state of the search; R slots per image, best first.

  Attributes:
    ids: [B, R, L] tokens.
    total: [B, R] sum of log-probabilities.
    done: [B, R] whether the text has ended.
    length: [B, R] tokens generated, the end token included.
    slot_length: [B, R] how long the beams in this slot were, if each was one
      token longer than the one before it in the slot ('released').
    t: number of tokens so far, the begin token included.
    cache: cache of the model, with [B * R] rows.
  """
  ids: jax.Array
  total: jax.Array
  done: jax.Array
  length: jax.Array
  slot_length: jax.Array
  t: jax.Array
  cache: Any


def generate(model, variables, batch, *, cls_id, sep_id, pad_id, max_length,
             beams=1, mask_id=None, forbidden=None):
  """Captions of the images in `batch`, from the image alone.

  Args:
    model: offers `captioning`; see contract.py.
    variables: its parameters and state.
    batch: at least image, image_mask.
    cls_id, sep_id, pad_id: begin, end and padding tokens.
    max_length: L, tokens generated, the begin token included.
    beams: 1 is greedy.
    mask_id: the mask token, which 'released' excludes.
    forbidden: tokens that are never generated; by default begin and padding
      ('standard') or the mask token ('released').

  Returns:
    tokens [B, L] int32 (begin token first, padded after the end token) and
    scores [B], the mean log-probability of the generated tokens.

  Raises:
    UserError: `model.beam_search` is unknown.
  """
  way = model.beam_search
  if way not in WAYS:
    raise errors.UserError(f'model.beam_search: {way!r}'
                           + errors.nearest(way, WAYS))

  def start(module):
    return module.decode_start(module.encode_image(batch), max_length)
  if forbidden is None:
    forbidden = (pad_id, cls_id) if way == 'standard' else (
        () if mask_id is None else (mask_id,))
  return search(
      model.apply(variables, method=start),
      functools.partial(model.apply, variables, method='decode_step'),
      way=way, cls_id=cls_id, sep_id=sep_id, pad_id=pad_id,
      max_length=max_length, beams=beams, forbidden=forbidden)


def search(cache, step, *, way, cls_id, sep_id, pad_id, max_length, beams,
           forbidden):
  """`generate` for a cache [B] and `step(cache, ids) -> logits, cache`."""
  b = jax.tree.leaves(cache)[0].shape[0]
  ids = jnp.full((b, beams, max_length), pad_id, jnp.int32)
  zeros = jnp.zeros((b, beams))
  first = Beams(
      ids.at[:, :, 0].set(cls_id),
      # All beams start equal: only the first may be extended at first.
      jnp.where(jnp.arange(beams) == 0, zeros, _NEVER), zeros > 0, zeros,
      zeros, jnp.int32(1),
      jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), cache))
  advance = functools.partial(
      _advance, step, way == 'released', sep_id, pad_id,
      jnp.asarray(forbidden, jnp.int32))
  last = jax.lax.while_loop(
      lambda s: (s.t < max_length) & ~s.done.all(), advance, first)
  mean = last.total / jnp.maximum(last.length, 1)
  best = (jnp.argmax(mean, 1) if way == 'standard'
          else jnp.zeros(b, jnp.int32))
  return (jnp.take_along_axis(last.ids, best[:, None, None], 1)[:, 0],
          jnp.take_along_axis(mean, best[:, None], 1)[:, 0])


def _advance(step, released, sep_id, pad_id, forbidden, s):
  """Extends every beam by one token."""
  b, beams = s.total.shape
  newest = jax.lax.dynamic_index_in_dim(s.ids, s.t - 1, 2, keepdims=False)
  logits, cache = step(s.cache, newest.reshape(-1))
  logits = logits.astype(jnp.float32)
  if released:
    logits = logits.at[:, forbidden].set(_RELEASED_NEVER)
  logp = jax.nn.log_softmax(logits).reshape(b, beams, -1)
  if not released:
    logp = logp.at[:, :, forbidden].set(_NEVER)
  vocab = logp.shape[-1]
  # A finished beam is carried on unchanged, followed by padding: as one
  # candidate, or as one for every token.
  carried = jnp.where((jnp.arange(vocab) == pad_id) | released, 0., _NEVER)
  total = s.total[..., None] + jnp.where(s.done[..., None], carried, logp)
  slot_length = s.slot_length + ~s.done
  scores = total / slot_length[..., None] if released else total
  _, flat = jax.lax.top_k(scores.reshape(b, -1), beams)
  source, token = flat // vocab, flat % vocab
  pick = functools.partial(jnp.take_along_axis, axis=1)
  done = pick(s.done, source)
  token = jnp.where(done, pad_id, token)
  rows = (jnp.arange(b)[:, None] * beams + source).reshape(-1)
  # The cached image features are the same for all beams of an image.
  cache = {k: x if k == 'image' else jax.tree.map(lambda y: y[rows], x)
           for k, x in cache.items()}
  return Beams(
      pick(s.ids, source[..., None]).at[:, :, s.t].set(token),
      pick(total.reshape(b, -1), flat),
      done | (token == sep_id) | (released & (token == pad_id)),
      pick(s.length, source) + ~done, slot_length, s.t + 1, cache)
