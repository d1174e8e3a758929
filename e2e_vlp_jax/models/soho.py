"""SOHO (Huang et al., CVPR 2021, arXiv 2104.03135): assembly.

CNN on raw pixels -> neck with the visual dictionary -> visual tokens, once an
image. One Transformer fuses [visual tokens ; text] for each of the image's
texts. Equal to the released code (github.com/researchmm/soho) where the
config asks for it; docs/soho.md lists what differs and why.

Without a dictionary (`dictionary.size=0`) it is the trunk of the released VQA
fine-tuning.
"""
from typing import Any, Dict, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import necks

CELLS = ('batch', 'pair')


class Model(nn.Module):
  """SOHO.

  Attributes:
    config: the `model` part of a config (configs/soho.py).
    vocab_size, num_classes, num_attributes: of tokenizer and label space; the
      latter two serve the warm start of a trunk alone.
    dtype: of the computation; parameters and dictionary stay float32.
  """
  config: Any
  vocab_size: int
  num_classes: int
  num_attributes: int
  dtype: Any = jnp.float32

  @property
  def views(self):
    """Every view with the heads that may be asked of it."""
    masked = ('mlm', 'itm') + (
        ('mvm',) if self.config.dictionary.size else ())
    return {'grid': ('cells',), 'joint': ('itm', 'mlm'),
            'joint_masked': masked}

  @property
  def heads(self):
    """Names of all heads."""
    return tuple(sorted({h for hs in self.views.values() for h in hs}))

  def setup(self):
    c = self.config
    if c.mvm.cell not in CELLS:
      raise errors.UserError(f'model.mvm.cell: {c.mvm.cell!r}'
                             + errors.nearest(c.mvm.cell, CELLS))
    if c.dictionary.size < 0:
      raise errors.UserError(f'model.dictionary.size: {c.dictionary.size}; '
                             'expected 0 (none) or a number of words')
    if not 0 <= c.dictionary.decay <= 1:
      raise errors.UserError(f'model.dictionary.decay: {c.dictionary.decay}; '
                             'expected 0 to 1, the share of a word that stays')
    self.backbone = models.build_backbone(c.backbone, self.dtype)
    self.neck = necks.Neck(c.width, dict(c.dictionary), dtype=self.dtype,
                           **c.neck)
    self.text_embedding = layers.TextEmbedding(
        self.vocab_size, c.width, c.max_text, c.text_types, c.dropout,
        dtype=self.dtype)
    self.encoder = layers.Encoder(
        c.encoder_layers, c.width, c.heads, c.ffn, c.dropout, c.pre_norm,
        c.act, c.epsilon, c.remat, self.dtype, inner_dropout=0.)
    self.itm_head = nn.Dense(
        2, use_bias=False, kernel_init=nn.initializers.variance_scaling(
            2., 'fan_in', 'normal'))
    self.cells_head = heads_lib.Cells(self.num_classes, self.num_attributes)

  def encode_image(self, image, image_mask, copies=1, train=False) -> Dict:
    """Pixels -> cells, which `fuse` makes visual tokens of.

    Args:
      image: [B, H, W, 3] uint8, padded bottom and right.
      image_mask: [B, H, W] True on real pixels.
      copies: texts that each image is fused with; 0 = none, and no neck.
      train: BN statistics; the dictionary moves.

    Returns:
      dict: features [B, h, w, C] and, with copies, cells, pos [B, N, D],
      mask [B, N], words [B, N] (see `Neck`).
    """
    c = self.config
    layers.check_canvas(image, self.backbone.multiple)
    pixels = image.astype(jnp.float32) / 255.
    pixels = (pixels - jnp.asarray(c.image_mean)) / jnp.asarray(c.image_std)
    # Padding is zero after normalisation, whatever its bytes were.
    pixels = pixels * image_mask[..., None]
    features = self.backbone(pixels.astype(self.dtype), train, image_mask)[-1]
    out = {'features': features}
    if copies:
      out.update(self.neck(features, image_mask, copies, train))
    return out

  def encode_text(self, ids, mask, train=False) -> Dict:
    """[B, S, L] ids -> dict: tokens [B, S, L, D], mask [B, S, L]."""
    return {'tokens': self.text_embedding(ids, train), 'mask': mask}

  def fuse(self, image, text, hidden=None, all_states=False, train=False):
    """The encoder over [visual tokens ; text], for each text.

    Args:
      image: from `encode_image`.
      text: from `encode_text`.
      hidden: [B, S, N] cells that masked visual modelling hides, or None.
      all_states: also return what became of the visual tokens.
      train: dropout.

    Returns:
      [B, S, L, D] and, with all_states, [B, S, N, D] (else None).
    """
    b, s, l, d = text['tokens'].shape
    n = image['mask'].shape[1]
    spread = lambda x: jnp.broadcast_to(x[:, None], (b, s, *x.shape[1:]))
    if hidden is None:  # The same tokens for every text.
      visual = spread(self.neck.tokens(image['cells'], image['pos']))
    else:
      visual = self.neck.tokens(spread(image['cells']),
                                image['pos'][:, None], hidden)
    both = lambda x, y: jnp.concatenate([x, y], 2).reshape(
        b * s, n + l, *y.shape[3:])
    # The released code has the text first, which is all the same to
    # attention; the last layer can compute the last tokens alone.
    states = self.encoder(both(visual, text['tokens']), None,
                          both(spread(image['mask']), text['mask']), train,
                          last=0 if all_states else l)
    states = states.reshape(b, s, -1, d)
    return states[:, :, -l:], states[:, :, :n] if all_states else None

  def draw(self, mask, texts):
    """The random choices of masked visual modelling.

    Args:
      mask: [B, N] valid cells.
      texts: S.

    Returns:
      (cell [B, S], keep [B, S]): with cell='batch' one cell for the whole
      batch (released code), which may be padding of some images; with 'pair'
      a valid one for each pair. keep is True with probability `rate`.
    """
    c = self.config.mvm
    shape = mask.shape[0], texts
    key, other = jax.random.split(self.make_rng('sample'))
    if c.cell == 'batch':
      cell = jnp.broadcast_to(jax.random.randint(key, (), 0, mask.shape[1]),
                              shape)
    else:
      valid = jnp.broadcast_to(mask[:, None], (*shape, mask.shape[1]))
      cell = jax.random.categorical(key, layers.mask_bias(valid))
    return cell, jax.random.bernoulli(other, c.rate, shape)

  def __call__(self, batch: Mapping[str, Any],
               requests: Mapping[str, Sequence[str]],
               train: bool = False) -> Dict[str, Dict[str, Any]]:
    """Runs the views that `requests` names, the CNN and the neck once.

    Args:
      batch: see data/pipeline.py; only what the views read is needed.
      requests: view -> heads: 'grid': cells; 'joint' (batch['text']): itm,
        mlm; 'joint_masked' (batch['masked_text']): mlm, itm, mvm. Where mvm
        is asked for, cells are hidden from the view's other heads, too.
      train: dropout, BN statistics, the dictionary moves.

    Returns:
      view -> dict: mlm_logits [B, S, L, V], itm_logits [B, S, 2], mvm_logits
      [B, S, N, K], mvm_labels [B, S, N] (-1 where nothing is hidden) and the
      dictionary's usage.
    """
    texts = {view: {'joint': 'text', 'joint_masked': 'masked_text'}[view]
             for view in sorted(requests) if view != 'grid'}
    copies = max([batch[name].shape[1] for name in texts.values()], default=0)
    image = self.encode_image(batch['image'], batch['image_mask'], copies,
                              train)
    out = {view: self._joint(image, batch[name], batch[f'{name}_mask'],
                             requests[view], train)
           for view, name in texts.items()}
    if 'grid' in requests:
      out['grid'] = self._grid(image['features'], batch['image_mask'])
    return out

  def _grid(self, features, image_mask):
    """The warm start's head on the trunk's cells."""
    b, h, w, _ = features.shape
    mask = layers.downsample_mask(image_mask, h, w)
    flat = lambda x: x.reshape(b, h * w, -1)
    return {**self.cells_head(flat(features)),
            'cell_xy': flat(layers.cell_centers(mask)),
            'cell_mask': mask.reshape(b, h * w)}

  def _joint(self, image, ids, valid, wanted, train):
    """The heads of one joint view."""
    s, hidden, out = ids.shape[1], None, {}
    mvm = 'mvm' in wanted
    if mvm:
      spread = lambda x: jnp.broadcast_to(
          x[:, None], (x.shape[0], s, x.shape[1]))
      words, mask = spread(image['words']), spread(image['mask'])
      cell, keep = self.draw(image['mask'], s)
      hidden = necks.same_word_mask(words, mask, cell, keep)
      out['mvm_labels'] = jnp.where(hidden, words, -1)
    text = self.encode_text(ids, valid, train)
    states, visual = self.fuse(image, text, hidden, mvm, train)
    if mvm:
      out['mvm_logits'] = self.neck.words.similarity(visual)
      out.update(self.neck.words.usage())
    if 'mlm' in wanted:
      out['mlm_logits'] = self.text_embedding.attend(states)
    if 'itm' in wanted:
      state = layers.pool(states, valid, self.config.itm_pool)
      out['itm_logits'] = self.itm_head(state.astype(jnp.float32))
    return out


def describe(config):
  """`config.model` in one line, for people."""
  trunk = config['backbone']
  depth = f'-{trunk["depth"]}' if 'depth' in trunk else ''
  return (f'{trunk["name"]}{depth}, {config["dictionary"]["size"]} visual '
          f'words, {config["encoder_layers"]} encoder layers, width '
          f'{config["width"]}')
