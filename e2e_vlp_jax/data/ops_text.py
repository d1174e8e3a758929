"""Texts of a record -> S token sequences, and the S of its ITM partner."""
import logging

import numpy as np

from e2e_vlp_jax.data.rng import uniform


def text(context):
  """Chooses S texts and turns them into token ids.

  Training draws the texts, without repeating one before all were drawn;
  evaluation takes the first S. Blank texts do not count. The partner's texts
  are drawn alike; one that equals a text of this record would be a true
  pair, and is left out.

  Reads texts, partner_texts. Makes text int32 [S,L] and text_mask bool [S,L]
  ([CLS] words [SEP], cut to L with [SEP] kept; all padding and False where
  there is no text), masked_text and masked_text_mask (equal so far),
  partner_text and partner_mask, mlm_labels (all -1), itm_labels int32 [S]
  (1; -1 without text), task_mask/mlm, task_mask/itm, task_mask/captioning.
  """
  tokenizer, s, l = context.tokenizer, context.sentences, context.max_text
  said = []

  def choose(texts, u):
    texts = [t for t in map(str.strip, texts) if t]
    if not context.train or not texts:
      return (texts + [''] * s)[:s]
    order = np.argsort(u[:len(texts)])
    return [texts[order[k % len(texts)]] for k in range(s)]

  def tokenize(texts):
    ids = np.full((len(texts), l), tokenizer.pad_id, np.int32)
    lengths = np.zeros((len(texts), 1), int)
    for k, item in enumerate(texts):
      if not item:
        continue
      row = tokenizer.encode(item)
      if len(row) > l:
        if not said:
          said.append(item)
          logging.warning('a text of %d tokens is cut to data.max_text=%d, '
                          'as all longer ones will be: %r', len(row), l, item)
        row = row[:l - 1] + [tokenizer.sep_id]
      ids[k, :len(row)] = row
      lengths[k] = len(row)
    return ids, np.arange(l) < lengths

  def apply(example):
    texts, partner = example['texts'], example['partner_texts']
    u = uniform(example['seed'], [len(texts) + len(partner)])
    own = {t.strip() for t in texts}
    partner = ['' if t in own else t
               for t in choose(partner, u[len(texts):])]
    ids, mask = tokenize(choose(texts, u) + partner)
    has_text = mask[:s, 0]
    return {
        **example,
        'text': ids[:s], 'text_mask': mask[:s],
        'masked_text': ids[:s], 'masked_text_mask': mask[:s],
        'partner_text': ids[s:], 'partner_mask': mask[s:],
        'mlm_labels': np.full((s, l), -1, np.int32),
        'itm_labels': np.where(has_text, 1, -1).astype(np.int32),
        'task_mask/mlm': has_text.any(), 'task_mask/itm': has_text.any(),
        'task_mask/captioning': has_text.any(),
    }
  return apply


OPS = {'text': text}
