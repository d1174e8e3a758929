"""E2E-VLP (Xu et al., ACL 2021, arXiv 2106.01804): assembly.

CNN on raw pixels -> 1x1 projection -> grid tokens. One encoder fuses
[grid ; text]; one decoder serves object queries and causal captions. The code
was never released, so this is a reimplementation from the paper. Where the text
is silent, it follows DETR (Carion et al., ECCV 2020), and the config says so.

Without a text side (`model.use_text=False`, or an empty vocabulary) the model
is DETR.
"""
import flax.linen as nn
import jax.numpy as jnp

from e2e_vlp_jax.models import contract
from e2e_vlp_jax.models import decoder as decoder_lib
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers


class Model(contract.BaseModel):
  """E2E-VLP; see contract.BaseModel. Its config is configs/e2e_vlp.py."""

  HEADS = {'grid_classes': contract.Head(('grid',), 'grid_outputs'),
           'detection': contract.Head(('queries',), 'detection_outputs'),
           'captioning': contract.Head(('caption',), 'caption_outputs'),
           'boxes': contract.Head(('queries',), 'box_outputs'),
           'mlm': contract.Head(('text',), 'mlm_outputs'),
           'itm': contract.Head(('pooled',), 'itm_outputs')}

  @property
  def has_text(self):
    return bool(self.vocab_size and self.config.use_text)

  @property
  def table(self):
    view = contract.View
    views = {'grid': view('grid_states', ('image',), ('grid_classes',),
                          ('grid',))}
    if not self.has_text:
      return {**views, 'image_only': view(
          'image_only_states', ('image',), ('detection',), ('queries',))}
    heads = 'mlm', 'itm'
    return {
        **views,
        'image_only': view('image_only_states', ('image', 'text'),
                           ('detection', 'captioning'), ('queries',)),
        'joint': view(inputs=('image', 'text'), heads=heads,
                      **contract.FUSED_VIEW),
        'joint_masked': view(inputs=('image', 'masked_text'), heads=heads,
                             **contract.FUSED_VIEW),
        'grounded': view('grounded_states', ('image', 'text'), ('boxes',),
                         ('queries',))}

  @property
  def towers(self):
    """CNN, projection and word embedding, encoder, decoder."""
    c = self.config
    return ((*self.backbone_layers(), '(project|text_embedding)/.*',
             *layers.layer_patterns('encoder', c.encoder_layers),
             *layers.layer_patterns('decoder', c.decoder_layers)),)

  @property
  def pieces(self):
    return {**super().pieces,
            'features': lambda p: self.run_backbone(p.batch, p.train),
            'image': lambda p: self.grid_tokens(p['features'])}

  def setup(self):
    c = self.config
    self.backbone = self.make_backbone()
    self.project = nn.Dense(c.width, dtype=self.dtype)
    stack = dict(width=c.width, heads=c.attention_heads, ffn=c.ffn,
                 dropout=c.dropout, pre_norm=c.pre_norm, act=c.act,
                 epsilon=c.epsilon, remat=c.remat, dtype=self.dtype)
    self.encoder = layers.Encoder(c.encoder_layers, **stack)
    self.decoder = decoder_lib.Decoder(
        c.decoder_layers, num_queries=c.num_queries, queries=c.queries,
        **stack)
    self.detection_head = heads_lib.Detection(self.num_classes,
                                              self.num_attributes)
    self.cells_head = heads_lib.GridClasses(self.num_classes,
                                            self.num_attributes)
    if self.has_text:
      self.text_embedding = layers.TextEmbedding(
          self.vocab_size, c.width, c.max_text, c.text_types, c.dropout,
          dtype=self.dtype)
      self.mlm_head = heads_lib.MaskedLM(self.vocab_size, c.width,
                                         dtype=self.dtype)
      self.itm_head = heads_lib.Matching(c.width, dtype=self.dtype)
      self.caption_bias = self.param('caption_bias', nn.initializers.zeros,
                                     (self.vocab_size,))
    self.setup_heads()

  # --- Features ---------------------------------------------------------------

  def run_backbone(self, batch, train=False):
    """Pixels -> dict: features [B, N, C] of the CNN, grid [B, h, w] mask."""
    c = self.config
    image, image_mask = batch['image'], batch['image_mask']
    layers.check_canvas(image, self.backbone.multiple)
    pixels = layers.normalise(image, image_mask, c.image_mean, c.image_std,
                              self.dtype)
    features = self.backbone(pixels, train, image_mask)[-1]
    b, h, w, d = features.shape
    return {'features': features.reshape(b, h * w, d),
            'grid': layers.downsample_mask(image_mask, h, w)}

  def grid_tokens(self, found):
    """From `run_backbone`: dict of tokens, pos [B, N, D], mask [B, N] and xy
    [B, N, 2], the cells' centers."""
    mask = found['grid']
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    return {'tokens': self.project(found['features']),
            'pos': flat(layers.sine_position_2d(mask, self.config.width)
                        ).astype(self.dtype),
            'mask': flat(mask), 'xy': flat(layers.cell_centers(mask))}

  def encode_image(self, batch, train=False):
    """image, image_mask -> see `grid_tokens`."""
    return self.grid_tokens(self.run_backbone(batch, train))

  def encode_text(self, ids, mask, train=False):
    """[B, S, L] ids -> dict: tokens [B, S, L, D], mask [B, S, L]."""
    return {'tokens': self.text_embedding(ids, train), 'mask': mask}

  def fuse(self, image, text, train=False, want=contract.FUSED):
    """The encoder over [grid ; text] for each sentence."""
    b, s, l, d = text['tokens'].shape
    n = image['mask'].shape[1]
    tile = lambda x: jnp.repeat(x, s, axis=0)
    tokens = text['tokens'].reshape(b * s, l, d)
    # Text positions are in the embedding; queries and keys get none (MDETR).
    # The last layer computes the image's states only if they are wanted.
    x = self.encoder(
        jnp.concatenate([tile(image['tokens']), tokens], 1),
        jnp.concatenate([tile(image['pos']), jnp.zeros_like(tokens)], 1),
        jnp.concatenate([tile(image['mask']), text['mask'].reshape(b * s, l)],
                        1), train, last=0 if 'image' in want else l)
    x = x.reshape(b, s, -1, d)
    states = x[:, :, -l:]
    return contract.Fused(
        states, x[:, :, :n] if 'image' in want else None,
        layers.pool(states, text['mask'], self.config.text_pool)
        if 'pooled' in want else None)

  def pooled_image(self, image):
    """Mean of the encoder's states of the grid."""
    return layers.masked_mean(self.memory(image), image['mask'])

  def memory(self, image, train=False):
    """The encoder over the grid alone: [B, N, D]."""
    return self.encoder(image['tokens'], image['pos'], image['mask'], train)

  # --- States of views --------------------------------------------------------

  def grid_states(self, pieces, view, want):
    del view, want
    image = pieces['image']
    return {'grid': pieces['features']['features'], 'xy': image['xy'],
            'mask': image['mask']}

  def image_only_states(self, pieces, view, want):
    """One pass of the decoder over the object queries and the captions."""
    del view
    return self._decode(
        pieces['image'], pieces['text'] if 'caption' in want else None,
        'queries' in want, pieces.train)

  def _decode(self, image, text, detect, train=False):
    """States of the queries, their boxes, and the captions' states."""
    queries, boxes, caption = self.decoder(
        self.memory(image, train), image['pos'], image['mask'], image['xy'],
        None if text is None else text['tokens'],
        None if text is None else text['mask'], detect, train)
    found = {'every_layer': queries, 'boxes': boxes, 'caption': caption}
    return {**found, 'queries': queries[-1]} if detect else found

  def grounded_states(self, pieces, view, want):
    """The object queries after reading the image with each text."""
    del view, want
    return self._ground(pieces['image'], pieces['text'], pieces.train)

  def _ground(self, image, text, train=False):
    """The decoder over what the encoder makes of [grid ; text] (MDETR).

    Returns:
      {'queries': [B, P, Q, D] of the last layer, 'boxes': [B, P, layers, Q,
      4]}.
    """
    fused = self.fuse(image, text, train, ('text', 'image'))
    b, p, l, d = fused.text.shape
    flat = lambda x: x.reshape(b * p, *x.shape[2:])
    tile = lambda x: jnp.repeat(x, p, axis=0)
    queries, boxes, _ = self.decoder(
        jnp.concatenate([flat(fused.image), flat(fused.text)], 1),
        jnp.concatenate([tile(image['pos']),
                         jnp.zeros((b * p, l, d), image['pos'].dtype)], 1),
        jnp.concatenate([tile(image['mask']), flat(text['mask'])], 1),
        tile(image['xy']), train=train)
    apart = lambda x: x.reshape(b, p, *x.shape[1:])
    return {'queries': apart(queries[-1]),
            'boxes': apart(jnp.moveaxis(boxes, 0, 1))}

  # --- Heads ------------------------------------------------------------------

  def box_outputs(self, states):
    """The queries' boxes, after the last layer and after each one before."""
    boxes = states['boxes']
    return {'pred_boxes': boxes[:, :, -1], 'aux_boxes': boxes[:, :, :-1]}

  def grid_outputs(self, states):
    return {**self.cells_head(states['grid']), 'grid_xy': states['xy'],
            'grid_mask': states['mask']}

  def detection_outputs(self, states):
    """As DETR: of the last layer, and of each one before it."""
    stacked = {**self.detection_head(states['every_layer']),
               'pred_boxes': states['boxes']}
    per_layer = [{k: v[i] for k, v in stacked.items()}
                 for i in range(self.config.decoder_layers)]
    return {**per_layer[-1], 'aux_outputs': per_layer[:-1]}

  def caption_outputs(self, states):
    return {'caption_logits': self.caption_logits(states['caption'])}

  def caption_logits(self, states):
    """[..., D] decoder states -> [..., V], tied to the word embeddings."""
    return self.text_embedding.attend(states) + self.caption_bias

  def mlm_outputs(self, states):
    return {'mlm_logits': self.mlm_head(states['text'],
                                        self.text_embedding.attend)}

  def itm_outputs(self, states):
    return {'itm_logits': self.itm_head(states['pooled'])}

  # --- Detection and captions from image features -----------------------------

  def detect(self, image, text=None, train=False):
    """Objects of the image or, with P texts, the queries' boxes for each."""
    if text is not None:
      return self.box_outputs(self._ground(image, text, train))
    return self.detection_outputs(self._decode(image, None, True, train))

  def decode_start(self, image, length=None):
    length = length or self.config.max_text
    cache = self.decoder.start(self.memory(image), image['pos'],
                               image['mask'], length)
    return {**cache, 'position': jnp.zeros(len(image['mask']), jnp.int32)}

  def decode_step(self, cache, ids):
    position = cache['position']
    x = self.text_embedding(ids[:, None], False, position[:, None])
    x, cache = self.decoder.step(cache, x, position)
    return self.caption_logits(x[:, 0]), {**cache, 'position': position + 1}


def describe(config):
  """`config.model` in one line, for people."""
  trunk = config['backbone']
  depth = f'-{trunk["depth"]}' if 'depth' in trunk else ''
  return (f'{trunk["name"]}{depth}, {config["encoder_layers"]} encoder and '
          f'{config["decoder_layers"]} decoder layers, width '
          f'{config["width"]}')
