"""Caption metrics: BLEU-1..4, ROUGE-L, CIDEr; METEOR where Java is present.

The values are those of coco-caption (`pycocoevalcap`), from raw strings: the
same word splitting (`ptb_tokenizer`), the same formulas and constants.
"""
import collections
import logging
import math
import shutil

import numpy as np

from e2e_vlp_jax.evaluation import ptb_tokenizer

ORDERS = 4
# BLEU of coco-caption: keeps 0/0 at zero and short captions finite.
_TINY, _SMALL = 1e-15, 1e-9
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0

# Of `caption_metrics`; METEOR has a function of its own.
METRICS = ('BLEU1', 'BLEU2', 'BLEU3', 'BLEU4', 'ROUGE_L', 'CIDEr')


def caption_metrics(candidates, references):
  """Scores captions against human ones.

  Args:
    candidates: list of N strings, one per image.
    references: list of N non-empty lists of strings.

  Returns:
    (overall, per_image): {BLEU1..BLEU4, ROUGE_L, CIDEr: float}, and the same
    keys with arrays [N]. Overall BLEU is that of the corpus, not a mean.

  Raises:
    ValueError: no images, an image without references, or unequal lengths.
  """
  if not candidates or len(candidates) != len(references):
    raise ValueError(f'{len(candidates)} captions, {len(references)} sets of '
                     'references: expected equal and not 0')
  candidates = ptb_tokenizer.tokenize_all(list(candidates))
  flat = iter(ptb_tokenizer.tokenize_all([r for s in references for r in s]))
  references = [[next(flat) for _ in s] for s in references]
  if not all(references):
    raise ValueError('an image has no reference captions')
  # '3 1/2' is one token with a no-break space. The original's BLEU and CIDEr
  # split it there, its ROUGE does not.
  split = lambda tokens: ' '.join(tokens).split()
  halves = [split(c) for c in candidates], [
      [split(r) for r in s] for s in references]
  overall, per_image = bleu(*halves)
  for name, values in (('ROUGE_L', rouge_l(candidates, references)),
                       ('CIDEr', cider(*halves))):
    overall[name], per_image[name] = float(np.mean(values)), values
  return overall, per_image


def bleu(candidates, references):
  """BLEU-1..4 with the closest reference length (Papineni et al. 2002).

  Args:
    candidates: list of N token lists.
    references: list of N lists of token lists.

  Returns:
    (corpus, per_image): {BLEU1..4: float}, {BLEU1..4: array [N]}.
  """
  correct, guessed, lengths = [], [], []
  for candidate, refs in zip(candidates, references):
    most = collections.Counter()
    for ref in refs:
      most |= _ngrams(ref)
    hits = [0] * ORDERS
    for ngram, count in (_ngrams(candidate) & most).items():
      hits[len(ngram) - 1] += count
    correct.append(hits)
    guessed.append([max(0, len(candidate) - k) for k in range(ORDERS)])
    _, closest = min((abs(len(r) - len(candidate)), len(r)) for r in refs)
    lengths.append((len(candidate), closest))
  correct, guessed, lengths = map(np.array, (correct, guessed, lengths))
  names = [f'BLEU{n + 1}' for n in range(ORDERS)]
  corpus = _bleu(*(x.sum(0, keepdims=True)
                   for x in (correct, guessed, lengths)))[0]
  per_image = _bleu(correct, guessed, lengths)
  return (dict(zip(names, corpus.tolist())), dict(zip(names, per_image.T)))


def _bleu(correct, guessed, lengths):
  """[N, 4] matched and possible n-grams, [N, 2] lengths -> [N, 4] scores."""
  product = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=1)
  scores = product ** (1 / np.arange(1, ORDERS + 1))
  ratio = (lengths[:, :1] + _TINY) / (lengths[:, 1:] + _SMALL)
  with np.errstate(over='ignore'):
    return scores * np.exp(np.minimum(0, 1 - 1 / ratio))


def rouge_l(candidates, references):
  """ROUGE-L with beta 1.2; best precision and best recall of an image's refs.

  Returns:
    Array [N].
  """
  scores = []
  for candidate, refs in zip(candidates, references):
    # The original splits '' into one empty word.
    candidate, refs = candidate or [''], [r or [''] for r in refs]
    common = [_common_length(r, candidate) for r in refs]
    precision = max(c / len(candidate) for c in common)
    recall = max(c / len(r) for c, r in zip(common, refs))
    scores.append(0.0 if not precision or not recall else
                  (1 + _ROUGE_BETA**2) * precision * recall
                  / (recall + _ROUGE_BETA**2 * precision))
  return np.array(scores)


def _common_length(a, b):
  """Length of the longest common subsequence of two token lists."""
  # Bit-parallel: bit i of `row` is 0 where the length grows at a[i].
  where = collections.defaultdict(int)
  for i, word in enumerate(a):
    where[word] |= 1 << i
  full = row = (1 << len(a)) - 1
  for word in b:
    hit = row & where[word]
    row = ((row + hit) | (row - hit)) & full
  return len(a) - row.bit_count()


def document_frequencies(references):
  """Document frequencies of n-grams, for `cider`.

  Args:
    references: N lists of token lists; any iterable.

  Returns:
    (Counter {n-gram: number of images whose references have it}, N).
  """
  documents, images = collections.Counter(), 0
  for refs in references:
    documents.update(set().union(*map(_ngrams, refs)))
    images += 1
  return documents, images


def cider(candidates, references, frequencies=None):
  """CIDEr as coco-caption's CiderScorer (Vedantam et al. 2015), times 10.

  Args:
    candidates: list of N token lists.
    references: list of N lists of token lists.
    frequencies: from `document_frequencies`, such as a training set's. The
      default is those of `references`; the value then depends on the whole
      evaluated set, and a single image scores 0.

  Returns:
    Array [N].
  """
  scorer = Cider(*(frequencies or document_frequencies(references)))
  return np.array([scorer.scores([c], refs)[0]
                   for c, refs in zip(candidates, references)])


class Cider:
  """CIDEr of single images, by given document frequencies.

  Args:
    documents: {n-gram: number of images whose references have it}. One that is
      not in it counts like one that a single image has.
    images: number of those images.
  """

  def __init__(self, documents, images):
    self._documents, self._log_images = documents, math.log(images)

  def scores(self, candidates, references):
    """[CIDEr of each candidate] for one image.

    Args:
      candidates: list of token lists.
      references: list of token lists.
    """
    known = [(len(r), *self._weigh(_ngrams(r))) for r in references]
    return [10 * sum(self._similarity(c, *self._weigh(_ngrams(c)), *r)
                     for r in known) / ORDERS / len(known)
            for c in candidates]

  def _weigh(self, grams):
    """({n-gram: TF-IDF}, norms of each order)."""
    vector = {g: n * self._rarity(g) for g, n in grams.items()}
    norms = [0.0] * ORDERS
    for ngram, weight in vector.items():
      norms[len(ngram) - 1] += weight**2
    return vector, [math.sqrt(n) for n in norms]

  def _rarity(self, ngram):
    count = self._documents.get(ngram)
    return self._log_images - math.log(count) if count else self._log_images

  def _similarity(self, candidate, vector, norms, ref_length, ref_vector,
                  ref_norms):
    """Sum over the orders of the cosines with a reference."""
    dots = [0.0] * ORDERS
    for ngram in vector.keys() & ref_vector.keys():
      # Clipped, so that repeating a word does not pay.
      dots[len(ngram) - 1] += (
          min(vector[ngram], ref_vector[ngram]) * ref_vector[ngram])
    # The original's length is the number of bigrams.
    delta = max(len(candidate) - 1, 0) - max(ref_length - 1, 0)
    closeness = math.exp(-delta**2 / (2 * _CIDER_SIGMA**2))
    return closeness * sum(d / (a * b) if a and b else d
                           for d, a, b in zip(dots, norms, ref_norms))


def meteor(candidates, references):
  """METEOR 1.5 by its own Java program, or None if it is not installed.

  Needs Java and the extra `[meteor]` (PyPI `pycocoevalcap` carries the jar).

  Args:
    candidates: list of N strings.
    references: list of N lists of strings.

  Returns:
    (float, array [N]), or None after logging what is missing.
  """
  try:
    from pycocoevalcap.meteor import meteor as official  # pylint: disable=g-import-not-at-top
  except ImportError:
    logging.info("METEOR skipped: pip install -e '.[meteor]'")
    return None
  if not shutil.which('java'):
    logging.info('METEOR skipped: no java on the PATH')
    return None
  words = lambda captions: [' '.join(t) for t in
                            ptb_tokenizer.tokenize_all(captions)]
  flat = iter(words([r for s in references for r in s]))
  references = {i: [next(flat) for _ in s] for i, s in enumerate(references)}
  candidates = {i: [c] for i, c in enumerate(words(list(candidates)))}
  scorer = official.Meteor()
  overall, per_image = scorer.compute_score(references, candidates)
  return overall, np.array(per_image)


def _ngrams(tokens):
  """Counter of the 1- to 4-grams of a token list."""
  return collections.Counter(
      tuple(tokens[i:i + n]) for n in range(1, ORDERS + 1)
      for i in range(len(tokens) - n + 1))
