"""Masked words and swapped texts: the inputs of MLM and ITM.

The two ops stand in either order. A swapped text is masked as the true one,
or the presence of [MASK] would tell the pairs apart; its words are not
predicted.
"""
import numpy as np
import tensorflow as tf

from e2e_vlp_jax.data.ops_image import uniform
from e2e_vlp_jax.errors import UserError


def mlm(context, rate=.15):
  """BERT's masking: `rate` of the words, 80% [MASK], 10% random, 10% kept.

  At least one word a text; never a special token or padding.
  Changes masked_text [S,L], partner_text and mlm_labels (the true id where
  a word is predicted, else -1).
  """
  tokenizer, l = context.tokenizer, context.max_text
  special = np.zeros(tokenizer.vocab_size, bool)
  special[list(tokenizer.special_ids)] = True
  words = np.flatnonzero(~special).astype(np.int32)

  def apply(example):
    if 'masked_text' not in example:
      raise UserError('pp: text must stand before mlm')
    ids = tf.concat([example['masked_text'], example['partner_text']], 0)
    mask = tf.concat([example['masked_text_mask'],
                      example['partner_mask']], 0)
    s = context.sentences
    pick, how, word = tf.unstack(uniform(example, [3, 2 * s, l]))
    can = mask & ~tf.gather(tf.constant(special), ids)
    # The word of the lowest draw is always picked.
    pick = tf.where(can, pick, 2.)
    chosen = can & ((pick < rate)
                    | (pick == tf.reduce_min(pick, -1, keepdims=True)))
    random = tf.gather(tf.constant(words), tf.minimum(
        tf.cast(word * len(words), tf.int32), len(words) - 1))
    new = tf.where(how < .8, tokenizer.mask_id,
                   tf.where(how < .9, random, ids))
    new = tf.where(chosen, new, ids)
    predicted = chosen[:s] & (example['itm_labels'] == 1)[:, None]
    return {**example, 'masked_text': new[:s], 'partner_text': new[s:],
            'mlm_labels': tf.where(predicted, ids[:s], -1)}
  return apply


def itm(context, rate=.5):
  """With probability `rate` a text gives way to the partner's.

  Changes masked_text, masked_text_mask, itm_labels (0 where swapped) and
  mlm_labels (-1 there). A text stays where there is none to take its place.
  """
  del context
  def apply(example):
    if 'masked_text' not in example:
      raise UserError('pp: text must stand before itm')
    true = example['itm_labels'] == 1
    partner_mask = example['partner_mask']
    swap = (true & tf.reduce_any(partner_mask, -1)
            & (uniform(example, tf.shape(true)) < rate))
    wide = swap[:, None]
    return {
        **example,
        'masked_text': tf.where(wide, example['partner_text'],
                                example['masked_text']),
        'masked_text_mask': tf.where(wide, partner_mask,
                                     example['masked_text_mask']),
        'mlm_labels': tf.where(wide, -1, example['mlm_labels']),
        'itm_labels': tf.where(swap, 0, example['itm_labels']),
    }
  return apply


OPS = {'mlm': mlm, 'itm': itm}
