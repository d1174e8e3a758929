"""SOHO's visual dictionary: vector quantisation with an EMA codebook.

Huang et al., CVPR 2021 (arXiv 2104.03135), section 3.2, and the released
code. The codes are not parameters: no gradient reaches them. They are kept in
the collection 'codebook' and updated from each training batch. Under jit over
a mesh the batch is the global one, so every device has the same codes.

Two update rules (`update`), both with momentum `decay` (d below):
- 'released': counts and sums of the vectors of each code are averaged over
  the steps, code = sum / count, counts smoothed by 1e-5. The averages start
  at zero, so a code without vectors in the first step becomes zero, and one
  without vectors for long drifts to zero. The released code uses d = 0.4.
- 'momentum': the paper's rule, code = d * code + (1 - d) * mean of its vectors;
  a code without vectors does not change. The paper's d is 0.99 (from memory).

Neither rule revives an unused code; `revive` does, which is our addition.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors

UPDATES = ('released', 'momentum')
_SMOOTH = 1e-5  # as in the released code
# A code counts as dead below this share of the average use.
DEAD = .01
_exact = jax.lax.Precision.HIGHEST


class VisualDictionary(nn.Module):
  """The nearest code of a vector, by squared distance.

  Attributes:
    size: K codes.
    width: D.
    update, decay: see above.
    revive: a code below this share of the average use, and without vectors in
      the batch, is replaced by a random vector of the batch; 0 = never.
  """
  size: int
  width: int
  update: str = 'released'
  decay: float = .4
  revive: float = 0.

  def setup(self):
    if self.update not in UPDATES:
      raise errors.UserError(
          f'model.dictionary.update: no rule {self.update!r}'
          + errors.nearest(self.update, UPDATES))
    shape = self.size, self.width
    # The names are those of the released checkpoints.
    self.embed = self.variable('codebook', 'embed', lambda: jax.random.normal(
        self.make_rng('params'), shape))
    self.cluster_size = self.variable('codebook', 'cluster_size', jnp.zeros,
                                      shape[:1])
    self.cluster_sum = self.variable('codebook', 'cluster_sum', jnp.zeros,
                                     shape[:1])
    self.embed_avg = self.variable('codebook', 'embed_avg', jnp.zeros, shape)

  def __call__(self, x, weight, train=False):
    """Quantises vectors; in training, then updates the codes.

    Args:
      x: [..., D].
      weight: [...] float, how many times each vector counts.
      train: update the codes (needs a mutable 'codebook').

    Returns:
      (quantised [..., D] float32, index [...] int32). The index is looked up
      before the update, the vector after it (released code). Gradients pass
      from the quantised vector to x unchanged.
    """
    x = x.astype(jnp.float32)
    codes = self.embed.value
    # |x - e|^2 without |x|^2, which is the same for every code.
    distance = jnp.sum(codes**2, -1) - 2 * jnp.einsum(
        '...d,kd->...k', x, codes, precision=_exact)
    index = jnp.argmin(distance, -1)
    if train and not self.is_initializing() and self.is_mutable_collection(
        'codebook'):
      flat = jax.lax.stop_gradient(x).reshape(-1, self.width)
      self._update(flat, index.ravel(), weight.ravel())
    rows = jnp.take(self.embed.value, index, axis=0)
    return x + jax.lax.stop_gradient(rows - x), index

  def _update(self, x, index, weight):
    """x [n, D], index [n], weight [n]."""
    d = self.decay
    member = jax.nn.one_hot(index, self.size) * weight[:, None]  # [n, K]
    count = member.sum(0)
    total = jnp.einsum('nk,nd->kd', member, x, precision=_exact)
    used = d * self.cluster_size.value + (1 - d) * count
    average = d * self.embed_avg.value + (1 - d) * total
    if self.update == 'released':
      n = used.sum()
      smooth = (used + _SMOOTH) / (n + self.size * _SMOOTH) * n
      codes = average / smooth[:, None]
    else:
      mean = total / jnp.maximum(count, 1e-9)[:, None]
      codes = jnp.where(count[:, None] > 0,
                        d * self.embed.value + (1 - d) * mean,
                        self.embed.value)
    if self.revive:
      mean_use = used.mean()
      dead = (count == 0) & (used < self.revive * mean_use)
      new = x[jax.random.choice(self.make_rng('sample'), len(x), (self.size,),
                                p=weight / jnp.maximum(weight.sum(), 1e-9))]
      # Give it the statistics of average use.
      used = jnp.where(dead, mean_use, used)
      codes = jnp.where(dead[:, None], new, codes)
      average = jnp.where(dead[:, None], new * mean_use, average)
    self.cluster_size.value, self.embed_avg.value = used, average
    self.cluster_sum.value = self.cluster_sum.value + count
    self.embed.value = codes

  def similarity(self, x):
    """Cosine of [..., D] states with every code -> [..., K], for MVM.

    Gradients reach the states only. The cosine with a zero code is 0.
    """
    unit = lambda v: v * jax.lax.rsqrt(
        jnp.maximum(jnp.sum(v**2, -1, keepdims=True), 1e-24))
    return jnp.einsum('...d,kd->...k', unit(x.astype(jnp.float32)),
                      unit(jax.lax.stop_gradient(self.embed.value)))

  def usage(self):
    """How evenly the codes are used, by the averaged counts.

    Returns:
      {'codebook_perplexity': exp of their entropy, between 1 and K,
      'codebook_dead': share of codes below `DEAD` of the average use}.
    """
    used = self.cluster_size.value
    p = used / jnp.maximum(used.sum(), 1e-9)
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-9)))
    return {'codebook_perplexity': jnp.exp(entropy),
            'codebook_dead': jnp.mean(
                (used < DEAD * used.mean()).astype(jnp.float32))}
