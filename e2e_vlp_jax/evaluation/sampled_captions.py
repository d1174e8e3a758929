"""Captions drawn from the model that is being trained, and their CIDEr.

What `objectives/self_critical.py` needs for a step. The captions are drawn on
the devices by a program of their own; CIDEr is computed on the host, by the
document frequencies of the training captions. The random numbers depend on
(seed, step) alone, so a resumed run draws the same captions.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from e2e_vlp_jax.evaluation import caption_metrics
from e2e_vlp_jax.evaluation import ptb_tokenizer
from e2e_vlp_jax.models import beam_search
from e2e_vlp_jax.models import sampling
from e2e_vlp_jax.training import sharding

# Counts as a word, as in FIBER's released code: without it, captions that break
# off ('a man on a') score best.
_END = '<eos>'


class Feeder:
  """Adds drawn captions and their advantages to the batches of a stage.

  Args:
    objective: a `self_critical.Objective`.
    assembly: the run's `training.assemble.Assembly`.
    tokenizer: a `data.tokenizer.Tokenizer`.
    pipeline: the training Pipeline.
  """

  def __init__(self, objective, assembly, tokenizer, pipeline):
    self._objective, self._mesh = objective, assembly.mesh
    self._tokenizer, self._pipeline = tokenizer, pipeline
    self._texts = None  # {example_id: [words of a caption, with spaces]}
    ids = dict(cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id,
               pad_id=tokenizer.pad_id)
    never = tokenizer.cls_id, tokenizer.pad_id, tokenizer.mask_id
    self._draw = jax.jit(functools.partial(
        _drawn, assembly, ids, never, objective.samples,
        objective.baseline == 'greedy'))

  def __call__(self, state, batch):
    """The batch [B] with S + R texts, 'advantages' and 'rewards' [B, R].

    Args:
      state: TrainState.
      batch: on the devices, with S texts a row.
    """
    if self._texts is None:
      self._read_references()
    longer, drawn, likeliest = self._draw(
        state.params, state.model_state, state.rng, state.step, batch)
    ids = sharding.to_host(batch['example_id']).tolist()
    rewards = self._rewards(ids, sharding.to_host(drawn))
    if self._objective.baseline == 'greedy':
      base = self._rewards(ids, sharding.to_host(likeliest)[:, None])
    elif self._objective.baseline == 'constant':
      base = np.ones_like(rewards)
    else:
      count = self._objective.samples
      base = (rewards.sum(1, keepdims=True) - rewards) / (count - 1)
    known = np.array([bool(self._texts.get(i)) for i in ids])[:, None]
    rows = sharding.host_rows(self._mesh, len(ids))
    return {**batch, **longer, **sharding.shard_batch(self._mesh, {
        'advantages': np.where(known, rewards - base, 0)[rows],
        'rewards': rewards[rows]})}

  def _rewards(self, ids, tokens):
    """CIDEr of captions: float32 [B, R]; 0 where an image has no captions.

    Args:
      ids: B example ids.
      tokens: [B, R, L].
    """
    texts = [self._tokenizer.decode(_ended(row, self._tokenizer.sep_id))
             for own in tokens.tolist() for row in own]
    words = iter(_words(texts))
    out = np.zeros(tokens.shape[:2], np.float32)
    for row, i in enumerate(ids):
      candidates = [next(words).split() for _ in tokens[row]]
      references = [t.split() for t in self._texts.get(i, ())]
      if references:
        out[row] = self._cider.scores(candidates, references)
    return out

  def _read_references(self):
    """Reads the captions of all training images, once."""
    self._texts = {}
    bar = tqdm.tqdm(self._pipeline.every_record(), unit='image', leave=False,
                    desc='captions of the training images', delay=5,
                    disable=bool(jax.process_index()))
    for example_id, record in bar:
      self._texts[example_id] = [t.strip() for t in record['texts']
                                 if t.strip()]
    flat = iter(_words([t for own in self._texts.values() for t in own]))
    self._texts = {i: [next(flat) for _ in own]
                   for i, own in self._texts.items()}
    documents, images = caption_metrics.document_frequencies(
        [t.split() for t in own] for own in self._texts.values() if own)
    # One image alone counts like none; most n-grams are such.
    self._cider = caption_metrics.Cider(
        {g: n for g, n in documents.items() if n > 1}, images)


def _drawn(assembly, ids, never, count, greedy, params, model_state, rng, step,
           batch):
  """({'text', 'text_mask'} with the drawn captions behind, [B, R, L] those
  captions, [B, L] the likeliest one or None)."""
  model, mesh = assembly.model, assembly.mesh
  variables = {'params': sharding.gather_parameters(
      params, assembly.shardings.params), **model_state}
  length = batch['text'].shape[-1]
  # 0 and 1 are folded in by the step for dropout and the model's choices.
  key = jax.random.fold_in(jax.random.fold_in(rng, step), 2)
  tokens, mask = sampling.captions(model, variables, batch, key,
                                   max_length=length, count=count,
                                   forbidden=never, **ids)
  likeliest = beam_search.generate(
      model, variables, batch, max_length=length, mask_id=never[-1], **ids)[
          0] if greedy else None
  return (sharding.constrain_batch(mesh, {
      'text': jnp.concatenate([batch['text'], tokens], 1),
      'text_mask': jnp.concatenate([batch['text_mask'], mask], 1)}),
          tokens, likeliest)


def _ended(tokens, sep_id):
  """A caption's tokens up to its end token."""
  return tokens[:tokens.index(sep_id)] if sep_id in tokens else tokens


def _words(texts):
  """Captions as the metrics split them, each ended by one more word."""
  return [' '.join([*found, _END])
          for found in ptb_tokenizer.tokenize_all(texts)]
