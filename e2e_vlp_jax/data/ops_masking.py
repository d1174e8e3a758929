"""Masked words and swapped texts: the inputs of MLM and ITM.

The two ops may come in either order. Swapped texts are masked too; otherwise
[MASK] would reveal which pairs are true. Their words carry no MLM loss.
"""
import dataclasses

import numpy as np

from e2e_vlp_jax.data import keys, ops_text
from e2e_vlp_jax.data.rng import uniform
from e2e_vlp_jax.errors import UserError


def mlm(context, rate=.15):
  """BERT's masking: `rate` of the words, 80% [MASK], 10% random, 10% kept.

  At least one word per text is chosen; never a special token or padding.
  Changes masked_text, partner_text and mlm_labels.
  """
  tokenizer, l = context.tokenizer, context.max_text
  is_word = np.ones(tokenizer.vocab_size, bool)
  is_word[list(tokenizer.special_ids)] = False
  words = np.flatnonzero(is_word)

  def apply(example):
    if 'masked_text' not in example:
      raise UserError('pp: text must stand before mlm')
    s = len(example['masked_text'])
    ids = np.concatenate([example['masked_text'], example['partner_text']])
    mask = np.concatenate([example['masked_text_mask'],
                           example['partner_mask']])
    pick, how, word = uniform(example['seed'], [3, 2 * s, l])
    # The word with the smallest random number is always chosen.
    pick = np.where(mask & is_word[ids], pick, 2)
    chosen = (pick < 1) & ((pick < rate)
                           | (pick == pick.min(-1, keepdims=True)))
    new = np.where(how < .8, tokenizer.mask_id,
                   np.where(how < .9, words[(word * len(words)).astype(int)],
                            ids))
    new = np.where(chosen, new, ids).astype(np.int32)
    predicted = chosen[:s] & (example['itm_labels'] == 1)[:, None]
    return {**example, 'masked_text': new[:s], 'partner_text': new[s:],
            'mlm_labels': np.where(predicted, ids[:s], -1)}
  return apply


def itm(context, rate=.5):
  """Replaces each text by the partner's with probability `rate`.

  Changes masked_text, masked_text_mask, itm_labels (0 where swapped) and
  mlm_labels (-1 there). Without a partner's text it keeps the true one.
  """
  del context

  def apply(example):
    if 'masked_text' not in example:
      raise UserError('pp: text must stand before itm')
    swap = (example['itm_labels'] == 1) & example['partner_mask'][:, 0]
    swap &= uniform(example['seed'], swap.shape) < rate
    wide = swap[:, None]
    return {
        **example,
        'masked_text': np.where(wide, example['partner_text'],
                                example['masked_text']),
        'masked_text_mask': np.where(wide, example['partner_mask'],
                                     example['masked_text_mask']),
        'mlm_labels': np.where(wide, -1, example['mlm_labels']),
        'itm_labels': np.where(swap, 0, example['itm_labels']),
    }
  return apply


def _draw_labels(draw):
  """About one word in seven, and the first word of each true pair."""
  text, true = draw.batch['text'], draw.batch['itm_labels'][..., None] == 1
  chosen = draw.rng.random(draw.shape) < .15
  chosen[..., 1] = True
  return np.where(chosen & true & (text >= keys.FIRST_WORD), text, -1)


def _draw_masked(draw):
  return np.where(draw.batch['mlm_labels'] >= 0, keys.MASK,
                  draw.batch['masked_text'])


def _draw_swapped(name, other):
  """`name`, or the next row's `other` if the pair is swapped."""
  def draw_(draw):
    true = draw.batch['itm_labels'][..., None] == 1
    return np.where(true, draw.batch[name], np.roll(draw.batch[other], -1, 0))
  return draw_


def _draw_unswapped_labels(draw):
  true = draw.batch['itm_labels'][..., None] == 1
  return np.where(true, draw.batch['mlm_labels'], -1)


def _changed(name, draw):
  """A key of the op `text`, with another function to draw it."""
  key, = (k for k in ops_text.KEYS['text'] if k.name == name)
  return dataclasses.replace(key, draw=draw)


OPS = {'mlm': mlm, 'itm': itm}
KEYS = {
    'mlm': (_changed('mlm_labels', _draw_labels),
            _changed('masked_text', _draw_masked)),
    'itm': (_changed('itm_labels', lambda draw: draw.rng.random(draw.shape)
                     < .5),
            _changed('masked_text', _draw_swapped('masked_text', 'text')),
            _changed('masked_text_mask',
                     _draw_swapped('masked_text_mask', 'text_mask')),
            _changed('mlm_labels', _draw_unswapped_labels))}
