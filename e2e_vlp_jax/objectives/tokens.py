"""Cross-entropy over tokens, shared by masked LM and captioning."""
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
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  labels = jnp.where(valid, labels, 0)
  target = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
  loss = jax.nn.logsumexp(logits, -1) - target
  right = jnp.argmax(logits, -1) == labels
  count = jnp.sum(valid.astype(jnp.float32))
  return ((jnp.sum(loss * valid), count),
          (jnp.sum((right & valid).astype(jnp.float32)), count))
