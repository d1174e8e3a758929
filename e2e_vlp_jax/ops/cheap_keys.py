"""Random keys that are cheap to derive, for the stream 'dropout'.

Every dropout layer folds its name into the step's key. With jax's default
generator (threefry) that is about a hundred scalar operations a layer: of the
37,000 instructions of a step of E2E-VLP `r50`, most. These keys take some
fifteen. They only serve to seed hashes (`kept`); losses and
samples keep jax's generator.
"""
import jax
from jax.extend import random as random_extend
import jax.numpy as jnp

_STEPS = ((16, 0x85ebca6b), (13, 0xc2b2ae35))  # MurmurHash3's finaliser


def mix(x):
  """A bijection of uint32 in which every bit depends on all bits."""
  for shift, factor in _STEPS:
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)


def _fold_in(key, number):
  a, b = key[0], key[1]
  a = mix(a ^ number.astype(jnp.uint32))
  return jnp.stack([a, mix(a + b * jnp.uint32(0x9e3779b9))])


def _seed(seed):
  return _fold_in(jnp.array([0, 1], jnp.uint32), jnp.asarray(seed))


def _numbered(key, shape):
  """[*shape, 2] keys: `key` with numbers folded in that names rarely have."""
  size = 1
  for n in shape:
    size *= n
  numbers = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(2**31)
  return jax.vmap(lambda n: _fold_in(key, n))(numbers).reshape(*shape, 2)


def _bits(key, bit_width, shape):
  if bit_width != 32:
    raise NotImplementedError('cheap keys make 32 random bits')
  return _numbered(key, shape)[..., 1]


_IMPLEMENTATION = random_extend.define_prng_impl(
    key_shape=(2,), seed=_seed, split=_numbered, random_bits=_bits,
    fold_in=_fold_in, name='e2e_vlp_cheap_keys', tag='cheap')


def from_key(key):
  """A cheap key from one of jax's."""
  return jax.random.wrap_key_data(
      jax.random.bits(key, (2,), jnp.uint32), impl=_IMPLEMENTATION)


def words(key):
  """Two uint32 scalars that tell a key (of any kind) from all others."""
  data = jax.random.key_data(key)
  return data[0], data[-1]


def kept(position, seed, rate):
  """True with probability 1 - rate, by a hash of position and seed (int32).

  The steps before the last are those of MurmurHash3's finaliser. In unsigned
  integers these are `mix`; kernels compute with signed ones.
  """
  shift = jax.lax.shift_right_logical
  constant = lambda n: jnp.int32(n - 2**32 if n >= 2**31 else n)
  x = position ^ seed
  x = (x ^ shift(x, jnp.int32(16))) * constant(0x85ebca6b)
  x = (x ^ shift(x, jnp.int32(13))) * constant(0xc2b2ae35)
  # Without the factor, seeds would only permute the positions.
  x = (x ^ shift(x, jnp.int32(16))) * (seed | jnp.int32(1))
  return shift(x, jnp.int32(8)) >= jnp.int32(round(rate * 2**24))
