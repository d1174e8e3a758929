"""SOHO's visual dictionary: vectors become words, words follow the vectors.

Huang et al., CVPR 2021 (arXiv 2104.03135), section 3.2, and the released
code. The words are no parameters: no gradient reaches them. They live in the
collection 'codebook' and move with the batches of the training. Under jit
over a mesh the batch is the global one, so every device holds the same words.

Two rules of movement (`update`), both with momentum `decay` (d below):
- 'released': counts and sums of the vectors of each word are averaged over
  the steps, word = sum / count, counts smoothed by 1e-5. The averages start
  at zero, so a word without vectors in the first step becomes zero, and one
  without vectors for long drifts to zero. The code trains with d = 0.4.
- 'momentum': the paper's: word = d * word + (1 - d) * mean of its vectors; a
  word without vectors stays as it is. The paper's d is 0.99 (from memory).

Neither brings an unused word back; `revive` does, which is our addition.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors

UPDATES = ('released', 'momentum')
_SMOOTH = 1e-5  # of the released code
# A word counts as dead below this share of a word's average use.
DEAD = .01
_exact = jax.lax.Precision.HIGHEST


class VisualDictionary(nn.Module):
  """Nearest word of a vector, by squared distance.

  Attributes:
    size: K words; width: D.
    update, decay: see above.
    revive: a word of this share of the average use, and without vectors in
      the batch, becomes a random vector of the batch; 0 = never.
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
    """Words of vectors; in training the dictionary then moves.

    Args:
      x: [..., D].
      weight: [...] float, how often each vector counts.
      train: move the words (needs a mutable 'codebook').

    Returns:
      (quantised [..., D] float32, index [...] int32). The index is that
      before the move, the vector that after it (released code). Gradients
      pass from the quantised to x unchanged.
    """
    x = x.astype(jnp.float32)
    words = self.embed.value
    # |x - e|^2 without |x|^2, which is the same for every word.
    distance = jnp.sum(words**2, -1) - 2 * jnp.einsum(
        '...d,kd->...k', x, words, precision=_exact)
    index = jnp.argmin(distance, -1)
    if train and not self.is_initializing() and self.is_mutable_collection(
        'codebook'):
      flat = jax.lax.stop_gradient(x).reshape(-1, self.width)
      self._move(flat, index.ravel(), weight.ravel())
    rows = jnp.take(self.embed.value, index, axis=0)
    return x + jax.lax.stop_gradient(rows - x), index

  def _move(self, x, index, weight):
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
      words = average / smooth[:, None]
    else:
      mean = total / jnp.maximum(count, 1e-9)[:, None]
      words = jnp.where(count[:, None] > 0,
                        d * self.embed.value + (1 - d) * mean,
                        self.embed.value)
    if self.revive:
      mean_use = used.mean()
      dead = (count == 0) & (used < self.revive * mean_use)
      new = x[jax.random.choice(self.make_rng('sample'), len(x), (self.size,),
                                p=weight / jnp.maximum(weight.sum(), 1e-9))]
      # As if it had always been of average use.
      used = jnp.where(dead, mean_use, used)
      words = jnp.where(dead[:, None], new, words)
      average = jnp.where(dead[:, None], new * mean_use, average)
    self.cluster_size.value, self.embed_avg.value = used, average
    self.cluster_sum.value = self.cluster_sum.value + count
    self.embed.value = words

  def similarity(self, x):
    """Cosine of [..., D] states with every word -> [..., K], for MVM.

    Gradients reach the states alone. The cosine with a zero word is 0.
    """
    unit = lambda v: v * jax.lax.rsqrt(
        jnp.maximum(jnp.sum(v**2, -1, keepdims=True), 1e-24))
    return jnp.einsum('...d,kd->...k', unit(x.astype(jnp.float32)),
                      unit(jax.lax.stop_gradient(self.embed.value)))

  def usage(self):
    """How the averaged counts spread over the words.

    Returns:
      {'codebook_perplexity': exp of their entropy, between 1 and K,
      'codebook_dead': share of words below `DEAD` of the average use}.
    """
    used = self.cluster_size.value
    p = used / jnp.maximum(used.sum(), 1e-9)
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-9)))
    return {'codebook_perplexity': jnp.exp(entropy),
            'codebook_dead': jnp.mean(
                (used < DEAD * used.mean()).astype(jnp.float32))}
