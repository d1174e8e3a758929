"""SOHO (Huang et al., CVPR 2021, arXiv 2104.03135): assembly.

CNN on raw pixels -> neck with the visual dictionary -> visual tokens, once per
image. One Transformer fuses [visual tokens ; text] for each of the image's
texts. Equal to the released code (github.com/researchmm/soho) where the
config asks for it; docs/soho.md lists the differences and their reasons.

Without a dictionary (`dictionary.size=0`) it is the trunk of the released VQA
fine-tuning.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import necks

CELLS = ('batch', 'pair')


class Model(contract.BaseModel):
  """SOHO; see contract.BaseModel. Its config is configs/soho.py.

  The label space is only used by the warm start of the trunk.
  """

  HEADS = {'grid_classes': contract.Head(('grid',), 'grid_outputs'),
           'mlm': contract.Head(('text',), 'mlm_outputs'),
           'itm': contract.Head(('pooled',), 'itm_outputs'),
           'mvm': contract.Head(('image', 'codes'), 'mvm_outputs')}
  batchless_outputs = ('codebook_perplexity', 'codebook_dead')

  @property
  def table(self):
    view, heads = contract.View, ('itm', 'mlm')
    masked = heads + (('mvm',) if self.config.dictionary.size else ())
    return {
        'grid': view('grid_states', ('image',), ('grid_classes',), ('grid',)),
        'joint': view(inputs=('image', 'text'), heads=heads,
                      **contract.FUSED_VIEW),
        'joint_masked': view('masked_states', ('image', 'masked_text'),
                             masked, contract.FUSED)}

  @property
  def towers(self):
    """CNN, neck and word embedding, encoder."""
    return ((*self.backbone_layers(), '(neck|text_embedding)/.*',
             *layers.layer_patterns('encoder', self.config.encoder_layers)),)

  @property
  def pieces(self):
    return {**super().pieces,
            'features': lambda p: self.run_backbone(p.batch, p.train),
            'image': lambda p: self.neck(
                p['features'], p.batch['image_mask'], self._texts(p), p.train)}

  def _texts(self, pieces):
    """Number of texts with which the requested views fuse an image."""
    return max((pieces.batch[view.inputs[-1]].shape[1]
                for name, view in self.views.items()
                if name in pieces.requests and len(view.inputs) > 1),
               default=1)

  def setup(self):
    c = self.config
    if c.mvm.cell not in CELLS:
      raise errors.UserError(f'model.mvm.cell: {c.mvm.cell!r}'
                             + errors.nearest(c.mvm.cell, CELLS))
    if c.dictionary.size < 0:
      raise errors.UserError(f'model.dictionary.size: {c.dictionary.size}; '
                             'expected 0 (none) or a number of codes')
    if not 0 <= c.dictionary.decay < 1:
      raise errors.UserError(f'model.dictionary.decay: {c.dictionary.decay}; '
                             'expected at least 0 and less than 1, the share '
                             'of a code that stays')
    self.backbone = self.make_backbone()
    self.neck = necks.Neck(c.width, dict(c.dictionary), dtype=self.dtype,
                           frozen=self.frozen, **c.neck)
    self.text_embedding = layers.TextEmbedding(
        self.vocab_size, c.width, c.max_text, c.text_types, c.dropout,
        dtype=self.dtype)
    self.encoder = layers.Encoder(
        c.encoder_layers, c.width, c.attention_heads, c.ffn, c.dropout,
        c.pre_norm, c.act, c.epsilon, c.remat, self.dtype, inner_dropout=0.)
    self.itm_head = nn.Dense(
        2, use_bias=False, kernel_init=nn.initializers.variance_scaling(
            2., 'fan_in', 'normal'))
    self.cells_head = heads_lib.GridClasses(self.num_classes,
                                            self.num_attributes)
    self.setup_heads()

  # --- Features ---------------------------------------------------------------

  def run_backbone(self, batch, train=False):
    """image, image_mask -> features [B, h, w, C] of the CNN."""
    c = self.config
    image, image_mask = batch['image'], batch['image_mask']
    layers.check_canvas(image, self.backbone.multiple)
    pixels = layers.normalise(image, image_mask, c.image_mean, c.image_std,
                              self.dtype)
    return self.backbone(pixels, train, image_mask)[-1]

  def encode_image(self, batch, train=False, texts=1):
    """image, image_mask -> dict: cells, pos [B, N, D], mask [B, N] and, with
    a dictionary, codes [B, N]; see `necks.Neck`.

    Args:
      batch: image, image_mask.
      train: BatchNorm statistics; the dictionary is updated.
      texts: number of texts with which each image will be fused; it weights
        the image in the update of the dictionary.
    """
    return self.neck(self.run_backbone(batch, train), batch['image_mask'],
                     texts, train)

  def pooled_image(self, image):
    """Mean of the visual tokens."""
    return layers.masked_mean(self.neck.tokens(image['cells'], image['pos']),
                              image['mask'])

  def encode_text(self, ids, mask, train=False):
    """[B, S, L] ids -> dict: tokens [B, S, L, D], mask [B, S, L]."""
    return {'tokens': self.text_embedding(ids, train), 'mask': mask}

  def fuse(self, image, text, train=False, want=contract.FUSED, hidden=None):
    """The encoder over [visual tokens ; text], for each text.

    Args:
      image, text, train, want: see contract.py.
      hidden: [B, S, N] cells that masked visual modelling hides, or None.
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
    # The released code has the text first. Attention does not depend on the
    # order; in this one the last layer can compute the text's states only.
    x = self.encoder(both(visual, text['tokens']), None,
                     both(spread(image['mask']), text['mask']), train,
                     last=0 if 'image' in want else l).reshape(b, s, -1, d)
    states = x[:, :, -l:]
    return contract.Fused(
        states, x[:, :, :n] if 'image' in want else None,
        layers.pool(states, text['mask'], self.config.text_pool)
        if 'pooled' in want else None)

  # --- States of views --------------------------------------------------------

  def grid_states(self, pieces, view, want):
    """The trunk's features, without the neck."""
    del view, want
    features = pieces['features']
    mask = layers.downsample_mask(pieces.batch['image_mask'],
                                  *features.shape[1:3])
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    return {'grid': flat(features), 'mask': flat(mask),
            'xy': flat(layers.cell_centers(mask))}

  def masked_states(self, pieces, view, want):
    """As `fused_states`; if mvm is requested, cells are also hidden from the
    view's other heads."""
    if 'codes' not in want:
      return self.fused_states(pieces, view, want)
    image, text = (pieces[name] for name in view.inputs)
    s = text['mask'].shape[1]
    spread = lambda x: jnp.broadcast_to(x[:, None], (len(x), s, x.shape[1]))
    codes, mask = spread(image['codes']), spread(image['mask'])
    cell, keep = self.choose_cells(image['mask'], s)
    hidden = necks.same_code_mask(codes, mask, cell, keep)
    fused = self.fuse(image, text, pieces.train, want, hidden)
    return {**fused._asdict(), 'codes': jnp.where(hidden, codes, -1)}

  def choose_cells(self, mask, texts):
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

  # --- Heads ------------------------------------------------------------------

  def grid_outputs(self, states):
    return {**self.cells_head(states['grid']), 'grid_xy': states['xy'],
            'grid_mask': states['mask']}

  def mlm_outputs(self, states):
    return {'mlm_logits': self.text_embedding.attend(states['text'])}

  def itm_outputs(self, states):
    return {'itm_logits': self.itm_head(states['pooled'].astype(jnp.float32))}

  def mvm_outputs(self, states):
    """mvm_logits [B, S, N, K], mvm_labels [B, S, N] (-1 where nothing is
    hidden), and the dictionary's usage."""
    return {'mvm_logits': self.neck.words.similarity(states['image']),
            'mvm_labels': states['codes'], **self.neck.words.usage()}


def describe(config):
  """`config.model` in one line, for people."""
  trunk = config['backbone']
  depth = f'-{trunk["depth"]}' if 'depth' in trunk else ''
  return (f'{trunk["name"]}{depth}, {config["dictionary"]["size"]} visual '
          f'codes, {config["encoder_layers"]} encoder layers, width '
          f'{config["width"]}')
