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
    self.calls = []

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

  def run(self, variables, batch, task, **options):
    assert task.name == 'embed'
    return {'images': np.array([self.image_vector(i)
                                for i in batch['example_id']]),
            'texts': np.array([[self.text_vector(t) for t in row]
                               for row in batch['text']])}

  def encode_images(self, variables, batch):
    return batch['example_id']

  def score_pairs(self, variables, images, ids, mask):
    self.calls.append(ids.shape)
    assert (mask == (ids != 0)).all()
    return np.array([[self.logits(i, t) for t in row]
                     for i, row in zip(images, ids)])


def expected(table, pipeline, ids, texts, top_k, score='odds', weight=0.):
  """The evaluator's result, pair by pair."""
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

    def run(self, variables, batch, task, **options):
      return {k: self.everybodys(v) for k, v in super().run(
          variables, batch, task).items()}

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
  logits = predictor.score_pairs(
      variables, predictor.encode_images(variables, batch), every['text'],
      every['text_mask']).astype(float)
  scores = logits[..., 1] - logits[..., 0]
  assert got == pytest.approx(by_hand(scores, scores, np.arange(8)))
  assert np.ptp(scores) > .01
  matched = predictor.run(variables, every, base.load('match'))['scores']
  np.testing.assert_allclose(matched, 1 / (1 + np.exp(-scores)), rtol=1e-5)


@pytest.mark.parametrize('options, expected_', [
    (dict(score='probability'), "score='probability'"),
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
