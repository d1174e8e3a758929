"""A queue of past examples, kept as model state.

It holds examples of the global batch and is identical on every device. The
newest examples replace the oldest.
"""
import flax.linen as nn
import jax.numpy as jnp


class Queue(nn.Module):
  """Keeps the last `size` examples of the arrays that it is given.

  Features (floating-point arrays [B, E]) start as normal noise, as in FIBER's
  code, whose loss uses them from the first step. Other arrays start as 0.
  """
  size: int

  @nn.compact
  def __call__(self, new, update):
    """Returns the examples in the queue before `new` is added.

    Args:
      new: {name: [B, ...]}, always with the same names and shapes.
      update: whether `new` is added (in training).

    Returns:
      ({name: [size, ...]}, [size] True where filled).
    """
    def start(x):
      shape = self.size, *x.shape[1:]
      if x.ndim == 2 and jnp.issubdtype(x.dtype, jnp.floating):
        return nn.initializers.normal(1.)(self.make_rng('params'), shape,
                                          x.dtype)
      return jnp.zeros(shape, x.dtype)
    kept = {k: self.variable('queue', k, start, x) for k, x in new.items()}
    count = self.variable('queue', 'count', jnp.zeros, (), jnp.int32)
    out = ({k: v.value for k, v in kept.items()},
           jnp.arange(self.size) < count.value)
    if update and not self.is_initializing():
      rows = next(iter(new.values())).shape[0]
      # Of a batch larger than the queue, only the last rows stay.
      first = max(rows - self.size, 0)
      at = (count.value + jnp.arange(first, rows)) % self.size
      for k, v in kept.items():
        v.value = v.value.at[at].set(new[k][first:].astype(v.value.dtype))
      count.value += rows
    return out
