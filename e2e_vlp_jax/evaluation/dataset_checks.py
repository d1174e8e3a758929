"""Checks of a result that only the dataset itself can make.

A dataset's module may define `check_caption(text, record) -> {metric: bool}`,
{} for a record that it cannot judge. The metrics' names begin with `facts_`.
"""
import functools

from e2e_vlp_jax import discovery
from e2e_vlp_jax.tasks import base

_DATASETS = 'e2e_vlp_jax.data.datasets'


def check_caption(pipeline, example_id, text):
  """{metric: bool} of a caption of an example's image; {} = no check."""
  check = _caption_check(pipeline.name(example_id).partition('/')[0])
  return check(text, pipeline.record(example_id)) if check else {}


def truth(pipeline, example_id, labels):
  """The `tasks.base.Truth` of the image of an example."""
  check = functools.partial(check_caption, pipeline, example_id)
  return base.Truth(
      pipeline.record(example_id), labels,
      (lambda text: all(check(text).values())) if check('') else None)


@functools.cache
def _caption_check(dataset):
  if dataset not in discovery.names(_DATASETS, 'check_caption'):
    return None
  return discovery.load(_DATASETS, dataset, 'check_caption', 'dataset')
