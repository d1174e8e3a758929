"""Random batches with the keys, shapes and types of the input pipeline.

For compilation, benchmarks and tests of machines that have no TensorFlow
and no data: this module needs numpy alone.
"""
import numpy as np

PAD, CLS, SEP, MASK = 0, 1, 2, 3  # as in our own vocabularies
_FIRST_WORD = 4


def largest_bucket(data_config):
  """Index of the bucket with the most pixels, which decides what fits."""
  buckets = data_config['buckets']
  return max(range(len(buckets)), key=lambda i: buckets[i][0] * buckets[i][1])


def synthetic_batch(data_config, *, vocab_size, num_classes, num_attributes,
                    num_answers=0, batch_size, seed=0, bucket=0):
  """A batch as `Pipeline.batch` yields it, filled with noise.

  All invariants of real batches hold: images are smaller than the bucket and
  zero outside `image_mask`, texts are [CLS] words [SEP] padding, boxes lie
  inside the image, masked tokens are words.

  Args:
    data_config: `config.data`; reads buckets, sentences (S), max_text (L),
      max_boxes (M) and max_attributes (K).
    vocab_size: number of tokens, at least 5.
    num_classes: number of object classes.
    num_attributes: number of attributes, may be 0.
    num_answers: number of answers, may be 0.
    batch_size: B.
    seed: another seed is another batch.
    bucket: index into data_config.buckets.

  Returns:
    dict of numpy arrays; see `e2e_vlp_jax.data.pipeline` for the keys.
  """
  del num_answers
  rng = np.random.default_rng([seed, bucket])
  height, width = data_config['buckets'][bucket]
  b, s, l, m, k = (batch_size, data_config['sentences'],
                   data_config['max_text'], data_config['max_boxes'],
                   data_config['max_attributes'])

  # One side fills the bucket, the other at least three quarters of it.
  rows, cols = (rng.integers((3 * n + 3) // 4, n + 1, b)
                for n in (height, width))
  tall = rng.random(b) < .5
  rows, cols = np.where(tall, height, rows), np.where(tall, cols, width)
  image_mask = ((np.arange(height)[:, None] < rows[:, None, None])
                & (np.arange(width) < cols[:, None, None]))
  image = rng.integers(0, 256, (b, height, width, 3), np.uint8)

  length = rng.integers(min(5, l), l + 1, (b, s))
  position = np.arange(l)
  text_mask = position < length[..., None]
  word = (position > 0) & (position < length[..., None] - 1)
  text = rng.integers(_FIRST_WORD, vocab_size, (b, s, l))
  text = np.where(word, text, np.where(text_mask, SEP, PAD))
  text[..., 0] = CLS

  itm_labels = (rng.random((b, s)) < .5).astype(np.int32)
  masked_text = np.where(itm_labels[..., None] == 1, text,
                         np.roll(text, -1, 0))
  masked_text_mask = np.where(itm_labels[..., None] == 1, text_mask,
                              np.roll(text_mask, -1, 0))
  predicted = (word & (itm_labels[..., None] == 1)
               & ((rng.random((b, s, l)) < .15) | (position == 1)))
  mlm_labels = np.where(predicted, text, -1)
  masked_text = np.where(predicted, MASK, masked_text)

  size = rng.uniform(.1, .5, (b, m, 2))
  centre = rng.uniform(size / 2, 1 - size / 2)
  box_mask = np.arange(m) < rng.integers(1, m + 1, b)[:, None]
  attributes = np.full((b, m, k), -1)
  if num_attributes:
    attributes = np.where(
        np.arange(k) < rng.integers(0, k + 1, (b, m, 1)),
        rng.integers(0, num_attributes, (b, m, k)), -1)

  yes = np.ones(b, bool)
  return {
      'image': image * image_mask[..., None].astype(np.uint8),
      'image_mask': image_mask,
      'text': text.astype(np.int32),
      'text_mask': text_mask,
      'masked_text': masked_text.astype(np.int32),
      'masked_text_mask': masked_text_mask,
      'mlm_labels': mlm_labels.astype(np.int32),
      'itm_labels': itm_labels,
      'boxes': (np.concatenate([centre, size], -1)
                * box_mask[..., None]).astype(np.float32),
      'box_labels': (rng.integers(0, num_classes, (b, m))
                     * box_mask).astype(np.int32),
      'box_attributes': np.where(box_mask[..., None], attributes,
                                 -1).astype(np.int32),
      'box_mask': box_mask,
      'task_mask/mlm': yes, 'task_mask/itm': yes.copy(),
      'task_mask/captioning': yes.copy(), 'task_mask/detection': yes.copy(),
      'task_mask/attributes': np.full(b, num_attributes > 0),
      'example_id': np.arange(b, dtype=np.int64),
      'image_size': np.stack([rows, cols], -1).astype(np.int32),
      'valid': yes.copy(),
  }
