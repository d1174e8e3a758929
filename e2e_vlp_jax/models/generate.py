"""Caption generation: beam search over a model's `step_caption`.

Every step decodes the whole prefix again instead of keeping keys and values:
captions are short (tens of tokens) and the decoder is a small part of the
model, so one static shape and no cache is the better bargain.
"""
import functools

import jax
import jax.numpy as jnp


def generate(model, variables, batch, *, cls_id, sep_id, pad_id, max_length,
             beams=1):
  """Captions of the images in `batch`, from the image alone.

  Args:
    model: has `init_caption(batch)` and `step_caption(cache, ids)`.
    variables: its parameters and state.
    batch: at least image, image_mask.
    cls_id, sep_id, pad_id: begin, end and padding tokens.
    max_length: L, tokens generated, the begin token included.
    beams: 1 is greedy.

  Returns:
    tokens [B, L] int32 (begin token first, padded after the end token) and
    scores [B], the mean log-probability of the generated tokens.
  """
  cache = model.apply(variables, batch, method='init_caption')
  b = jax.tree.leaves(cache)[0].shape[0]
  cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), cache)
  ids = jnp.full((b, beams, max_length), pad_id, jnp.int32)
  ids = ids.at[:, :, 0].set(cls_id)
  # All beams start equal: only the first may be extended at first.
  total = jnp.where(jnp.arange(beams) == 0, 0., -1e9) * jnp.ones((b, 1))
  done = jnp.zeros((b, beams), bool)
  length = jnp.zeros((b, beams))

  def step(t, carry):
    ids, total, done, length = carry
    logits = model.apply(variables, cache, ids.reshape(b * beams, -1),
                         method='step_caption')
    logits = jax.lax.dynamic_index_in_dim(logits, t - 1, 1, keepdims=False)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    vocab = logp.shape[-1]
    logp = logp.reshape(b, beams, vocab)
    forbidden = (jnp.arange(vocab) == pad_id) | (jnp.arange(vocab) == cls_id)
    logp = jnp.where(forbidden, -1e9, logp)
    # A finished beam is carried on unchanged, as its own padding token.
    carried = jnp.where(jnp.arange(vocab) == pad_id, 0., -1e9)
    logp = jnp.where(done[..., None], carried, logp)
    scores = (total[..., None] + logp).reshape(b, beams * vocab)
    total, flat = jax.lax.top_k(scores, beams)
    source, token = flat // vocab, flat % vocab
    pick = functools.partial(jnp.take_along_axis, axis=1)
    ids = pick(ids, source[..., None]).at[:, :, t].set(token)
    done, length = pick(done, source), pick(length, source)
    length = length + ~done
    return ids, total, done | (token == sep_id), length

  ids, total, _, length = jax.lax.fori_loop(
      1, max_length, step, (ids, total, done, length))
  mean = total / jnp.maximum(length, 1)
  best = jnp.argmax(mean, 1)
  return (jnp.take_along_axis(ids, best[:, None, None], 1)[:, 0],
          jnp.take_along_axis(mean, best[:, None], 1)[:, 0])
