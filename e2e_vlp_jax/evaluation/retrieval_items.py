"""The images and texts of a retrieval evaluation, each encoded once."""
import logging

import numpy as np

from e2e_vlp_jax.evaluation import inputs


class Items:
  """The images and texts of an evaluation, in the order of its batches.

  Args:
    predictor: a Predictor.
    variables: {'params': ..., **model_state}.
    pipeline: an evaluation Pipeline; its pp only needs to make images.
    max_examples: number of images; None = all.
    progress: called with the number of images done, or None.
    texts: number of captions used per image, the first.
    embed: whether to make vectors, of a model with an ITC head.
    pairs: whether to keep features, to score pairs.

  Attributes:
    ids: [N] example_id of the images.
    owner: [M] number of the image to which a text belongs.
    image_vectors, text_vectors: float32 [N, E] and [M, E], or None; their
      products are ITC's logits.
  """

  def __init__(self, predictor, variables, pipeline, max_examples, progress,
               texts, *, embed, pairs):
    self._predictor, self._variables = predictor, variables
    self._progress = progress
    ids, owner, written, vectors = [], [], [], []
    self._batches = []  # (features, example_id of all rows, of own rows)
    for batch, row_ids in inputs.batches(predictor, pipeline, max_examples,
                                         progress):
      features, found = predictor.encode_images(variables, batch, embed, pairs)
      self._batches.append((features, row_ids.tolist(),
                            np.asarray(batch['example_id']).tolist()))
      for row in np.flatnonzero(row_ids >= 0):
        example_id = int(row_ids[row])
        own = [t for t in map(str.strip, pipeline.record(example_id)['texts'])
               if t][:texts]
        owner += [len(ids)] * len(own)
        written += own
        ids.append(example_id)
        if embed:
          vectors.append(found[row])
    self.ids, self.owner = np.array(ids, int), np.array(owner, int)
    self.image_vectors = self.text_vectors = None
    if written:
      _warn_of_cut_texts(predictor, written)
      self._texts, self.text_vectors = predictor.encode_texts(
          variables, *inputs.tokenize(predictor, written, len(written)), embed,
          pairs)
      self.image_vectors = np.stack(vectors) if embed else None

  def match(self, wanted, score, at_once):
    """ITM's score of the pairs in `wanted` [N, M], -inf elsewhere.

    Args:
      wanted: bool [N, M].
      score: function of logits [..., 2].
      at_once: number of texts per image in one call.

    Returns:
      float32 [N, M].
    """
    out = np.full(wanted.shape, -np.inf, np.float32)
    number = {i: n for n, i in enumerate(self.ids.tolist())}
    at_once = min(at_once, int(wanted.sum(1).max()))
    done = 0
    for images, row_ids, own_ids in self._batches:
      lists = {i: np.flatnonzero(wanted[number[i]])
               for i in row_ids if i >= 0}
      longest = max(map(len, lists.values()), default=0)
      for start in range(0, longest, at_once):
        chunks = {i: of[start:start + at_once] for i, of in lists.items()}
        # Rows that have no more candidates score their first text again.
        index = np.zeros((len(own_ids), at_once), np.int32)
        for row, i in enumerate(own_ids):
          index[row, :len(chunks.get(i, ()))] = chunks.get(i, ())
        logits = self._predictor.score_pairs(self._variables, images,
                                             self._texts, index)
        judged = score(logits.astype(np.float64))
        for row, i in zip(judged, row_ids):
          if i >= 0:
            out[number[i], chunks[i]] = row[:len(chunks[i])]
        if self._progress:  # A batch of images can take minutes.
          share = min(start + at_once, longest) / longest
          self._progress(done + int(share * len(lists)))
      done += len(lists)
    return out


def _warn_of_cut_texts(predictor, texts):
  cut = inputs.cut_texts(predictor, texts)
  if cut:
    logging.warning('retrieval: %d texts are cut to data.max_text=%d tokens, '
                    'such as %r', len(cut), predictor.config.data.max_text,
                    next(iter(cut)))
