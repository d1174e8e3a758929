"""Captions drawn from a model's own distribution, over its `decode_step`."""
import functools

import jax
import jax.numpy as jnp

_NEVER = -1e9


def captions(model, variables, batch, key, *, cls_id, sep_id, pad_id,
             max_length, count, forbidden=()):
  """Draws captions of the images in `batch`, without dropout.

  Args:
    model: offers `captioning`; see contract.py.
    variables: its parameters and state.
    batch: at least image, image_mask.
    key: a random key; the same key gives the same captions.
    cls_id, sep_id, pad_id: begin, end and padding tokens.
    max_length: L, tokens of a caption, begin and end token included.
    count: R, captions per image.
    forbidden: tokens that are never drawn.

  Returns:
    (tokens int32 [B, R, L], mask bool [B, R, L]): begin token, words, end
    token, padding. A caption that does not end within L tokens has no end
    token.
  """
  def start(module):
    return module.decode_start(module.encode_image(batch), max_length)
  step = functools.partial(model.apply, variables, method='decode_step')
  never = jnp.asarray(forbidden, jnp.int32)
  cache = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0),
                       model.apply(variables, method=start))
  rows = len(batch['image']) * count

  def draw(carry, key):
    cache, newest, done = carry
    logits, cache = step(cache, newest)
    logits = logits.astype(jnp.float32).at[:, never].set(_NEVER)
    token = jnp.where(done, pad_id, jax.random.categorical(key, logits))
    token = token.astype(jnp.int32)
    return (cache, token, done | (token == sep_id)), (token, ~done)

  first = jnp.full(rows, cls_id, jnp.int32)
  _, (tokens, mask) = jax.lax.scan(
      draw, (cache, first, jnp.zeros(rows, bool)),
      jax.random.split(key, max_length - 1))
  shape = len(batch['image']), count, max_length
  return (jnp.concatenate([first[None], tokens]).T.reshape(shape),
          jnp.concatenate([jnp.ones((1, rows), bool), mask]).T.reshape(shape))
