"""Caption generation: beam search over a model's `step_caption`.

Every step decodes the whole prefix again instead of keeping keys and values:
captions are short (tens of tokens) and the decoder is a small part of the
model, so one static shape and no cache is the better bargain.
"""
import functools

import jax
import jax.numpy as jnp


def generate(model, variables, batch, *, cls_id, sep_id, pad_id, max_length,
             beams=1, forbidden=None, rank='sum'):
  """Captions of the images in `batch`, from the image alone.

  Args:
    model: has `init_caption(batch)` and `step_caption(cache, ids)`.
    variables: its parameters and state.
    batch: at least image, image_mask.
    cls_id, sep_id, pad_id: begin, end and padding tokens.
    max_length: L, tokens generated, the begin token included.
    beams: 1 is greedy.
    forbidden: tokens that are never generated; begin and padding by default.
    rank: what candidates are compared by: 'sum' of log-probabilities, or
      their 'mean' as FIBER's code has it, where a finished beam also takes
      all slots below its own. Finished beams are compared by means.

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
  if forbidden is None:
    forbidden = pad_id, cls_id

  def step(t, carry):
    ids, total, done, length = carry
    logits = model.apply(variables, cache, ids.reshape(b * beams, -1),
                         method='step_caption')
    logits = jax.lax.dynamic_index_in_dim(logits, t - 1, 1, keepdims=False)
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    vocab = logp.shape[-1]
    logp = logp.reshape(b, beams, vocab)
    logp = logp.at[:, :, jnp.asarray(forbidden)].set(-1e9)
    # A finished beam is carried on unchanged, with padding: as one candidate,
    # or as one for every token.
    carried = jnp.where(
        (jnp.arange(vocab) == pad_id) | (rank == 'mean'), 0., -1e9)
    logp = jnp.where(done[..., None], carried, logp)
    length = length + ~done
    weight = 1 / length[..., None] if rank == 'mean' else 1.
    scores = ((total[..., None] + logp) * weight).reshape(b, beams * vocab)
    scores, flat = jax.lax.top_k(scores, beams)
    source, token = flat // vocab, flat % vocab
    pick = functools.partial(jnp.take_along_axis, axis=1)
    done, length = pick(done, source), pick(length, source)
    total = scores * length if rank == 'mean' else scores
    ids = pick(ids, source[..., None]).at[:, :, t].set(
        jnp.where(done, pad_id, token))
    return ids, total, done | (token == sep_id), length

  ids, total, _, length = jax.lax.fori_loop(
      1, max_length, step, (ids, total, done, length))
  mean = total / jnp.maximum(length, 1)
  best = jnp.argmax(mean, 1)
  return (jnp.take_along_axis(ids, best[:, None, None], 1)[:, 0],
          jnp.take_along_axis(mean, best[:, None], 1)[:, 0])
