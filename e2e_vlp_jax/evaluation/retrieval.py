"""Retrieval: the text of an image, and the image of a text, among many.

A model with an ITC head (views `image_only` and `text_only`) embeds every
image and text once and ranks by ITC's logits; its ITM head (view `joint`)
then ranks the best `top_k` anew, as ALBEF does (Li et al., 2021). A model
without ITC scores every pair by ITM, which is affordable for some hundreds of
images.
"""
import flax
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import predictor as predictor_lib

_RECALLS = (1, 5, 10)
_SCORES = {'odds': lambda x: x[..., 1] - x[..., 0],
           'logit': lambda x: x[..., 1]}


def evaluate(predictor, variables, pipeline, *, max_examples=None,
             progress=None, texts=None, top_k=32, score='odds', itc_weight=0.,
             max_pairs=100_000, at_once=16):
  """Recalls in both directions.

  An image may have several texts: it is found by each of them, and finds its
  text if any of its own is among the first K. Ties are lost: what scores as
  high as the right one counts as ahead of it, so that a model that gives all
  pairs one score finds nothing.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; its pp need make no more than images.
    max_examples: number of images; None = all.
    progress: called with the number of images done, first while embedding,
      then from 0 again while pairs are scored.
    texts: of an image, its first so many; None = data.sentences.
    top_k: how many candidates ITM ranks anew; 0 = none.
    score: what ITM ranks by: 'odds' (the probability of a match) or 'logit'
      (its logit alone, as FIBER's released code).
    itc_weight: ITC's logits count so much beside ITM's score. Where ITM
      learned to tell true pairs from negatives drawn by exp(h x ITC's logits),
      its odds are those of a pair divided by just that, and h puts it back
      (noise-contrastive estimation, Gutmann and Hyvarinen, 2010).
    max_pairs: of images and texts, for a model without ITC.
    at_once: texts in one call of ITM with an image.

  Returns:
    {TR1, TR5, TR10 (texts found by images), IR1, IR5, IR10 (images found by
    texts)}, by ITC, and TR1_itm, ..., IR10_itm after ITM's ranking; without
    ITC the former alone, by ITM.

  Raises:
    UserError: neither head, a head that the checkpoint lacks, too many
      pairs, or an unknown `score`.
  """
  if score not in _SCORES:
    raise errors.UserError(f'retrieval: score={score!r}'
                           + errors.nearest(score, _SCORES))
  views = predictor.model.views
  itc = all('itc' in views.get(v, ()) for v in ('image_only', 'text_only'))
  itm = 'itm' in views.get('joint', ()) and (top_k or not itc)
  if not itc and not itm:
    raise errors.UserError('retrieval: this model has neither an itc nor an '
                           'itm head')
  texts = texts or predictor.config.data.sentences
  try:
    found = _Items(predictor, variables, pipeline, max_examples, progress,
                   texts, itc)
    if not found.owner.size:
      raise errors.UserError('retrieval: no image has a text')
    out = {}
    if itc:
      near = found.image_vectors @ found.text_vectors.T
      out = recalls(near, near, found.owner)
    if itm:
      pairs = near.shape if itc else (len(found.ids), len(found.owner))
      if not itc and np.prod(pairs) > max_pairs:
        fits = int(np.sqrt(max_pairs * pairs[0] / pairs[1]))
        raise errors.UserError(
            f'retrieval: this model has no itc head, and its itm head would '
            f'have to score all {pairs[0]} x {pairs[1]} pairs of images and '
            f'texts; max_pairs is {max_pairs}: set max_examples={fits} or '
            'raise max_pairs')
      # Which pairs to score, for the images' sake and for the texts'.
      by_image, by_text = ((_best(near, top_k, 1), _best(near, top_k, 0))
                           if itc else (np.ones(pairs, bool),) * 2)
      logits = found.match(by_image | by_text, at_once, progress)
      judged = np.nan_to_num(_SCORES[score](logits.astype(np.float64)),
                             nan=-1e30)
      if not itc:
        return recalls(judged, judged, found.owner)
      judged += itc_weight * near
      above = judged - np.min(judged[by_image | by_text], initial=0) + 2
      again = recalls(np.where(by_image, above, near),
                      np.where(by_text, above, near), found.owner)
      out.update({f'{k}_itm': v for k, v in again.items()})
    return out
  except flax.errors.ScopeParamNotFoundError as e:
    raise errors.UserError(
        'retrieval: the checkpoint was trained without the '
        f'{"itc or itm" if itc and itm else "itc" if itc else "itm"} head; '
        'top_k=0 does without itm') from e


def recalls(by_image, by_text, owner):
  """TR and IR at 1, 5 and 10.

  Args:
    by_image: [N, M] score of every pair, among which an image looks.
    by_text: [N, M], among which a text looks.
    owner: [M] number of the image to which a text belongs.

  Returns:
    {'TR1', ..., 'IR10'}, shares of the images that have texts, of the texts.
  """
  # A score that is no number is the lowest of all.
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
    image_vectors, text_vectors: float32 [N, E] and [M, E], if asked for;
      their products are ITC's logits.
  """

  def __init__(self, predictor, variables, pipeline, max_examples, progress,
               texts, embed):
    self._predictor, self._variables = predictor, variables
    self._batches = lambda progress: predictor_lib.batches(
        predictor, pipeline, max_examples, progress)
    ids, owner, tokens, images, words = [], [], [], [], []
    for batch, row_ids in self._batches(progress):
      written = [[t for t in map(str.strip, pipeline.record(i)['texts']) if t
                  ][:texts] if i >= 0 else [] for i in row_ids]
      encoded = [predictor.tokenize(row, texts) for row in written]
      if embed:
        # This host's rows among those of all hosts.
        by_id = dict(zip(row_ids.tolist(), encoded))
        nothing = predictor.tokenize([], texts)
        image, word = predictor.embed(variables, _with_texts(
            batch, [by_id.get(int(i), nothing)
                    for i in batch['example_id']]))
      for row, example_id in enumerate(row_ids):
        if example_id < 0:
          continue
        owner += [len(ids)] * len(written[row])
        tokens += list(zip(*encoded[row]))[:len(written[row])]
        ids.append(int(example_id))
        if embed:
          images.append(image[row])
          words += list(word[row, :len(written[row])])
    self.ids, self.owner = np.array(ids, int), np.array(owner, int)
    self._tokens = tokens
    if embed and owner:
      self.image_vectors, self.text_vectors = np.stack(images), np.stack(words)

  def match(self, wanted, at_once, progress):
    """ITM's logits of the pairs in `wanted` [N, M], 0 elsewhere: [N, M, 2]."""
    out = np.zeros((*wanted.shape, 2), np.float32)
    number = {i: n for n, i in enumerate(self.ids.tolist())}
    at_once = min(at_once, int(wanted.sum(1).max()))
    nothing = self._predictor.tokenize([], 1)
    nothing = nothing[0][0], nothing[1][0]
    for batch, row_ids in self._batches(progress):
      lists = {i: np.flatnonzero(wanted[number[i]])
               for i in row_ids.tolist() if i >= 0}
      longest = max(map(len, lists.values()), default=0)
      for start in range(0, longest, at_once):
        rows = []
        for i in batch['example_id'].tolist():
          row = [self._tokens[n] for n in
                 lists.get(i, ())[start:start + at_once]]
          rows.append(list(zip(*row, *[nothing] * (at_once - len(row)))))
        logits = self._predictor.match_logits(
            self._variables, _with_texts(batch, rows))
        for row, i in zip(logits, row_ids.tolist()):
          if i >= 0:
            chunk = lists[i][start:start + at_once]
            out[number[i], chunk] = row[:len(chunk)]
    return out


def _with_texts(batch, rows):
  """The batch with other texts: rows of (ids [S, L], mask [S, L])."""
  ids, masks = zip(*rows)
  return {**batch, 'text': np.array(ids, np.int32),
          'text_mask': np.array(masks, bool)}
