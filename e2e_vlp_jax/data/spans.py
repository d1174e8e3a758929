"""Spans: which characters of a text a phrase is, and which tokens those are.

A span is (first character, character after the last).
"""
import re

import numpy as np

_NEXT = 2  # how many characters beyond a span's ends are tried for a token


def token_mask(tokenizer, text, phrases, length):
  """The tokens of phrases of a text; MDETR's and FIBER's positive map.

  A span reaches from the token of its first character to that of its last.
  Where such a character has no token (a space), the next two inwards are
  tried. A span that has no token there, or only beyond `length`, has none.
  Of several tokens of one character (bytes of Chinese ones) the first counts,
  as in the released code.

  Args:
    tokenizer: a `tokenizer.Tokenizer`.
    text: the text.
    phrases: for each of n phrases its list of spans.
    length: L; the text is cut to so many tokens, as `encode` does.

  Returns:
    bool [n, L].
  """
  token_of = {}
  for k, (first, end) in enumerate(tokenizer.token_spans(text, length)):
    for character in range(first, end):
      token_of.setdefault(character, k)
  mask = np.zeros((len(phrases), length), bool)
  for row, spans in zip(mask, phrases):
    for first, end in spans:
      tries = range(_NEXT + 1)
      start = next((token_of[first + k] for k in tries
                    if first + k in token_of), None)
      stop = next((token_of[end - 1 - k] for k in tries
                   if end - 1 - k in token_of), None)
      if start is not None and stop is not None:
        row[start:stop + 1] = True
  return mask


def find(phrase, text, taken=()):
  """The span of a phrase in a text, or None if the text does not have it.

  Whole words come before parts of words, equal letters before others in small
  or capital, and places that are not yet `taken` before those that are.
  Any white space agrees with any other.

  Args:
    phrase: its words.
    text: the whole text.
    taken: spans of earlier phrases.
  """
  words = phrase.split()
  if not words:
    return None
  pattern = r'\s+'.join(map(re.escape, words))
  whole = rf'(?<!\w){pattern}(?!\w)'
  for one in (whole, pattern):
    for flags in (0, re.IGNORECASE):
      found = [m.span() for m in re.finditer(one, text, flags)]
      if found:
        return next((s for s in found if s not in taken), found[0])
  return None


def clean(text, phrases):
  """The text on one line without needless space, and its spans moved along.

  Args:
    text: the text as it was annotated.
    phrases: lists of spans within it.

  Returns:
    (text, lists of spans), the text as `datasets.base.clean` makes it.
  """
  kept = [k for k, c in enumerate(text)
          if not c.isspace() or k and not text[k - 1].isspace()]
  while kept and text[kept[0]].isspace():
    del kept[0]
  while kept and text[kept[-1]].isspace():
    del kept[-1]
  # A span that began or ended in removed space now touches what is left.
  at = np.searchsorted(kept, np.arange(len(text) + 1)).tolist()
  out = ''.join(' ' if text[k].isspace() else text[k] for k in kept)
  return out, [[(at[first], at[end]) for first, end in spans]
               for spans in phrases]


def joined(spans):
  """Sorted spans, those that overlap made one."""
  found = []
  for first, end in sorted(spans):
    if found and first < found[-1][1]:
      found[-1] = (found[-1][0], max(end, found[-1][1]))
    else:
      found.append((first, end))
  return found
