"""Images and texts that are encoded once each, then fused with others.

The Predictor inherits this; it has model, config, mesh, place and program.
"""
import flax
import jax
import jax.numpy as jnp
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import prompts
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.training import sharding


class NotTrained(errors.UserError):
  """The model offers a task, but the checkpoint lacks a head's parameters."""


class Pairs:
  """What a Predictor does with texts, and with images and texts apart."""

  def tokenize(self, texts, count):
    """See `inputs.tokenize`."""
    return inputs.tokenize(self, texts, count)

  def phrase_inputs(self, captions, count):
    """See `prompts.phrase_inputs`."""
    return prompts.phrase_inputs(self, captions, count)

  def prompt(self, variables, names, most=None):
    """See `prompts.Prompt`."""
    return prompts.Prompt(self, variables, names, most)

  def encode_images(self, variables, batch, embed=False, features=True):
    """Encodes the images of a batch, each once.

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image and image_mask of this host's rows.
      embed: whether to also return vectors, of a model with an ITC head.
      features: whether to return features.

    Returns:
      (features on the device, for `score_pairs`; float32 [B, E] vectors of all
      hosts' rows, whose products with those of texts are ITC's logits), None
      for what is not wanted.

    Raises:
      NotTrained: the checkpoint was trained without an ITC head.
    """
    batch = self.place({k: batch[k] for k in ('image', 'image_mask')})
    kept, vectors = self._encode(variables, batch, 'image', embed, features)
    return kept, vectors and sharding.to_host(vectors)['image']

  def encode_texts(self, variables, ids, mask, embed=False, features=True,
                   at_once=16):
    """Encodes M texts, each once.

    Args:
      variables: {'params': ..., **model_state}.
      ids, mask: [M, L] tokens, the same on all hosts.
      embed, features: see `encode_images`.
      at_once: number of texts in each row of a batch.

    Returns:
      (features with leading axis M, on every device; float32 [M, E] vectors),
      None for what is not wanted.
    """
    rows = self.config.eval_batch_size
    own = (np.arange(rows) if self.mesh is None else
           sharding.host_rows(self.mesh, rows))
    at_once = min(at_once, -(-len(ids) // rows))
    size, parts = rows * at_once, []
    for start in range(0, len(ids), size):
      # The last batch is filled up: another size would compile again.
      at = np.minimum(np.arange(start, start + size), len(ids) - 1)
      at = at.reshape(rows, at_once)[own]
      found = self._encode(variables, self.place(
          {'text': ids[at], 'text_mask': mask[at]}), 'text', embed, features)
      parts.append(jax.tree.map(
          lambda x: x.reshape(size, *x.shape[2:])[:len(ids) - start],  # pylint: disable=cell-var-from-loop
          sharding.to_host(found)))
    kept, vectors = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    everywhere = {} if self.mesh is None else {
        'device': sharding.replicated(self.mesh)}
    return (jax.device_put(kept, **everywhere),
            vectors and vectors['text'])

  def _encode(self, variables, batch, side, embed, features):
    """(features or None, {side: vectors} or None) of images or texts."""
    view = f'{side}_only'

    def encode(variables, batch):
      def run(model):
        pieces = contract.Pieces(model, batch, {view: ('itc',)}, False)
        vectors = None
        if embed:
          found = model.outputs_of(view, pieces)
          vectors = found[f'{side}_embedding'].astype(jnp.float32)
          if side == 'image':
            vectors *= found['itc_scale']
        return (pieces[side] if features else None,
                {side: vectors} if embed else None)
      return self.model.apply(variables, method=run)
    try:
      return self.program(('encode', side, embed, features), encode)(
          variables, batch)
    except flax.errors.ScopeParamNotFoundError as e:
      raise NotTrained(
          'this checkpoint was trained without an itc head, by which images '
          'and texts are embedded') from e

  def score_pairs(self, variables, images, texts, index):
    """ITM's logits of images with texts: float32 [B, P, 2], all hosts' rows.

    Args:
      variables: {'params': ..., **model_state}.
      images: features of B images, from `encode_images`.
      texts: features of M texts, from `encode_texts`.
      index: int32 [B, P] of this host's rows: P of the texts for each image.

    Raises:
      NotTrained: the checkpoint was trained without an ITM head.
    """
    def score(variables, images, texts, batch):
      def pairs(model):
        words = jax.tree.map(lambda x: x[batch['index']], texts)
        return model.pairs(images, words, ('itm',))['itm_logits']
      return self.model.apply(variables, method=pairs).astype(jnp.float32)
    try:
      return sharding.to_host(self.program('score_pairs', score)(
          variables, images, texts, self.place({'index': index})))
    except flax.errors.ScopeParamNotFoundError as e:
      raise NotTrained('this checkpoint was trained without an itm head, which '
                       'scores pairs of images and texts') from e
