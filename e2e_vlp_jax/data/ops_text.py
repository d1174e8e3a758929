"""Texts of a record -> S token sequences, and the S of its ITM partner."""
import logging

import numpy as np

from e2e_vlp_jax.data import keys, units
from e2e_vlp_jax.data.keys import Key, yes
from e2e_vlp_jax.data.rng import uniform
from e2e_vlp_jax.errors import UserError, nearest


def text(context, field=None):
  """Chooses S texts and turns them into token ids.

  Without `field` they are texts of the image: training samples them and repeats
  none before all were used; evaluation takes the first S. With `field` it is
  the text of the row's item: `text('questions')` needs `config.data.unit` to be
  'question', and S is 1; likewise 'statements', 'entailment', 'refexps' and
  'texts' with their units.

  Blank texts are ignored. A text is cut to L tokens, keeping [SEP]; missing
  texts are padding. The partner's texts are chosen in the same way, except
  those that equal a text of this row, which would be true pairs.

  Reads texts (of the image or the item), partner_texts. Besides the keys of
  the batch it makes partner_text and partner_mask [S,L], for `itm`.

  Args:
    context: S, L, the tokenizer and the unit.
    field: a list of the record whose items are units.
  """
  _check_field(field, context.unit)
  tokenizer, l = context.tokenizer, context.max_text
  s = 1 if field else context.sentences
  warned = False

  def choose(texts, numbers):
    """S of the texts, in training by the random `numbers`."""
    texts = [t for t in map(str.strip, texts) if t]
    if not context.train or not texts:
      return (texts + [''] * s)[:s]
    shuffled = np.argsort(numbers[:len(texts)])
    return [texts[shuffled[k % len(texts)]] for k in range(s)]

  def tokenize(texts):
    nonlocal warned
    ids = np.full((len(texts), l), tokenizer.pad_id, np.int32)
    lengths = np.zeros((len(texts), 1), int)
    for k, words in enumerate(texts):
      if not words:
        continue
      row = tokenizer.encode(words)
      if len(row) > l:
        if not warned:
          warned = True
          logging.warning('a text of %d tokens is cut to data.max_text=%d, '
                          'as all longer ones will be: %r', len(row), l, words)
        row = row[:l - 1] + [tokenizer.sep_id]
      ids[k, :len(row)] = row
      lengths[k] = len(row)
    return ids, np.arange(l) < lengths

  def apply(example):
    texts, partner = example['texts'], example['partner_texts']
    numbers = uniform(example['seed'], [len(texts) + len(partner)])
    own = {t.strip() for t in texts}
    partner = ['' if t in own else t
               for t in choose(partner, numbers[len(texts):])]
    ids, mask = tokenize(choose(texts, numbers) + partner)
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


def _check_field(field, unit):
  if field is None:
    return
  if field not in units.BY_FIELD:
    raise UserError(f'pp: text({field!r})' + nearest(field, units.BY_FIELD))
  if units.BY_FIELD[field].name != unit:
    raise UserError(f'pp: text({field!r}) shows the text of one item and needs '
                    f'data.unit={units.BY_FIELD[field].name!r}; it is {unit!r}')


def _draw_mask(draw):
  """At least five tokens per text, if L allows it."""
  length = draw.shape[-1]
  return np.arange(length) < draw.rng.integers(
      min(5, length), length + 1, draw.shape[:-1])[..., None]


def _draw_text(draw):
  mask = draw.batch['text_mask']
  word = mask & np.pad(mask, ((0, 0), (0, 0), (0, 1)))[..., 1:]
  ids = draw.rng.integers(keys.FIRST_WORD, draw.sizes['vocab_size'],
                          draw.shape)
  ids = np.where(word, ids, np.where(mask, keys.SEP, keys.PAD))
  ids[..., 0] = keys.CLS
  return ids


def _same_as(name):
  return lambda draw: draw.batch[name].copy()


OPS = {'text': text}
KEYS = {'text': (
    Key('text_mask', bool, 'SL', False, 'True on tokens', _draw_mask),
    Key('text', np.int32, 'SL', keys.PAD_ID,
        '[CLS] words [SEP], the true texts', _draw_text),
    Key('masked_text_mask', bool, 'SL', False, 'True on tokens',
        _same_as('text_mask')),
    Key('masked_text', np.int32, 'SL', keys.PAD_ID,
        'the texts after the ops `itm` and `mlm`', _same_as('text')),
    Key('mlm_labels', np.int32, 'SL', -1,
        'the true id where `mlm` wants a word predicted, else -1',
        lambda draw: np.full(draw.shape, -1)),
    Key('itm_labels', np.int32, 'S', -1,
        '1 true pair, 0 swapped by `itm`, -1 no text',
        lambda draw: np.ones(draw.shape)),
    *(Key(f'task_mask/{task}', bool, '', False, 'whether there is a text',
          yes) for task in ('mlm', 'itm', 'captioning')),
)}
SIZES = {'text': lambda field: {'S': 1} if field else {}}
