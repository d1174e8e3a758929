"""Texts of a record -> S token sequences, and the S of its ITM partner."""
import logging
import threading

import numpy as np
import tensorflow as tf

from e2e_vlp_jax.data.ops_image import uniform


def _choose(texts, u, count):
  """`count` texts [S] in the order of `u`; '' where there are none.

  Without replacement as far as they go. Without `u` the first ones, once.
  """
  spare = tf.fill([count], '')
  if u is None:
    return tf.concat([texts, spare], 0)[:count]
  texts = tf.gather(texts, tf.argsort(u))
  number = tf.maximum(tf.shape(texts)[0], 1)
  return tf.gather(tf.concat([texts, spare], 0), tf.range(count) % number)


def text(context):
  """Chooses S texts and turns them into token ids.

  Training draws the texts, evaluation takes the first S. Blank texts do not
  count. The partner's text is drawn alike; one that equals a text of this
  record would be a true pair, and is left out.

  Reads texts string [N], partner_texts string [P].
  Makes text int32 [S,L] and text_mask bool [S,L] ([CLS] words [SEP], cut to
  L with [SEP] kept; all padding and False where there is no text),
  masked_text and masked_text_mask (equal so far), partner_text and
  partner_mask, mlm_labels (all -1), itm_labels int32 [S] (1; -1 without
  text), task_mask/mlm, task_mask/itm, task_mask/captioning.
  """
  tokenizer, s, l = context.tokenizer, context.sentences, context.max_text
  cut = {'count': 0}
  lock = threading.Lock()

  def tokenize(texts):
    ids = np.full((len(texts), l), tokenizer.pad_id, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for k, item in enumerate(texts):
      if not item:
        continue
      row = tokenizer.encode(item.decode('utf-8', 'replace'))
      if len(row) > l:
        with lock:
          cut['count'] += 1
          if cut['count'] == 1:
            logging.warning('text: %d tokens cut to data.max_text=%d (said '
                            'once): %r', len(row), l, item.decode('utf-8'))
        row = row[:l - 1] + [tokenizer.sep_id]
      ids[k, :len(row)] = row
      lengths[k] = len(row)
    return ids, lengths

  def apply(example):
    texts = tf.strings.strip(example['texts'])
    texts = tf.boolean_mask(texts, texts != '')
    partner = tf.strings.strip(example['partner_texts'])
    partner = tf.boolean_mask(partner, partner != '')
    if context.train:
      n, p = tf.shape(texts)[0], tf.shape(partner)[0]
      u = uniform(example, [n + p])
      chosen, other = _choose(texts, u[:n], s), _choose(partner, u[n:], s)
    else:
      chosen, other = _choose(texts, None, s), _choose(partner, None, s)
    same = tf.reduce_any(other[:, None] == texts, -1)
    other = tf.where(same, '', other)
    ids, lengths = tf.numpy_function(
        tokenize, [tf.concat([chosen, other], 0)], (tf.int32, tf.int32),
        stateful=False)
    ids = tf.ensure_shape(ids, [2 * s, l])
    lengths = tf.ensure_shape(lengths, [2 * s])
    mask = tf.range(l) < lengths[:, None]
    has_text = lengths[:s] > 0
    any_text = tf.reduce_any(has_text)
    return {
        **example,
        'text': ids[:s], 'text_mask': mask[:s],
        'masked_text': ids[:s], 'masked_text_mask': mask[:s],
        'partner_text': ids[s:], 'partner_mask': mask[s:],
        'mlm_labels': tf.fill([s, l], -1),
        'itm_labels': tf.where(has_text, 1, -1),
        'task_mask/mlm': any_text, 'task_mask/itm': any_text,
        'task_mask/captioning': any_text,
    }
  return apply


OPS = {'text': text}
