"""GOLD: weights and losses of FIBER's code, gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.objectives import captioning
from e2e_vlp_jax.objectives import gold
from e2e_vlp_jax.objectives import tokens as tokens_lib
from tests import parity

AGAINST = 'the original code (stored)'


@pytest.fixture(scope='module')
def released(shared):
  """Arrays of FIBER's captioner, a caption each of 15, 10, 6 and 3 tokens."""
  folder = shared / 'reference' / 'fiber_coarse'
  with np.load(folder / 'captioning.npz', allow_pickle=False) as f:
    found = {k: f[k] for k in f.files}
  with np.load(folder / 'captioner_params.npz', allow_pickle=False) as f:
    return {**found, 'bias': f['mlm_score.bias']}


def batch_of(labels):
  """The batch whose captions have these labels, -100 behind their ends."""
  first = np.zeros_like(labels[:, :1])
  text = np.concatenate([first, labels[:, :-1]], 1)[:, None]
  return {'text': np.where(text < 0, 1, text), 'text_mask': text >= 0,
          'task_mask/captioning': np.ones(len(labels), bool)}


def test_the_released_weights_and_losses(record_property, released):
  labels = released['mle.labels']
  valid = (labels >= 0)[:, :-1]
  told = released['gold.behaviour_token_probs'][:, :-1]
  weights = gold.agreement(told, valid, .1)
  logits, batch = released['head_mle.logits'], batch_of(labels)
  objective = gold.Objective(divide_by='padding')
  losses, metrics = objective(
      {'image_only': {'caption_logits': logits[:, None]}}, batch)
  # Another learner: one bias of its word logits instead of another.
  other = logits + released['gold.perturbed_learner_mlm_bias'] - released[
      'bias']
  logp = tokens_lib.log_likelihood(other[:, :-1], labels[:, :-1], valid)
  divide = lambda x: x[0] / x[1]
  for name, ours, theirs in (
      ('weights', weights, released['gold.weights'][:, :-1]),
      ('loss of the model itself', divide(losses['gold']),
       released['gold.train_loss_same_policy']),
      ('loss of another learner', divide(objective.loss(logp, weights, valid)),
       released['gold.train_loss_perturbed_learner'])):
    parity.note(record_property, f'FIBER coarse, GOLD: {name}', AGAINST,
                np.abs(ours - theirs).max(), 1e-6)
  np.testing.assert_allclose(
      divide(metrics['gold_weight']), released['gold.weights'][
          labels >= 0].mean(), rtol=1e-5)


def test_weights_are_constants_of_the_gradient():
  """In float64: w (softmax - one-hot) / tokens of the caption / captions."""
  rng = np.random.default_rng(0)
  b, s, l, v = 3, 2, 7, 9
  text = rng.integers(0, v, (b, s, l))
  mask = np.arange(l) < np.array([[7, 4], [2, 0], [5, 6]])[..., None]
  batch = {'text': text, 'text_mask': mask,
           'task_mask/captioning': np.array([True, True, False])}
  logits = rng.normal(size=(b, s, l, v))
  with jax.enable_x64(True):
    def loss(x):
      total, count = gold.Objective(least=.02)(
          {'image_only': {'caption_logits': x}}, batch)[0]['gold']
      return total / count
    value, found = jax.value_and_grad(loss)(jnp.asarray(logits))
  want, total, raised = np.zeros_like(logits), 0., []
  captions = [(0, 0), (0, 1), (1, 0)]  # The others are empty or left out.
  for i, j in captions:
    n = mask[i, j].sum() - 1
    p = np.exp(logits[i, j, :n])
    p /= p.sum(-1, keepdims=True)
    own = text[i, j, 1:n + 1]
    q = p[np.arange(n), own]
    for t in range(n):
      raised.append(q[t] * q[t:].mean() < .02)
      w = max(q[t] * q[t:].mean(), .02) / n / len(captions)
      total -= w * np.log(q[t])
      want[i, j, t] = w * (p[t] - np.eye(v)[own[t]])
  assert 0 < sum(raised) < len(raised)
  np.testing.assert_allclose(value, total, rtol=1e-12)
  np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


def test_weights_of_one_are_cross_entropy():
  """With least=1 and captions of one length, it is captioning's loss."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(4, 1, 6, 8)).astype(np.float32)
  batch = {'text': rng.integers(0, 8, (4, 1, 6)),
           'text_mask': np.ones((4, 1, 6), bool),
           'task_mask/captioning': np.ones(4, bool)}
  outputs = {'image_only': {'caption_logits': logits}}
  total, count = gold.Objective(least=1.)(outputs, batch)[0]['gold']
  want, number = captioning.Objective()(outputs, batch)[0]['captioning']
  np.testing.assert_allclose(total / count, want / number, rtol=1e-6)


def test_options_that_cannot_be():
  for options, message in (
      (dict(divide_by='token'), "divide_by: 'token'.*'tokens'"),
      (dict(least=2.), 'least: 2.0; expected 0 to 1')):
    with pytest.raises(errors.UserError, match=message):
      gold.Objective(**options).check(None, None)
