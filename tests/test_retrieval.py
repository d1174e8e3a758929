"""Retrieval: recalls against a derivation by hand, and what is scored."""
import threading

import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.evaluation import retrieval
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import sharding
from tests import small_model
from tests import test_contract
from tests import test_evaluators

PP = 'decode|fit|text'
SEED = 3
config = test_evaluators.config
built = test_evaluators.built


def by_hand(by_image, by_text, owner):
  """The recalls, one query after the other."""
  n, m = by_image.shape
  ranks = {'TR': [], 'IR': []}
  for i in range(n):
    own = [j for j in range(m) if owner[j] == i]
    others = [j for j in range(m) if owner[j] != i]
    if own:
      ranks['TR'].append(min(sum(by_image[i, o] >= by_image[i, j]
                                 for o in others) for j in own))
  for j in range(m):
    ranks['IR'].append(sum(by_text[o, j] >= by_text[owner[j], j]
                           for o in range(n) if o != owner[j]))
  return {f'{k}{top}': np.mean([r < top for r in v])
          for k, v in ranks.items() for top in (1, 5, 10)}


def test_recalls_against_a_derivation_by_hand():
  rng = np.random.default_rng(SEED)
  for ties in (False, True):
    for _ in range(20):
      n, m = rng.integers(1, 25), rng.integers(1, 60)
      owner = rng.integers(0, n, m)  # some images have no text
      a, b = rng.normal(size=(2, n, m))
      if ties:
        a, b = np.round(a), np.round(b)
      got = retrieval.recalls(a, b, owner)
      assert got == pytest.approx(by_hand(a, b, owner))
      assert list(got) == ['TR1', 'TR5', 'TR10', 'IR1', 'IR5', 'IR10']


def test_a_model_that_cannot_tell_finds_nothing():
  owner = np.arange(20)
  for value in (0., np.nan):
    flat = np.full((20, 20), value)
    assert set(retrieval.recalls(flat, flat, owner).values()) == {0.}
  assert set(retrieval.recalls(np.eye(20), np.eye(20), owner).values()) == {1.}


class Heads:
  """A model as far as it tells which heads it has."""

  def __init__(self, views):
    self.views = views

  def offers(self, view, head):
    return head in self.views.get(view, ())


class Table(predictor_lib.Predictor):
  """Vectors and logits come from tables, by example and by text."""

  def __init__(self, built, config, itc=True):
    super().__init__(built[0].model, config, built[0].vocabularies)
    views = {'joint': ('itm',), 'image_only': ('itc',), 'text_only': ('itc',)}
    self.model = Heads(views if itc else {'joint': ('itm',)})
    self.calls, self.encoded, self.texts = [], [], []

  def _of(self, kind, key, size):
    seed = [SEED, kind, *np.ravel(key).tolist()]
    return np.random.default_rng(seed).normal(size=size)

  def image_vector(self, example_id):
    x = self._of(0, example_id + 1, 4)
    return (x / np.linalg.norm(x)).astype(np.float32)

  def text_vector(self, ids):
    x = self._of(1, ids, 4)
    return (x / np.linalg.norm(x)).astype(np.float32)

  def logits(self, example_id, ids):
    x = self._of(2, [example_id + 1, *ids], 2)
    return np.round(x * 2).astype(np.float32) / 2  # with ties

  def encode_images(self, variables, batch, embed=False, features=True):
    self.encoded += [i for i in batch['example_id'].tolist() if i >= 0]
    return (batch['example_id'] if features else None, np.array(
        [self.image_vector(i) for i in batch['example_id']])
            if embed else None)

  def encode_texts(self, variables, ids, mask, embed=False, features=True):
    assert (mask == (ids != 0)).all() and not self.texts
    self.texts += ids.tolist()
    return ids if features else None, np.array(
        [self.text_vector(t) for t in ids]) if embed else None

  def score_pairs(self, variables, images, texts, index):
    self.calls.append(index.shape)
    return np.array([[self.logits(i, texts[k]) for k in row]
                     for i, row in zip(images, index)])


def mean(found):
  """The mean of the six recalls of the last ranking."""
  last = '_itm' if 'TR1_itm' in found else ''
  return np.mean([found[f'{way}R{k}{last}'] for way in 'TI'
                  for k in (1, 5, 10)])


def expected(*args, **kwargs):
  found = ranked(*args, **kwargs)
  return {**found, 'mean': mean(found)}


def ranked(table, pipeline, ids, texts, top_k, score='odds', weight=0.):
  """The evaluator's result, pair by pair, without the mean."""
  written = [pipeline.record(i)['texts'][:texts] for i in ids]
  owner = np.repeat(np.arange(len(ids)), [len(w) for w in written])
  tokens = [inputs.tokenize(table, [t], 1)[0][0] for w in written for t in w]
  logits = np.array([[table.logits(i, t) for t in tokens] for i in ids], float)
  judged = logits[..., 1] - (logits[..., 0] if score == 'odds' else 0)
  if 'image_only' not in table.model.views:
    return by_hand(judged, judged, owner)
  near = (np.array([table.image_vector(i) for i in ids])
          @ np.array([table.text_vector(t) for t in tokens]).T)
  out = by_hand(near, near, owner)
  judged = judged + weight * near
  if top_k:
    by_image, by_text = near.astype(float), near.astype(float)
    for i in range(len(ids)):
      best = sorted(range(len(owner)), key=lambda j: (-near[i, j], j))
      for j in best[:top_k]:
        by_image[i, j] = 100 + judged[i, j]
    for j in range(len(owner)):
      best = sorted(range(len(ids)), key=lambda i: (-near[i, j], i))
      for i in best[:top_k]:
        by_text[i, j] = 100 + judged[i, j]
    out |= {f'{k}_itm': v
            for k, v in by_hand(by_image, by_text, owner).items()}
  return out


@pytest.mark.parametrize(
    'itc, texts, top_k, score, weight, batch_size, at_once', [
        (True, 3, 5, 'odds', 0., 6, 4), (True, 1, 0, 'odds', 0., 16, 4),
        (True, 2, 100, 'logit', 0., 5, 16), (True, 2, 6, 'odds', 1.5, 6, 4),
        (False, 1, 7, 'odds', 0., 6, 4), (False, 2, 7, 'logit', 0., 16, 40)])
def test_against_a_derivation_by_hand(config, built, itc, texts, top_k, score,
                                      weight, batch_size, at_once):
  table = Table(built, config, itc)
  pipeline = test_evaluators.open_pipeline(config, table, PP, batch_size)
  done = []
  got = retrieval.evaluate(table, {}, pipeline, progress=done.append,
                           texts=texts, top_k=top_k, score=score,
                           itc_weight=weight, at_once=at_once)
  assert got == pytest.approx(expected(table, pipeline, range(16), texts,
                                       top_k, score, weight))
  scored = itc and top_k or not itc
  assert done.count(16) == (2 if scored else 1) and max(done) == 16
  # One shape, so one compilation; and no more work than asked for.
  assert len(set(table.calls)) == (1 if scored else 0)
  assert ('TR1_itm' in got) == bool(itc and top_k)
  # Each image and each text is encoded once, whatever the protocol.
  assert sorted(table.encoded) == list(range(16))
  assert len(table.texts) == sum(
      len(pipeline.record(i)['texts'][:texts]) for i in range(16))


def test_progress_within_a_batch(config, built):
  """All 16 images are one batch, which can take minutes."""
  table = Table(built, config)
  pipeline = test_evaluators.open_pipeline(config, table, PP, 16)
  done = []
  retrieval.evaluate(table, {}, pipeline, progress=done.append, texts=1,
                     protocol='exhaustive', at_once=4)
  assert done == [16, 4, 8, 12, 16]


def test_fewer_images(config, built):
  table = Table(built, config)
  pipeline = test_evaluators.open_pipeline(config, table, PP, 4)
  batches = inputs.batches(table, pipeline, 7)
  ids = [i for _, row in batches for i in row.tolist() if i >= 0]
  assert len(ids) == 7
  got = retrieval.evaluate(table, {}, pipeline, max_examples=7, texts=2,
                           top_k=3)
  assert got == pytest.approx(expected(table, pipeline, ids, 2, 3))


def test_two_hosts_agree_with_one(config, built):
  """Each host has its rows; all get the result of all rows."""
  one = Table(built, config)
  want = retrieval.evaluate(
      one, {}, test_evaluators.open_pipeline(config, one, PP, 6), texts=2,
      top_k=4, at_once=3)
  barrier, box, got = threading.Barrier(2, timeout=60), [None, None], [0, 0]

  class Host(Table):
    """Exchanges rows with the other host wherever results meet."""

    def everybodys(self, x):
      box[self.index] = x
      barrier.wait()
      out = np.concatenate(box)
      barrier.wait()
      return out

    def gather(self, batch, *keys):
      found = [self.everybodys(batch[k]) for k in keys]
      return found[0] if len(keys) == 1 else found

    def encode_images(self, *args):
      own, vectors = super().encode_images(*args)
      return own, self.everybodys(vectors)

    def score_pairs(self, *args):
      return self.everybodys(super().score_pairs(*args))

  def run(index):
    host = Host(built, config)
    host.index = index
    pipeline = pipeline_lib.Pipeline(
        config.data, vocabularies=host.vocabularies,
        sources=[dict(name='scenes', split='test', weight=1.)], pp=PP, seed=0,
        batch_size=6, train=False, rows=np.arange(3) + 3 * index)
    got[index] = retrieval.evaluate(host, {}, pipeline, texts=2, top_k=4,
                                    at_once=3)
  threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert got[0] == got[1] == pytest.approx(want)


def test_a_model_without_itc_scores_all_pairs(config, built):
  """E2E-VLP itself, all pairs in one call."""
  predictor, variables = built
  pipeline = test_evaluators.open_pipeline(config, predictor, PP, 8)
  got = retrieval.evaluate(predictor, variables, pipeline, max_examples=8,
                           texts=1, at_once=8)
  batch, = [b for b, _ in inputs.batches(predictor, pipeline, 8)]
  ids, mask = inputs.tokenize(
      predictor,
      [pipeline.record(i)['texts'][0] for i in batch['example_id']], 8)
  every = {**batch, 'text': np.stack([ids] * 8), 'text_mask':
           np.stack([mask] * 8)}
  images, _ = predictor.encode_images(variables, batch)
  words, _ = predictor.encode_texts(variables, ids, mask)
  logits = predictor.score_pairs(
      variables, images, words,
      np.tile(np.arange(8, dtype=np.int32), (8, 1))).astype(float)
  scores = logits[..., 1] - logits[..., 0]
  wanted = by_hand(scores, scores, np.arange(8))
  assert got == pytest.approx({**wanted, 'mean': mean(wanted)})
  assert np.ptp(scores) > .01
  matched = predictor.run(variables, every, base.load('match'))['scores']
  np.testing.assert_allclose(matched, 1 / (1 + np.exp(-scores)), rtol=1e-5)


@pytest.mark.parametrize('options, expected_', [
    (dict(score='probability'), "score='probability'"),
    (dict(protocol='duel'), "protocol='duel'.*did you mean 'dual'"),
    (dict(protocol='dual'), "needs the head 'itc'.*choices: exhaustive"),
    (dict(folds=0), 'folds=0; expected at least 1'),
    (dict(max_pairs=40), 'all 16 x 16 pairs.*max_examples=6')])
def test_refusals(config, built, options, expected_):
  table = Table(built, config, itc=False)
  pipeline = test_evaluators.open_pipeline(config, table, PP, 8)
  with pytest.raises(errors.UserError, match=expected_):
    retrieval.evaluate(table, {}, pipeline, **options)
  assert not table.calls
  table.model.views = {'image_only': ('detection',)}
  with pytest.raises(errors.UserError, match='neither an itc nor an itm'):
    retrieval.evaluate(table, {}, pipeline)


@pytest.mark.parametrize('options, expected_', [
    (dict(top_q=3), "evals.retrieval.options.top_q.*did you mean 'top_k'"),
    (dict(max_pairs=3), 'max_pairs is 3')])
def test_options_of_the_config(config, built, options, expected_):
  config = config.copy_and_resolve_references()
  config.evals = dict(retrieval=dict(
      type='retrieval', source=dict(name='scenes', split='test'), pp=PP,
      max_examples=4, examples_during_training=0, options=options))
  config.samples.count = 0
  with pytest.raises(errors.UserError, match=expected_):
    evaluators.Evaluators(config, built[0].model,
                          built[0].vocabularies).run(built[1])
  config.evals.retrieval.texts = 1
  with pytest.raises(errors.UserError,
                     match=r'evals.retrieval.texts.*evals.retrieval.options'):
    evaluators.Evaluators(config, built[0].model,
                          built[0].vocabularies)


# --- Protocols and folds ----------------------------------------------------
def matrices(table, pipeline, ids, texts):
  """(ITC's logits, ITM's odds, owner) of images and their texts."""
  written = [pipeline.record(i)['texts'][:texts] for i in ids]
  owner = np.repeat(np.arange(len(ids)), [len(w) for w in written])
  tokens = [inputs.tokenize(table, [t], 1)[0][0] for w in written for t in w]
  logits = np.array([[table.logits(i, t) for t in tokens] for i in ids], float)
  near = (np.array([table.image_vector(i) for i in ids])
          @ np.array([table.text_vector(t) for t in tokens]).T)
  return near, logits[..., 1] - logits[..., 0], owner


@pytest.mark.parametrize('protocol', ['exhaustive', 'dual', 'reranked'])
@pytest.mark.parametrize('folds', [1, 4, 5])
def test_protocols_in_folds(config, built, protocol, folds):
  """Each fold equals a plain count among its own images and texts alone."""
  table = Table(built, config)
  pipeline = test_evaluators.open_pipeline(config, table, PP, 6)
  got = retrieval.evaluate(table, {}, pipeline, protocol=protocol, texts=2,
                           folds=folds, top_k=2)
  parts = [range(16)] + (np.array_split(np.arange(16), folds)
                         if folds > 1 else [])
  found = []
  for ids in parts:
    near, odds, owner = matrices(table, pipeline, ids, 2)
    if protocol == 'exhaustive':
      found.append(by_hand(odds, odds, owner))
    else:
      found.append(by_hand(near, near, owner))
    if protocol == 'reranked':
      found[-1] = ranked(table, pipeline, ids, 2, 2)
  whole, *rest = found
  wanted = {**whole, 'mean': mean(whole)}
  if rest:
    wanted |= {f'{k}_folds': np.mean([f[k] for f in rest]) for k in whole}
  assert got == pytest.approx(wanted)
  assert bool(table.calls) == (protocol != 'dual')


def test_all_pairs_of_a_model_with_itc_are_limited(config, built):
  table = Table(built, config)
  pipeline = test_evaluators.open_pipeline(config, table, PP, 8)
  with pytest.raises(errors.UserError, match='all 16 x 16 pairs'):
    retrieval.evaluate(table, {}, pipeline, protocol='exhaustive', texts=1,
                       max_pairs=255)


@pytest.mark.parametrize('ties', [False, True])
def test_candidates(ties):
  """Against sorting, the first of equal ones first; in several blocks."""
  rng = np.random.default_rng(SEED)
  x = rng.normal(size=(1100, 9)).astype(np.float32)
  if ties:
    x = np.round(x)
  for k in (1, 4, 8, 9, 20):
    found = retrieval._best(x, k)  # pylint: disable=protected-access
    for row, marks in zip(x[::100].tolist(), found[::100]):
      best = sorted(range(9), key=lambda j: (-row[j], j))[:k]  # pylint: disable=cell-var-from-loop
      assert np.flatnonzero(marks).tolist() == sorted(best)


# --- What is encoded --------------------------------------------------------
@pytest.mark.parametrize('system, protocol', [
    ('e2e_vlp', 'exhaustive'), ('soho', 'exhaustive'), ('fiber', 'reranked'),
    ('fiber', 'exhaustive')])
def test_each_image_and_text_is_encoded_once(tiny_scenes, monkeypatch, system,
                                             protocol):
  """A real model: nothing is encoded when pairs are scored."""
  predictor, variables = models_of(system, tiny_scenes)
  pipeline = pipeline_lib.Pipeline(
      predictor.config.data, vocabularies=predictor.vocabularies,
      sources=[dict(name='scenes', split='test', weight=1.)], pp=PP, seed=0,
      batch_size=8, train=False)
  rows = {'image': 0, 'text': 0}
  traced = []
  model = type(predictor.model)
  encode = predictor._encode  # pylint: disable=protected-access

  def counted(variables, batch, side, *args):
    rows[side] += batch[f'{side}_mask'].shape[0] * (
        batch['text'].shape[1] if side == 'text' else 1)
    return encode(variables, batch, side, *args)
  monkeypatch.setattr(predictor, '_encode', counted)

  def noting(name, was):
    def encode(self, *args):
      traced.append(name)
      return was(self, *args)
    return encode
  for name in ('encode_image', 'encode_text'):
    monkeypatch.setattr(model, name, noting(name, getattr(model, name)))
  got = retrieval.evaluate(predictor, variables, pipeline, texts=2, top_k=3,
                           protocol=protocol, max_pairs=512)
  assert rows == {'image': 16, 'text': 32}
  # The two programs that encode; that which scores pairs encodes nothing.
  assert len(traced) <= 2 and traced.count('encode_text') == 1
  assert ('TR1_itm' in got) == (protocol == 'reranked')

  # The same scores as views give that encode everything anew.
  if protocol == 'exhaustive':
    batch = pipeline.batch(0)
    ids = batch['example_id'].tolist()
    texts = [pipeline.record(i)['texts'][0] for i in ids]
    ids, mask = inputs.tokenize(predictor, texts, 8)
    images, _ = predictor.encode_images(variables, batch)
    words, _ = predictor.encode_texts(variables, ids, mask)
    found = predictor.score_pairs(variables, images, words, np.tile(
        np.arange(8, dtype=np.int32), (8, 1)))
    every = predictor.run(variables, {
        **batch, 'text': np.stack([ids] * 8),
        'text_mask': np.stack([mask] * 8)}, base.load('match'))['scores']
    np.testing.assert_allclose(
        1 / (1 + np.exp(found[..., 0] - found[..., 1])), every, rtol=2e-4,
        atol=1e-6)


def test_vectors_are_those_of_embed(tiny_scenes):
  """Images and texts apart give what the task gives for both together."""
  predictor, variables = models_of('fiber', tiny_scenes)
  pipeline = pipeline_lib.Pipeline(
      predictor.config.data, vocabularies=predictor.vocabularies,
      sources=[dict(name='scenes', split='test', weight=1.)], pp=PP, seed=0,
      batch_size=8, train=False)
  batch = pipeline.batch(0)
  found = predictor.run(variables, batch, base.load('embed'))
  _, images = predictor.encode_images(variables, batch, True, False)
  np.testing.assert_allclose(images, found['images'], rtol=1e-4, atol=1e-5)
  b, s, l = batch['text'].shape
  _, texts = predictor.encode_texts(
      variables, batch['text'].reshape(b * s, l),
      batch['text_mask'].reshape(b * s, l), True, False)
  np.testing.assert_allclose(texts.reshape(b, s, -1), found['texts'],
                             rtol=1e-4, atol=1e-5)


def test_eight_devices_agree_with_one(tiny_scenes):
  """Images and pairs are split over them, every device has all texts."""
  one, variables = models_of('fiber', tiny_scenes)
  mesh = sharding.make_mesh(dict(data=4, fsdp=2, tensor=1))
  many = predictor_lib.Predictor(one.model, one.config, one.vocabularies, mesh)
  found = [retrieval.evaluate(
      predictor, variables, pipeline_lib.Pipeline(
          one.config.data, vocabularies=one.vocabularies,
          sources=[dict(name='scenes', split='test', weight=1.)], pp=PP,
          seed=0, batch_size=8, train=False), texts=3, top_k=4, folds=2)
           for predictor in (one, many)]
  assert found[0] == pytest.approx(found[1]) and 'TR1_itm_folds' in found[0]


def models_of(system, data_dir):
  """(predictor, variables) of a small model with random parameters."""
  config = test_contract.small_config(system)
  config.data.dir, config.eval_batch_size = str(data_dir), 8
  return small_model.build(config)
