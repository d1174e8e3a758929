"""Retrieval: finds the text of an image, and the image of a text.

A model with an ITC head (task 'embed') embeds every image and text once and
ranks by ITC's logits. Its ITM head (task 'match') then re-ranks the best
`top_k`, as in ALBEF (Li et al., 2021). A model without ITC scores every pair by
ITM, which is affordable for some hundreds of images.
"""
import logging

import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.tasks import base

HEADLINES = {'TR1': 'text R@1', 'IR1': 'image R@1',
             'TR1_itm': 'text R@1, ITM', 'IR1_itm': 'image R@1, ITM'}

_RECALLS = (1, 5, 10)
_SCORES = {'odds': lambda x: x[..., 1] - x[..., 0],
           'logit': lambda x: x[..., 1]}


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, texts=None, top_k=32, score='odds', itc_weight=0.,
             max_pairs=100_000, at_once=16):
  """Recall in both directions.

  An image may have several texts. Each text searches for its image. The search
  of an image succeeds if any of its own texts is among the first K. Ties count
  as errors, so a model that gives all pairs the same score finds nothing.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; its pp only needs to make images.
    max_examples: number of images; None = all.
    progress: called with the number of images done, first while embedding,
      then from 0 again while pairs are scored.
    texts: number of captions used per image, the first; None = data.sentences.
    top_k: number of candidates that ITM re-ranks; 0 = none.
    score: score by which ITM ranks: 'odds' (the probability of a match) or
      'logit' (its logit alone, as in FIBER's released code).
    itc_weight: factor with which ITC's logits are added to ITM's score. If ITM
      was trained on negatives sampled by exp(h x ITC's logits), its odds are
      the odds of a match divided by that factor; itc_weight = h multiplies by
      it again (noise-contrastive estimation, Gutmann and Hyvarinen, 2010).
    max_pairs: maximum number of image-text pairs for a model without ITC.
    at_once: number of texts per image in one call of ITM.

  Returns:
    {TR1, TR5, TR10 (texts found by images), IR1, IR5, IR10 (images found by
    texts)} by ITC, and TR1_itm, ..., IR10_itm after ITM's re-ranking. Without
    ITC only the former, by ITM. {} if no image has a text.

  Raises:
    UserError: the model has neither head, the checkpoint lacks one, too many
      pairs, or an unknown `score`.
  """
  if score not in _SCORES:
    raise errors.UserError(f'retrieval: score={score!r}'
                           + errors.nearest(score, _SCORES))
  embed, match = base.load('embed'), base.load('match')
  itc = not embed.lacks(predictor.model)
  itm = not match.lacks(predictor.model) and (top_k or not itc)
  if not itc and not itm:
    raise errors.UserError('retrieval: this model has neither an itc nor an '
                           'itm head')
  items = _Items(predictor, variables, pipeline, max_examples, progress,
                 texts or predictor.config.data.sentences,
                 embed if itc else None)
  if not items.owner.size:
    return {}  # The dataset has no texts.
  shape = len(items.ids), len(items.owner)
  if itc:
    near = items.image_vectors @ items.text_vectors.T
    out = recalls(near, near, items.owner)
    if not itm:
      return out
    # The pairs to score: candidates of the images and of the texts.
    by_image, by_text = _best(near, top_k, 1), _best(near, top_k, 0)
  else:
    _check_number(shape, max_pairs)
    by_image = by_text = np.ones(shape, bool)
  logits = items.match(by_image | by_text, at_once, progress)
  judged = np.nan_to_num(_SCORES[score](logits.astype(np.float64)), nan=-1e30)
  if not itc:
    return recalls(judged, judged, items.owner)
  judged += itc_weight * near
  # Candidates rank above all others.
  above = judged - np.min(judged[by_image | by_text], initial=0) + 2
  again = recalls(np.where(by_image, above, near),
                  np.where(by_text, above, near), items.owner)
  return {**out, **{f'{k}_itm': v for k, v in again.items()}}


def _check_number(shape, max_pairs):
  """UserError if all pairs of images and texts are more than `max_pairs`."""
  if np.prod(shape) > max_pairs:
    fits = int(np.sqrt(max_pairs * shape[0] / shape[1]))
    raise errors.UserError(
        f'retrieval: this model has no itc head, and its itm head would have '
        f'to score all {shape[0]} x {shape[1]} pairs of images and texts; '
        f'max_pairs is {max_pairs}: set max_examples={fits} or raise '
        'max_pairs')


def recalls(by_image, by_text, owner):
  """TR and IR at 1, 5 and 10.

  Args:
    by_image: [N, M] score of every pair, for ranking the texts of an image.
    by_text: [N, M], for ranking the images of a text.
    owner: [M] number of the image to which a text belongs.

  Returns:
    {'TR1', ..., 'IR10'}: shares of the images with texts (TR), of texts (IR).
  """
  # NaN counts as the lowest score.
  clean = lambda x: np.where(np.isnan(x), -np.inf, x)
  by_image, by_text = clean(by_image), clean(by_text)
  own = owner == np.arange(len(by_image))[:, None]
  ahead = {}
  best = np.max(np.where(own, by_image, -np.inf), 1, keepdims=True)
  ahead['TR'] = ((by_image >= best) & ~own).sum(1)[own.any(1)]
  mine = by_text[owner, np.arange(len(owner))]
  ahead['IR'] = ((by_text >= mine) & ~own).sum(0)
  return {f'{name}{k}': float((count < k).mean())
          for name, count in ahead.items() for k in _RECALLS}


def _best(scores, k, axis):
  """bool like `scores`: True on the `k` highest along `axis`."""
  order = np.argsort(-scores, axis, kind='stable')
  out = np.zeros(scores.shape, bool)
  np.put_along_axis(out, np.take(order, range(min(k, scores.shape[axis])),
                                 axis), True, axis)
  return out


class _Items:
  """The images and texts of an evaluation, in the order of its batches.

  Attributes:
    ids: [N] example_id of the images.
    owner: [M] number of the image to which a text belongs.
    image_vectors, text_vectors: float32 [N, E] and [M, E], if embedded;
      their products are ITC's logits.
  """

  def __init__(self, predictor, variables, pipeline, max_examples, progress,
               texts, embed):
    self._predictor, self._variables = predictor, variables
    self._batches = lambda progress: inputs.batches(
        predictor, pipeline, max_examples, progress)
    ids, owner, tokens, images, vectors = [], [], [], [], []
    cut = {}
    for batch, row_ids in self._batches(progress):
      written = [[t for t in map(str.strip, pipeline.record(i)['texts']) if t
                  ][:texts] if i >= 0 else [] for i in row_ids]
      encoded = [inputs.tokenize(predictor, row, texts) for row in written]
      cut |= inputs.cut_texts(predictor, [t for row in written for t in row])
      if embed:
        found = predictor.run(variables, {**batch, **inputs.text_rows(
            predictor, batch, dict(zip(row_ids.tolist(), encoded)), texts)},
                              embed)
      for row, example_id in enumerate(row_ids):
        if example_id < 0:
          continue
        count = len(written[row])
        owner += [len(ids)] * count
        tokens += list(zip(*encoded[row]))[:count]
        ids.append(int(example_id))
        if embed:
          images.append(found['images'][row])
          vectors += list(found['texts'][row, :count])
    if cut:
      logging.warning('retrieval: %d texts are cut to data.max_text=%d tokens, '
                      'such as %r', len(cut), predictor.config.data.max_text,
                      next(iter(cut)))
    self.ids, self.owner = np.array(ids, int), np.array(owner, int)
    self._tokens = tokens
    if embed and owner:
      self.image_vectors, self.text_vectors = np.stack(images), np.stack(
          vectors)

  def match(self, wanted, at_once, progress):
    """ITM's logits of the pairs in `wanted` [N, M], 0 elsewhere: [N, M, 2].

    The images of a batch are encoded once for all their texts.
    """
    out = np.zeros((*wanted.shape, 2), np.float32)
    number = {i: n for n, i in enumerate(self.ids.tolist())}
    at_once = min(at_once, int(wanted.sum(1).max()))
    for batch, row_ids in self._batches(progress):
      images = self._predictor.encode_images(self._variables, batch)
      lists = {i: np.flatnonzero(wanted[number[i]])
               for i in row_ids.tolist() if i >= 0}
      longest = max(map(len, lists.values()), default=0)
      for start in range(0, longest, at_once):
        chunks = {i: of[start:start + at_once] for i, of in lists.items()}
        text = inputs.text_rows(self._predictor, batch, {
            i: tuple(zip(*(self._tokens[n] for n in chunk)))
            for i, chunk in chunks.items()}, at_once)
        logits = self._predictor.score_pairs(
            self._variables, images, text['text'], text['text_mask'])
        for row, i in zip(logits, row_ids.tolist()):
          if i >= 0:
            out[number[i], chunks[i]] = row[:len(chunks[i])]
    return out
