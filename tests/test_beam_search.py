"""Both ways of beam search, against plain loops over lists."""
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.models import beam_search
from tests import conformance
from tests import test_contract

CLS, SEP, PAD, MASK = 0, 2, 1, 3
VOCAB, LENGTH, BEAMS = 11, 12, 5
IMAGES, STATES = 300, 97
IDS = dict(cls_id=CLS, sep_id=SEP, pad_id=PAD)


def log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max()
  return x - np.log(np.exp(x).sum())


# --- Plain implementations --------------------------------------------------
def released(logits_of, images, length):
  """The released code's search: [tokens] of each image's caption.

  Args:
    logits_of: (image, tokens so far) -> [V].
    images: a batch; the search goes on until all of its beams have ended.
    length: of the longest caption, begin token included.
  """
  def logp_of(image, tokens):
    logits = np.array(logits_of(image, tokens), np.float64)
    logits[MASK] = -1e4
    return log_softmax(logits)
  slots = {}
  for image in images:
    logp = logp_of(image, [CLS])
    best = sorted(range(len(logp)), key=lambda v: -logp[v])[:BEAMS]
    slots[image] = [dict(tokens=[CLS, v], total=logp[v], length=1,
                         ended=v in (SEP, PAD)) for v in best]
  while (any(not s['ended'] for image in images for s in slots[image])
         and len(slots[images[0]][0]['tokens']) < length):
    for image in images:
      candidates, lengths = [], []
      for s in slots[image]:
        lengths.append(s['length'] + (not s['ended']))
        logp = (np.zeros(BEAMS) if s['ended']  # As good as all of them.
                else logp_of(image, s['tokens']))
        for v in range(len(logp)):
          total = s['total'] + logp[v]
          candidates.append((total / lengths[-1], total, s,
                             PAD if s['ended'] else v))
      candidates.sort(key=lambda c: -c[0])  # Stable.
      # The length belongs to the slot, not to the beam that moves into it.
      slots[image] = [
          dict(tokens=s['tokens'] + [v], total=total, length=n,
               ended=v in (SEP, PAD))
          for n, (_, total, s, v) in zip(lengths, candidates)]
  return [slots[image][0]['tokens'] for image in images]


def standard(logits_of, images, length, vocab=VOCAB):
  """Sums of log-probabilities; the best mean at the end."""
  out = []
  for image in images:
    slots = [([CLS], 0., False)]
    for _ in range(length - 1):
      candidates = []
      for tokens, total, ended in slots:
        if ended:
          candidates.append((tokens, total, True))
          continue
        logp = log_softmax(logits_of(image, tokens))
        candidates += [(tokens + [v], total + logp[v], v == SEP)
                       for v in range(vocab) if v not in (CLS, PAD)]
      slots = sorted(candidates, key=lambda c: -c[1])[:BEAMS]
    out.append(max(slots, key=lambda s: s[1] / (len(s[0]) - 1))[0])
  return out


def check(found, expected):
  """Tokens [B, L] against lists."""
  for row, tokens in zip(np.asarray(found).tolist(), expected, strict=True):
    tokens = tokens + [PAD] * (len(row) - len(tokens))
    assert row == tokens


# --- Random logits ----------------------------------------------------------
@pytest.fixture(scope='module')
def table():
  """[IMAGES, STATES, V] logits; a text's state depends on all its tokens."""
  logits = np.random.default_rng(0).normal(
      size=(IMAGES, STATES, VOCAB)).astype(np.float32) * 1.5
  logits[:, :, SEP] += .7
  return logits


def table_step(cache, ids):
  state = (cache['state'] * 31 + ids) % STATES
  return (cache['image'][jnp.arange(len(ids)), state],
          {**cache, 'state': state})


def table_logits(table, image, tokens):
  state = 0
  for token in tokens:
    state = (state * 31 + token) % STATES
  return table[image, state]


@pytest.mark.parametrize('way, rows', [('released', IMAGES), ('released', 3),
                                       ('standard', IMAGES)])
def test_300_random_captions(table, way, rows):
  """In one batch, where it never ends early, and in small ones."""
  search = jax.jit(functools.partial(
      beam_search.search, step=table_step, way=way, max_length=LENGTH,
      beams=BEAMS, forbidden=(MASK,) if way == 'released' else (PAD, CLS),
      **IDS))
  plain = {'released': released, 'standard': standard}[way]
  lengths = set()
  for start in range(0, IMAGES, rows):
    images = range(start, start + rows)
    tokens, _ = search({'image': jnp.asarray(table[start:start + rows]),
                        'state': jnp.zeros(rows, jnp.int32)})
    expected = plain(functools.partial(table_logits, table), images, LENGTH)
    check(tokens, expected)
    lengths |= set(map(len, expected))
  if way == 'released' and rows == 3:
    assert min(lengths) < LENGTH  # Some batches ended early.


def test_the_two_ways_differ(table):
  expected = [f(functools.partial(table_logits, table), range(20), LENGTH)
              for f in (released, standard)]
  assert expected[0] != expected[1]


# --- A model ----------------------------------------------------------------
@pytest.mark.parametrize('system, way', [('fiber', 'released'),
                                         ('fiber', 'standard'),
                                         ('e2e_vlp', 'standard')])
def test_a_model_with_caches_searches_as_without(system, way):
  """Reordered caches: every step equals a pass over the whole prefix."""
  config = test_contract.small_config(system)
  config.model.beam_search = way
  case = conformance.Case.build(config)
  found, scores = jax.jit(lambda v, b: beam_search.generate(
      case.model, v, b, mask_id=MASK, max_length=8, beams=BEAMS, **IDS))(
          case.variables, case.batch)

  @jax.jit
  def causal(ids):
    out = case.model.apply(case.variables, {
        **case.batch, 'text': ids, 'text_mask': jnp.ones_like(ids, bool)},
                           {'image_only': ('captioning',)})
    return out['image_only']['caption_logits']

  def logits_of(image, tokens):
    ids = np.full((3, 1, 8), PAD, np.int32)
    ids[image, 0, :len(tokens)] = tokens
    return np.asarray(causal(ids))[image, 0, len(tokens) - 1]
  plain = {'released': released, 'standard': functools.partial(
      standard, vocab=conformance.SIZES['vocab_size'])}[way]
  check(found, plain(logits_of, range(3), 8))
  assert np.isfinite(scores).all()


def test_20_tokens_with_caches_in_a_third_of_the_time():
  """Both compiled, in turns, in CPU seconds; greedy, and the same tokens."""
  config = test_contract.small_config('e2e_vlp')
  config.model.update(dict(width=128, ffn=256, decoder_layers=3))
  config.data.max_text = length = 21  # the begin token, and 20 to find
  case = conformance.Case.build(config)
  ids = dict(IDS, sep_id=-1)  # No text ends early.
  cached = jax.jit(lambda v, b: beam_search.generate(
      case.model, v, b, max_length=length, **ids)[0])

  @jax.jit
  def plain(v, batch):
    def step(t, tokens):
      logits = case.model.apply(v, {
          **batch, 'text': tokens[:, None],
          'text_mask': jnp.ones_like(tokens[:, None], bool)},
                                {'image_only': ('captioning',)})[
          'image_only']['caption_logits'][:, 0]
      best = logits[:, t].at[:, jnp.array([PAD, CLS])].set(-1e9).argmax(-1)
      return tokens.at[:, t + 1].set(best)
    return jax.lax.fori_loop(0, length - 1, step, jnp.full(
        (len(batch['image']), length), PAD).at[:, 0].set(CLS))

  batch = jax.tree.map(lambda x: jnp.tile(x, (8, *(1,) * (x.ndim - 1))),
                       case.batch)
  np.testing.assert_array_equal(cached(case.variables, batch),
                                plain(case.variables, batch))
  seconds = {}
  for _ in range(3):
    for function in (cached, plain):
      start = time.process_time()
      jax.block_until_ready(function(case.variables, batch))
      seconds.setdefault(function, []).append(time.process_time() - start)
  fast, slow = (min(seconds[f]) for f in (cached, plain))
  print(f'20 tokens of {len(batch["image"])} captions: {fast:.3f} CPU s with '
        f'caches, {slow:.3f} without')
  assert slow > 3 * fast


def test_unknown_ways_are_refused():
  config = test_contract.small_config('fiber')
  config.model.beam_search = 'relesed'
  model = models.build(config, **conformance.SIZES)
  with pytest.raises(errors.UserError, match="did you mean 'released'"):
    beam_search.generate(model, {}, {}, max_length=3, **IDS)
