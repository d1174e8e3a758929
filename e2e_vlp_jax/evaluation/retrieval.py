"""Retrieval: finds the text of an image, and the image of a text.

Three protocols:
- 'exhaustive': the ITM head scores every pair;
- 'dual': the ITC head embeds every image and every text; the products of
  their vectors rank them;
- 'reranked': 'dual', and then the ITM head scores the best `top_k` of each
  image and of each text again, as in ALBEF (Li et al., 2021).

Every image and every text is encoded once. What is computed for each pair is
the fusion of the two.
"""
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import retrieval_items
from e2e_vlp_jax.tasks import base

HEADLINES = {'TR1': 'text R@1', 'IR1': 'image R@1',
             'TR1_itm': 'text R@1, ITM', 'IR1_itm': 'image R@1, ITM'}
# Those at 5 and at 10 would double the curves.
NO_CURVE = tuple(f'{way}R{k}{which}' for way in 'TI' for k in (5, 10)
                 for which in ('_folds', '_itm_folds'))
GIVES = ('mean', *(f'{way}R{k}{which}' for way in 'TI' for k in (1, 5, 10)
                   for which in ('', '_folds', '_itm', '_itm_folds')))

_RECALLS = (1, 5, 10)
_SCORES = {'odds': lambda x: x[..., 1] - x[..., 0],
           'logit': lambda x: x[..., 1]}
_NEEDS = {'exhaustive': ('itm',), 'dual': ('itc',), 'reranked': ('itc', 'itm')}
_ROWS = 512  # of a matrix that are ranked at once


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, protocol='', texts=0, folds=1, top_k=32,
             score='odds', itc_weight=0., max_pairs=100_000, at_once=16):
  """Recall in both directions.

  An image may have several texts. Each text searches for its image. The search
  of an image succeeds if any of its own texts is among the first K. Ties count
  as errors, so a model that gives all pairs the same score finds nothing.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; its pp only needs to make images.
    max_examples: number of images; None = all.
    progress: called with the number of images done, first while encoding,
      then from 0 again while pairs are scored.
    protocol: see the module's docstring; '' = 'reranked' if the model has both
      heads and top_k is not 0, 'dual' if it has an ITC head, or 'exhaustive'.
    texts: number of captions used per image, the first; 0 = data.sentences.
    folds: also the means over this many parts of the images, in the order of
      the split (5 of COCO's 5,000 test images are its 1K protocol).
    top_k: number of candidates that ITM re-ranks.
    score: score by which ITM ranks: 'odds' (the probability of a match) or
      'logit' (its logit alone, as in FIBER's released code).
    itc_weight: factor with which ITC's logits are added to ITM's score. If ITM
      was trained on negatives sampled by exp(h x ITC's logits), its odds are
      the odds of a match divided by that factor; itc_weight = h multiplies by
      it again (noise-contrastive estimation, Gutmann and Hyvarinen, 2010).
    max_pairs: maximum number of image-text pairs of 'exhaustive'.
    at_once: number of texts per image in one call of ITM.

  Returns:
    {TR1, TR5, TR10 (texts found by images), IR1, IR5, IR10 (images found by
    texts)} by the protocol's first ranking, TR1_itm, ..., IR10_itm after the
    re-ranking, and the mean of the six of the last ranking. With folds, the
    names with '_folds' are means over the folds. {} if no image has a text.

  Raises:
    UserError: the model or the checkpoint lacks a head, too many pairs, or an
      unknown `protocol` or `score`.
  """
  if score not in _SCORES:
    raise errors.UserError(f'retrieval: score={score!r}'
                           + errors.nearest(score, _SCORES))
  if folds < 1:
    raise errors.UserError(f'retrieval: folds={folds}; expected at least 1')
  protocol = _protocol(predictor.model, protocol, top_k)
  items = retrieval_items.Items(
      predictor, variables, pipeline, max_examples, progress,
      texts or predictor.config.data.sentences,
      embed='itc' in _NEEDS[protocol], pairs='itm' in _NEEDS[protocol])
  if not items.owner.size:
    return {}  # The dataset has no texts.
  shape = len(items.ids), len(items.owner)
  parts = [_Part(*shape, items.owner)]
  if folds > 1:
    order = np.argsort(items.ids)
    parts += [_Part(*shape, items.owner, images)
              for images in np.array_split(order, folds) if len(images)]
  if protocol == 'exhaustive':
    _check_number(shape, max_pairs)
    judged = items.match(np.ones(shape, bool), _SCORES[score], at_once)
    return _report([p.recalls(judged, judged) for p in parts])
  near = _finite(items.image_vectors @ items.text_vectors.T)
  out = _report([p.recalls(near, near) for p in parts])
  if protocol == 'dual':
    return out
  # The pairs to score: candidates of the images and of the texts.
  chosen = [p.candidates(near, top_k) for p in parts]
  wanted = np.zeros(shape, bool)
  for part, both in zip(parts, chosen):
    part.add(wanted, both[0] | both[1])
  judged = _finite(items.match(wanted, _SCORES[score], at_once))
  if itc_weight:
    judged += itc_weight * near
  again = _report([p.reranked(near, judged, *both)
                   for p, both in zip(parts, chosen)], '_itm')
  return {**out, **again}


def _protocol(model, protocol, top_k):
  """The protocol to use; UserError if the model lacks a head for it."""
  lacking = {head for head, task in (('itc', 'embed'), ('itm', 'match'))
             if base.load(task).lacks(model)}
  if not protocol:
    if lacking == {'itc', 'itm'}:
      raise errors.UserError('retrieval: this model has neither an itc nor an '
                             'itm head')
    return ('exhaustive' if 'itc' in lacking else
            'dual' if 'itm' in lacking or not top_k else 'reranked')
  if protocol not in _NEEDS:
    raise errors.UserError(f'retrieval: protocol={protocol!r}'
                           + errors.nearest(protocol, _NEEDS))
  for head in _NEEDS[protocol]:
    if head in lacking:
      able = [p for p, heads in _NEEDS.items() if lacking.isdisjoint(heads)]
      raise errors.UserError(
          f'retrieval: protocol={protocol!r} needs the head {head!r}, which '
          'this model does not have; valid choices: '
          + (', '.join(able) or 'none'))
  if protocol == 'reranked' and top_k < 1:
    raise errors.UserError(f'retrieval: top_k={top_k}; expected at least 1 '
                           "with protocol='reranked'")
  return protocol


def _check_number(shape, max_pairs):
  """UserError if all pairs of images and texts are more than `max_pairs`."""
  if np.prod(shape) > max_pairs:
    fits = int(np.sqrt(max_pairs * shape[0] / shape[1]))
    raise errors.UserError(
        f'retrieval: the itm head would have to score all {shape[0]} x '
        f'{shape[1]} pairs of images and texts; max_pairs is {max_pairs}: set '
        f'max_examples={fits} or raise max_pairs')


class _Part:
  """Some of the images, with their texts.

  Args:
    n, m: numbers of all images and texts.
    owner: [m] number of the image to which a text belongs.
    images: numbers of the images; None = all.
  """

  def __init__(self, n, m, owner, images=None):
    self._whole = images is None
    self._images = np.arange(n) if images is None else images
    at = np.full(n, -1)
    at[self._images] = np.arange(len(self._images))
    self._texts = np.flatnonzero(at[owner] >= 0)
    self._owner = at[owner][self._texts]
    assert not self._whole or len(self._texts) == m

  def of(self, matrix):
    """The part of [n, m] scores that concerns these images."""
    return matrix if self._whole else matrix[np.ix_(self._images, self._texts)]

  def add(self, wanted, mine):
    """Sets `wanted` [n, m] where `mine` is set."""
    images, texts = np.nonzero(mine)
    wanted[self._images[images], self._texts[texts]] = True

  def candidates(self, near, top_k):
    """bool: (the best texts of each image, the best images of each text)."""
    near = self.of(near)
    return _best(near, top_k), _best(near.T, top_k).T

  def recalls(self, by_image, by_text):
    """`recalls` of these images; {} if they have no text."""
    if not len(self._owner):
      return {}
    return recalls(self.of(by_image), self.of(by_text), self._owner)

  def reranked(self, near, judged, by_image, by_text):
    """`recalls` where candidates rank above all others, by `judged`."""
    if not len(self._owner):
      return {}
    near = self.of(near)
    judged = self.of(judged).astype(np.float64)
    # The lowest candidate still ranks above the highest of the others.
    lift = near.max() + 1 - judged[by_image | by_text].min()
    return recalls(np.where(by_image, judged + lift, near),
                   np.where(by_text, judged + lift, near), self._owner)


def _report(found, suffix=''):
  """{metric: value} of all images, and of the means over the folds.

  Args:
    found: `recalls` of all images and, if any, of the folds.
    suffix: of the metrics' names.
  """
  every, *folds = found
  out = {f'{k}{suffix}': v for k, v in every.items()}
  folds = [f for f in folds if f]
  if folds:
    out |= {f'{k}{suffix}_folds': float(np.mean([f[k] for f in folds]))
            for k in every}
  return {**out, 'mean': float(np.mean(list(every.values())))}


def recalls(by_image, by_text, owner):
  """TR and IR at 1, 5 and 10.

  Args:
    by_image: [N, M] score of every pair, for ranking the texts of an image.
    by_text: [N, M], for ranking the images of a text.
    owner: [M] number of the image to which a text belongs.

  Returns:
    {'TR1', ..., 'IR10'}: shares of the images with texts (TR), of texts (IR).
  """
  ahead = {'TR': [], 'IR': []}  # how many others are as good or better
  mine = _finite(by_text[owner, np.arange(len(owner))])
  for start in range(0, len(by_image), _ROWS):
    rows = slice(start, start + _ROWS)
    found = _finite(by_image[rows])
    own = owner == np.arange(start, start + len(found))[:, None]
    best = np.max(np.where(own, found, -np.inf), 1, keepdims=True)
    ahead['TR'].append(((found >= best) & ~own).sum(1)[own.any(1)])
    ahead['IR'].append(((_finite(by_text[rows]) >= mine) & ~own).sum(0))
  counts = {'TR': np.concatenate(ahead['TR']), 'IR': np.sum(ahead['IR'], 0)}
  return {f'{name}{k}': float((count < k).mean())
          for name, count in counts.items() for k in _RECALLS}


def _finite(scores):
  """NaN counts as the lowest score."""
  return np.nan_to_num(scores, nan=-1e30, posinf=np.inf, neginf=-np.inf)


def _best(scores, k):
  """bool like `scores`: True on the `k` highest of each row, the first if
  several are equal."""
  if k >= scores.shape[1]:
    return np.ones(scores.shape, bool)
  out = np.zeros(scores.shape, bool)
  for start in range(0, len(scores), _ROWS):
    rows = scores[start:start + _ROWS]
    least = np.partition(rows, -k)[:, -k, None]
    above, equal = rows > least, rows == least
    room = k - above.sum(1, keepdims=True)
    out[start:start + _ROWS] = above | (equal & (equal.cumsum(1) <= room))
  return out
