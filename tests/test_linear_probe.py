"""The linear probe of frozen image features."""
import jax
import numpy as np
import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.evaluation import linear_probe
from e2e_vlp_jax.tasks import detect
from tests import small_model
from tests import small_run


def plain_ridge(x, y, penalty):
  """Solves the normal equations of standardised features."""
  z = (x - x.mean(0)) / x.std(0)
  w = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]),
                      z.T @ (y - y.mean()))
  return lambda new: (new - x.mean(0)) / x.std(0) @ w + y.mean()


@pytest.mark.parametrize('n, d', [(40, 6), (12, 30)])
def test_ridge_is_that_of_the_best_penalty_left_out(n, d):
  """By brute force: every example once left out, for every penalty."""
  rng = np.random.default_rng(0)
  x = rng.normal(3, 2, (n, d))
  y = np.sign(x[:, :1] - 3 + rng.normal(0, 1, (n, 3)))
  weights, bias = linear_probe.ridge(x, y)
  z, mean = (x - x.mean(0)) / x.std(0), y.mean(0)
  for c in range(3):
    lost = []
    for penalty in n * linear_probe._PENALTIES:
      # The standardisation and the mean are those of all examples.
      total = 0
      for i in range(n):
        keep = np.arange(n) != i
        a = np.c_[z, np.ones(n)][keep]
        m = np.diag([penalty] * d + [0.])
        w = np.linalg.solve(a.T @ a + m, a.T @ (y[keep, c] - mean[c]))
        total += (np.r_[z[i], 1] @ w + mean[c] - y[i, c]) ** 2
      lost.append(total)
    best = n * linear_probe._PENALTIES[int(np.argmin(lost))]
    np.testing.assert_allclose(x @ weights[:, c] + bias[c],
                               plain_ridge(x, y[:, c], best)(x), atol=1e-8)


def test_what_the_features_hold_is_found():
  rng = np.random.default_rng(1)
  present = rng.random((400, 4)) < [.5, .2, .8, .004]
  x = np.c_[present * 3. + rng.normal(0, 1, present.shape),
            rng.normal(0, 5, (400, 20)), np.full(400, 7.)]
  found = linear_probe.probe(x, present)
  assert found['classes'] == 3  # The last one is too rare to be judged.
  assert found['accuracy'] > .9 and found['balanced_accuracy'] > .85
  assert found['majority'] == pytest.approx(.7, abs=.05)
  # Features of other images say nothing.
  blind = linear_probe.probe(rng.permutation(x), present)
  assert blind['balanced_accuracy'] == pytest.approx(.5, abs=.08)
  assert blind['accuracy'] == pytest.approx(blind['majority'], abs=.08)
  # A model that has diverged must not end the run that evaluates it.
  broken = linear_probe.probe(np.full_like(x, np.nan), present)
  assert broken['accuracy'] == pytest.approx(broken['majority'])
  assert linear_probe.probe(x[:0], present[:0]) == {}
  assert linear_probe.probe(x[:8], present[:8]) == {}


@pytest.mark.parametrize('system', ['e2e_vlp', 'soho', 'fiber'])
def test_it_evaluates_every_system(system, tiny_scenes, monkeypatch):
  """Random features of a model; the presence is that of the records."""
  config = cli.load_config(f'configs/{system}.py:tiny,probe=48')
  assert config.evals.linear_probe.examples_during_training == 48
  config.data.dir = str(tiny_scenes)
  config.eval_batch_size = 16
  predictor, variables = small_model.build(config)
  variables = jax.tree.map(np.abs, variables)  # Variances are not negative.
  options = config.evals.linear_probe
  pipeline = pipeline_lib.Pipeline(
      config.data, vocabularies=predictor.vocabularies,
      sources=(dict(options.source, split='train', weight=1.),),
      pp=options.pp, seed=0, batch_size=16, train=False)
  given = {}
  probe = linear_probe.probe
  monkeypatch.setattr(linear_probe, 'probe', lambda x, present: (
      given.update(x=x, present=present), probe(x, present))[1])
  scores = linear_probe.evaluate(predictor, variables, pipeline,
                                 max_examples=48)
  assert scores.keys() == set(linear_probe.GIVES)
  assert 0 <= scores['accuracy'] <= 1 and scores['classes'] >= 3
  assert given['x'].shape[0] == 48 and np.isfinite(given['x']).all()
  assert given['x'].std(0).max() > 0
  wanted = [{o['label'] for o in detect.ground_truth(
      pipeline.record(i), predictor.labels)} for i in range(64)]
  rows = [{c for c, p in zip(predictor.labels.classes, row) if p}
          for row in given['present']]
  assert all(row in wanted for row in rows)


def test_it_is_an_evaluator_of_a_run(tiny_scenes):
  """Its metrics can select the best checkpoint."""
  assert 'linear_probe' in evaluators.names()
  assert evaluators.gives('linear_probe') == linear_probe.GIVES
  with pytest.raises(errors.UserError, match='probe: -1'):
    cli.load_config('configs/soho.py:tiny,probe=-1')
  assert 'linear_probe' not in small_run.get_config('evaluated').evals
