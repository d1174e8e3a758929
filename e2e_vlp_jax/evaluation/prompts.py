"""Texts as grounding models read them: phrases of a caption, lists of classes.
"""
import collections

import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import class_captions
from e2e_vlp_jax.data import spans as spans_lib
from e2e_vlp_jax.evaluation import inputs

MOST_PHRASES = 32  # of a text


def phrase_inputs(predictor, captions, count):
  """Batch keys of one image's captions.

  Args:
    predictor: a Predictor.
    captions: list of (text, [spans of each phrase]), at most `count`.
    count: P, to which they are padded.

  Returns:
    text int32 [P, L], text_mask bool [P, L] and phrase_tokens bool
    [P, MOST_PHRASES, L]: the tokens of each phrase, none in rows of padding
    and of phrases that lie beyond L tokens.

  Raises:
    UserError: more phrases than MOST_PHRASES.
  """
  ids, mask = inputs.tokenize(predictor, [text for text, _ in captions], count)
  tokens = np.zeros((count, MOST_PHRASES, ids.shape[-1]), bool)
  for row, (text, phrases) in zip(tokens, captions):
    if len(phrases) > MOST_PHRASES:
      raise errors.UserError(f'text {text[:60]!r}: {len(phrases)} phrases; '
                             f'expected at most {MOST_PHRASES}')
    row[:len(phrases)] = spans_lib.token_mask(
        predictor.tokenizer, text, phrases, ids.shape[-1])
  return {'text': ids, 'text_mask': mask, 'phrase_tokens': tokens}


class Prompt:
  """A list of classes as captions, whose features are computed once.

  Attributes:
    names: the classes, cleaned.
    captions: the texts that the model reads, chunks of the list.
    inputs: `fixed_inputs` of the task ground: prompt_text (the features of the
      captions [1, P, ...]), prompt_tokens [1, P, C, L], prompt_ids [1, P, C],
      the number of each class in `names`, -1 = padding.
  """

  def __init__(self, predictor, variables, names, most=None):
    """Encodes the classes.

    Args:
      predictor: a Predictor.
      variables: {'params': ..., **model_state}.
      names: list of class names.
      most: of them in one caption; None = as many as the model reads.

    Raises:
      UserError: no names, an empty one, or one that stands there twice.
    """
    self.names = checked_names(names)
    length = predictor.config.data.max_text
    chunks = class_captions.chunks(self.names, predictor.tokenizer, length,
                                   most)
    wide = max(map(len, chunks))
    ids = np.full((1, len(chunks), wide), -1, np.int32)
    tokens = np.zeros((1, len(chunks), wide, length), bool)
    self.captions = []
    for k, chunk in enumerate(chunks):
      text, where = class_captions.caption([self.names[i] for i in chunk])
      self.captions.append(text)
      ids[0, k, :len(chunk)] = chunk
      tokens[0, k, :len(chunk)] = spans_lib.token_mask(
          predictor.tokenizer, text, [[s] for s in where], length)
    lost = [self.names[i] for i in ids[0][~tokens[0].any(-1)].tolist()
            if i >= 0]
    if lost:
      raise errors.UserError(f'classes: {lost[0]!r} has no token that the '
                             f'model reads (data.max_text={length})')
    found = inputs.tokenize(predictor, self.captions, len(chunks))
    self.inputs = {
        'prompt_text': _encoded(predictor, variables, *found),
        'prompt_tokens': tokens, 'prompt_ids': ids}


def _encoded(predictor, variables, ids, mask):
  """Features of texts [P, L], with leading axes [1, P]."""
  def encode(variables, ids, mask):
    return predictor.model.apply(variables, ids, mask, method='encode_text')
  return predictor.program('encode_prompt', encode)(
      variables, ids[None], mask[None])


def checked_names(names):
  """The names as they are read, see `class_captions.clean_name`.

  Raises:
    UserError: no names, an empty one, or one that stands there twice.
  """
  found = [class_captions.clean_name(n).strip() for n in names]
  if not found:
    raise errors.UserError('classes: none; expected names, such as '
                           "'cat, traffic light'")
  for k, name in enumerate(found):
    if not name:
      raise errors.UserError(f'classes: number {k + 1}, {names[k]!r}, is '
                             'empty; expected names')
  twice = [n for n, count in collections.Counter(
      f.lower() for f in found).items() if count > 1]
  if twice:
    where = [str(k + 1) for k, n in enumerate(found) if n.lower() == twice[0]]
    raise errors.UserError(f'classes: {twice[0]!r} stands there as number '
                           f'{" and ".join(where)}; expected each name once')
  return found
