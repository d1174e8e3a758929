"""Cross-entropy over tokens, shared by masked LM and the captioning losses."""
import jax
import jax.numpy as jnp


def cross_entropy(logits, labels, valid):
  """Token cross-entropy and accuracy.

  Args:
    logits: [..., V].
    labels: [...] int.
    valid: [...] bool.

  Returns:
    (loss, accuracy), each (sum over valid tokens, number of valid tokens).
  """
  loss = -log_likelihood(logits, labels, valid)
  right = jnp.argmax(logits, -1) == jnp.where(valid, labels, 0)
  count = jnp.sum(valid.astype(jnp.float32))
  return ((jnp.sum(loss * valid), count),
          (jnp.sum((right & valid).astype(jnp.float32)), count))


def log_likelihood(logits, labels, valid):
  """[..., V], [...] int, [...] bool -> [...]: log-probability of each label.

  In float32 or more; where not valid, of token 0.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  labels = jnp.where(valid, labels, 0)
  target = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
  return target - jax.nn.logsumexp(logits, -1)
