"""What every model promises (models/contract.py), as functions of a model.

Each check takes a `Case`: a small model with random weights. `tests/
test_contract.py` runs them over every model file; a model of one's own can be
given to them in the same way.
"""
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.profiling import program

SIZES = dict(vocab_size=40, num_classes=4, num_attributes=3, num_answers=5)
TEXTS = 16
TOKENS = 20
# Heads of the config for the two kinds of views with fused states.
HEADS = {'answer': dict(outputs='answers', hidden=8, norm=True, act='gelu'),
         'tagging': dict(outputs=7, state='text'),
         'reason': dict(outputs=2, views=('pair',))}
ATOL = 2e-5


def initialise(model, config):
  """Shapes of a model's variables, for all of its views."""
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **SIZES)
  batch |= {f'second_{k}': batch[k] for k in ('image', 'image_mask')}
  return jax.eval_shape(
      lambda b: model.init(jax.random.key(0), b, model.views), batch)


@dataclasses.dataclass
class Case:
  """A model to be checked.

  Attributes:
    model: from `models.build`.
    variables: all of them, random.
    batch: three images with two texts each, padded in pixels and tokens.
  """
  model: Any
  variables: Any
  batch: Any

  @classmethod
  def build(cls, config, seed=0):
    """The case of a config, whose heads are those of `HEADS`."""
    config.dtype = 'float32'
    config.data.sentences = 2
    config.model.heads = HEADS
    model = models.build(config, **SIZES)
    batch = synthetic.synthetic_batch(config.data, batch_size=3, seed=seed,
                                      **SIZES)
    other = synthetic.synthetic_batch(config.data, batch_size=3,
                                      seed=seed + 1, **SIZES)
    batch |= {f'second_{k}': other[k] for k in ('image', 'image_mask')}
    batch = jax.tree.map(jnp.asarray, batch)
    variables = dict(jax.jit(lambda b: model.init(
        jax.random.key(seed), b, model.views))(batch))
    rng = np.random.default_rng(seed)
    # Gates and gains that start at 0 or 1 would hide mistakes.
    variables['params'] = jax.tree.map(
        lambda x: x + .1 * rng.standard_normal(x.shape).astype(x.dtype),
        variables['params'])
    return cls(model, variables, batch)

  def run(self, requests=None, **changes):
    """Outputs of views (all of them) for the batch with other arrays in it."""
    requests = self.model.views if requests is None else requests
    return self._run(self.variables, {**self.batch, **changes},
                     tuple(requests.items()))

  @functools.cached_property
  def _run(self):
    return jax.jit(lambda v, b, requests: self.model.apply(
        v, b, dict(requests), rngs={'sample': jax.random.key(7)}),
                   static_argnums=2)

  def call(self, method, *args):
    """A method of the model, compiled."""
    return jax.jit(lambda v, *a: self.model.apply(
        v, *a, method=method))(self.variables, *args)


def close(a, b, atol=ATOL):
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol,
                                 rtol=1e-4), a, b)


# --- Checks -----------------------------------------------------------------
def check_table(case):
  """`views` is data, and the contract's own `__call__` runs it."""
  model = case.model
  assert type(model).__call__ is contract.BaseModel.__call__
  assert all(isinstance(v, contract.View) for v in model.views.values())
  out = case.run()
  assert set(out) == set(model.views)
  for view, row in model.views.items():
    assert row.heads and out[view]
    for head in row.heads:
      assert model.offers(view, head) and head in model.heads
  assert not model.offers('joint', 'nothing')
  params = case.variables['params']
  close(model.adapt(params, params), params, 0.)


def check_kept_features(case):
  """Image features encoded once, fused with 16 texts, equal the joint view."""
  model, batch = case.model, case.batch
  rng = np.random.default_rng(1)
  shape = (3, TEXTS, batch['text'].shape[-1])
  text = jnp.asarray(rng.integers(5, SIZES['vocab_size'], shape), jnp.int32)
  length = rng.integers(2, shape[-1] + 1, shape[:2])
  mask = jnp.arange(shape[-1]) < length[..., None]
  heads = model.views['joint'].heads
  whole = case.run({'joint': heads}, text=text, text_mask=mask)['joint']
  image = case.call('encode_image', batch)
  assert all(x.shape[0] == 3 for x in jax.tree.leaves(image))

  @jax.jit
  def pairs(image, ids, mask):
    def run(m):
      features = m.encode_text(ids, mask)
      assert all(x.shape[:2] == ids.shape[:2]
                 for x in jax.tree.leaves(features))
      return m.pairs(image, features, heads)
    return model.apply(case.variables, method=run)
  parts = [pairs(image, text[:, half], mask[:, half])
           for half in (slice(0, TEXTS // 2), slice(TEXTS // 2, TEXTS))]
  close(whole, jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts))
  if model.offers('image_only', 'detection'):
    found = case.call('detect', image)
    view = case.run()['image_only']
    close(found, {k: view[k] for k in found})


def check_heads_of_config(case):
  """Heads on named states, of one and of two images."""
  out = case.run()
  l = case.batch['text'].shape[-1]
  assert out['joint']['answer_logits'].shape == (3, 2, SIZES['num_answers'])
  assert out['joint']['tagging_logits'].shape == (3, 2, l, 7)
  assert out['pair']['reason_logits'].shape == (3, 2, 2)
  assert {f'heads_{name}' for name in HEADS} <= set(
      case.variables['params'])


def check_two_images(case):
  """A pair of images is the pooled states of each, side by side."""
  first, second = (
      case.run(**{f'second_{k}': case.batch[f'{which}{k}']
                  for k in ('image', 'image_mask')})['pair']['reason_logits']
      for which in ('', 'second_'))
  assert np.abs(first - second).max() > 1e-4  # The second image matters.
  # A statement about one image has an empty second one.
  empty = {'second_image_mask': jnp.zeros_like(case.batch['image_mask'])}
  alone = case.run(**empty)['pair']['reason_logits']
  assert np.isfinite(alone).all()
  close(alone, case.run(**empty, second_image=case.batch['image'])['pair'][
      'reason_logits'])

  def pooled(m, batch):
    text = m.encode_text(batch['text'], batch['text_mask'])
    both = [m.fuse(m.encode_image({k: batch[p + k] for k in (
        'image', 'image_mask')}), text, False, ('pooled',)).pooled
            for p in ('', 'second_')]
    return m.heads_reason(jnp.concatenate(both, -1))
  close(second, case.call(pooled, case.batch))


def check_padding(case):
  """Padded pixels and tokens change no output of a valid token."""
  batch = case.batch
  noise = jnp.asarray(np.random.default_rng(2).integers(
      0, 255, batch['image'].shape), jnp.uint8)
  changed = {k: jnp.where(batch[f'{k}_mask'][..., None], batch[k], noise)
             for k in ('image', 'second_image')}
  changed |= {k: jnp.where(batch[f'{k}_mask'], batch[k], 7)
              for k in ('text', 'masked_text')}
  assert all((changed[k] != batch[k]).any() for k in changed)

  def valid(out):
    # What a padded cell holds is masked by `grid_mask`.
    out = {k: x for k, x in out.items() if k != 'grid'}
    for view, outputs in out.items():
      key = 'masked_text' if view == 'joint_masked' else 'text'
      mask = np.asarray(batch[f'{key}_mask'])
      out[view] = {k: np.asarray(x)[mask] if np.shape(x)[:3] == mask.shape
                   else x for k, x in outputs.items()}
    return out
  close(valid(case.run()), valid(case.run(**changed)), 1e-6)


def check_decoding(case):
  """Cached decoding equals the causal pass, at a third of its cost.

  Returns:
    ((FLOPs of 20 tokens with caches, without), (seconds ...)), or None for a
    model without captions.
  """
  model, variables, batch = case.model, case.variables, case.batch
  if not model.offers('image_only', 'captioning'):
    return None
  ids = batch['text'][:, :1, :1] * 0 + np.random.default_rng(3).integers(
      5, SIZES['vocab_size'], (3, 1, TOKENS))
  ids = jnp.asarray(ids, jnp.int32)

  def causal(v, ids):
    out = model.apply(v, {**batch, 'text': ids,
                          'text_mask': jnp.ones_like(ids, bool)},
                      {'image_only': ('captioning',)})
    return out['image_only']['caption_logits'][:, 0]

  def start(m, batch):
    return m.decode_start(m.encode_image(batch), TOKENS)

  def cached(v, ids):
    def step(cache, token):
      logits, cache = model.apply(v, cache, token, method='decode_step')
      return cache, logits
    cache = model.apply(v, batch, method=start)
    return jax.lax.scan(step, cache, ids[:, 0].T)[1].swapaxes(0, 1)
  first = lambda v, ids: model.apply(v, batch, method=start)
  first, causal, cached = map(jax.jit, (first, causal, cached))
  close(causal(variables, ids), cached(variables, ids), 5e-5)

  # Without caches every token costs a pass over the text. Both ways encode
  # the image once, which is left out.
  def costs(measure):
    image = measure(first)
    return measure(cached) - image, TOKENS * (measure(causal) - image)
  flops = costs(lambda f: program.flops(jax.make_jaxpr(f)(variables, ids)))
  assert flops[0] * 3 <= flops[1], flops
  return flops, costs(lambda f: _seconds(f, variables, ids))


def _seconds(f, *args):
  """Of the fastest of five calls."""
  jax.block_until_ready(f(*args))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - start)
  return min(times)


CHECKS = (check_table, check_kept_features, check_heads_of_config,
          check_two_images, check_padding, check_decoding)
