"""What a linear classifier reads off the frozen image features.

For each class of the label space, whether the image shows an object of it. The
classifier is fitted on one half of the examples and judged on the other, in
closed form, so it can run at every evaluation of a pre-training. It says
whether the features get better where the losses cannot tell.
"""
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import detect

HEADLINES = {'accuracy': 'linear probe'}
GIVES = ('accuracy', 'balanced_accuracy', 'majority', 'classes')
NO_CURVE = ('majority', 'classes')

_PENALTIES = 10. ** np.arange(-3, 5)  # of standardised features
_LEAST = 5  # images of either kind that a class needs in each half


class Features(base.Task):
  """The pooled features of images: [B, D]."""
  keys = ('image', 'image_mask')

  def compute(self, predictor, variables, batch):
    def pooled(model):
      return model.pooled_image(model.encode_image(batch))
    return {'features': predictor.model.apply(
        variables, method=pooled).astype(jnp.float32)}


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None):
  """Accuracy of ridge classifiers for the presence of each class.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline of unit 'image'.
    max_examples: None = all. Half of them are fitted.
    progress: called with the number of examples done.

  Returns:
    {'accuracy', 'balanced_accuracy' (mean of the two kinds' accuracies; 0.5 is
    chance), 'majority' (accuracy without looking at the image)}, means over
    the classes, and 'classes', how many of them are frequent enough. {} if
    there is none.
  """
  task, labels = Features(), predictor.labels
  features, present = [], []
  for batch, ids in inputs.batches(predictor, pipeline, max_examples,
                                   progress):
    found = predictor.run(variables, batch, task)['features']
    for row, example_id in enumerate(ids.tolist()):
      if example_id >= 0:
        objects = detect.ground_truth(pipeline.record(example_id), labels)
        features.append(found[row])
        present.append(np.isin(np.arange(len(labels.classes)),
                               [o['class_id'] for o in objects]))
  return probe(np.array(features, np.float64), np.array(present))


def probe(x, present):
  """Fits every second example and judges the others.

  Args:
    x: features, float64 [n, D].
    present: bool [n, C].

  Returns:
    as `evaluate`.
  """
  if not len(x):
    return {}
  halves = [slice(0, None, 2), slice(1, None, 2)]
  counts = [(present[half].sum(0), (~present[half]).sum(0)) for half in halves]
  usable = np.min(counts, (0, 1)) >= _LEAST
  if not usable.any():
    return {}
  x = np.nan_to_num(x, posinf=0., neginf=0.)
  fit, judge = halves
  y, true = present[fit][:, usable], present[judge][:, usable]
  weights, bias = ridge(x[fit], np.where(y, 1., -1.))
  right = (x[judge] @ weights + bias > 0) == true
  kinds = [np.where(kind, right, 0).sum(0) / kind.sum(0)
           for kind in (true, ~true)]
  return {'accuracy': float(right.mean()),
          'balanced_accuracy': float(np.mean(kinds)),
          'majority': float(((y.mean(0) > .5) == true).mean()),
          'classes': int(usable.sum())}


def ridge(x, y):
  """Ridge regression; each target's penalty by leave-one-out error.

  Args:
    x: [n, D], is standardised here.
    y: [n, C].

  Returns:
    (weights [D, C], bias [C]) for x as given.
  """
  centre, scale = x.mean(0), x.std(0)
  scale = np.where(scale > 1e-8 * np.abs(x).max(initial=1e-30), scale, np.inf)
  u, s, vt = np.linalg.svd((x - centre) / scale, full_matrices=False)
  mean = y.mean(0)
  uy = u.T @ (y - mean)
  # The prediction for an example that was left out follows from the fit to all
  # of them and the diagonal of the hat matrix; 1/n is the mean's part.
  shrink = s**2 / (s**2 + len(x) * _PENALTIES[:, None])  # [P, min(n, D)]
  rest = 1 - (u**2 @ shrink.T + 1 / len(x))              # [n, P]
  fitted = np.einsum('nk,pk,kc->npc', u, shrink, uy)
  left_out = ((y - mean)[:, None] - fitted) / np.maximum(rest, 1e-9)[..., None]
  best = (left_out**2).sum(0).argmin(0)                  # [C]
  inverse = np.where(s > 0, 1 / np.maximum(s, 1e-30), 0)
  weights = vt.T @ (shrink[best].T * inverse[:, None] * uy) / scale[:, None]
  return weights, mean - centre @ weights
