"""Queries on a crowd: "no object" by default, left out where it is known."""
import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax.objectives import detection


def example():
  """One image, one layer: a query on the object, two on a crowd, one off."""
  boxes = [[.2, .2, .2, .2],     # the object's
           [.7, .7, .1, .1],     # inside the crowd
           [.57, .7, .1, .1],    # more than half of it inside
           [.3, .8, .2, .2]]     # elsewhere
  logits = np.zeros((1, 4, 3), np.float32)
  logits[0, 0, 1] = 3.
  outputs = {'image_only': {
      'pred_logits': jnp.asarray(logits),
      'pred_boxes': jnp.asarray([boxes], jnp.float32), 'aux_outputs': []}}
  batch = {'boxes': jnp.asarray([[boxes[0], [0, 0, 0, 0]]], jnp.float32),
           'box_labels': jnp.array([[1, 0]]),
           'box_mask': jnp.array([[True, False]]),
           'task_mask/detection': jnp.array([True])}
  # From .55 to .95 along both axes; the second one is padding.
  crowds = {'crowd_boxes': jnp.asarray([[[.75, .75, .4, .4],
                                         [.3, .8, .6, .6]]], jnp.float32),
            'crowd_mask': jnp.array([[True, False]])}
  return outputs, batch, crowds


def class_loss(outputs, batch):
  losses, _ = detection.Objective(no_object=.5)(outputs, batch)
  return losses['class']


def test_a_query_on_a_crowd_is_not_punished():
  outputs, batch, crowds = example()
  (before, count), (after, same) = (
      class_loss(outputs, b) for b in (batch, {**batch, **crowds}))
  # Both queries that lie on the crowd at least by half; each of them has a
  # cross-entropy of log 3.
  np.testing.assert_allclose(before - after, 2 * .5 * np.log(3), rtol=1e-5)
  assert count == same == 1 + .5 * 3
  none = {**crowds, 'crowd_mask': crowds['crowd_mask'] & False}
  np.testing.assert_allclose(class_loss(outputs, {**batch, **none})[0],
                             before)


def test_only_unmatched_queries_are_left_out():
  """A crowd over everything: what is matched learns as before."""
  outputs, batch, crowds = example()
  crowds['crowd_boxes'] = crowds['crowd_boxes'].at[:].set(
      jnp.array([.5, .5, 1., 1.]))
  gradient = jax.grad(lambda x: class_loss(
      {'image_only': {**outputs['image_only'], 'pred_logits': x}},
      {**batch, **crowds})[0])(outputs['image_only']['pred_logits'])
  moved = np.abs(gradient[0]).max(-1) > 0
  assert moved.tolist() == [True, False, False, False]


def test_default_is_no_object_as_in_detr():
  """Without the keys every unmatched query is taught the last class."""
  outputs, batch, _ = example()
  gradient = jax.grad(lambda x: class_loss(
      {'image_only': {**outputs['image_only'], 'pred_logits': x}},
      batch)[0])(outputs['image_only']['pred_logits'])
  assert (np.asarray(gradient)[0, 1:, -1] < 0).all()
