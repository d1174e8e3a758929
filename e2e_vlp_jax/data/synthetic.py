"""Random batches with the keys, shapes and types of the input pipeline.

For compilation, benchmarks and tests on machines that have neither
TensorFlow nor data.
"""
import numpy as np

from e2e_vlp_jax.data import keys, pp
from e2e_vlp_jax.errors import UserError


def largest_bucket(data_config):
  """Index of the bucket with the most pixels, which decides what fits."""
  buckets = data_config['buckets']
  return max(range(len(buckets)), key=lambda i: buckets[i][0] * buckets[i][1])


def synthetic_batch(data_config, *, vocab_size, num_classes, num_attributes,
                    num_answers=0, batch_size, seed=0, bucket=0):
  """A batch as `Pipeline.batch` yields it, filled with noise.

  It has the keys that the ops of `pp_train` declare, and those of every
  batch. All invariants of real batches hold: images are smaller than the
  bucket and zero outside `image_mask`, texts are [CLS] words [SEP] padding,
  boxes lie inside the image, masked tokens are words.

  Args:
    data_config: `config.data`; reads pp_train, buckets, sentences (S),
      max_text (L), max_boxes (M) and max_attributes (K).
    vocab_size: number of tokens, at least 5.
    num_classes: number of object classes.
    num_attributes: number of attributes, may be 0.
    num_answers: number of answers (A), may be 0.
    batch_size: B.
    seed: int.
    bucket: index into data_config.buckets.

  Returns:
    dict of numpy arrays; docs/data.md lists the keys.

  Raises:
    UserError: `pp_train` is not a pp string, or lacks an op before another.
  """
  rng = np.random.default_rng([seed, bucket])
  height, width = data_config['buckets'][bucket]
  sizes = {**keys.data_sizes(data_config), 'A': num_answers,
           'H': height, 'W': width}
  batch = _Batch()
  for key, sizes in pp.declared(data_config['pp_train'], sizes):
    shape = (batch_size, *key.row_shape(sizes))
    value = np.asarray(key.draw(keys.Draw(rng, shape, {
        **sizes, 'B': batch_size, 'vocab_size': vocab_size,
        'num_classes': num_classes, 'num_attributes': num_attributes,
        'num_answers': num_answers}, batch)))
    if value.shape != shape:
      raise ValueError(f'the draw of {key.name!r} gave {value.shape}; its '
                       f'declaration {key} means {shape}')
    batch[key.name] = value.astype(key.dtype)
  return dict(batch)


class _Batch(dict):

  def __missing__(self, key):
    raise UserError(f'data.pp_train: an op needs the key {key!r}, which no op '
                    'before it makes')
