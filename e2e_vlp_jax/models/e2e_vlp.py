"""E2E-VLP (Xu et al., ACL 2021, arXiv 2106.01804): assembly.

CNN on raw pixels -> 1x1 projection -> grid tokens. One encoder fuses
[grid ; text]; one decoder serves object queries and causal captions. The code
was never released: this is a reimplementation from the paper; where the text
is silent, DETR (Carion et al., ECCV 2020) decides and the config says so.

With `vocab_size=0` there is no text side and the model is DETR.
"""
from typing import Any, Dict, Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp

from e2e_vlp_jax import models
from e2e_vlp_jax.models import decoder as decoder_lib
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers


class Model(nn.Module):
  """E2E-VLP.

  Attributes:
    config: the `model` part of a config (configs/e2e_vlp.py).
    vocab_size, num_classes, num_attributes: of tokenizer and label space.
    dtype: of the computation; parameters stay float32.
  """
  config: Any
  vocab_size: int
  num_classes: int
  num_attributes: int
  dtype: Any = jnp.float32

  @property
  def views(self):
    """Every view with the heads that may be asked of it."""
    if not self.vocab_size:
      return {'grid': ('cells',), 'image_only': ('detection',)}
    return {'grid': ('cells',), 'image_only': ('detection', 'captioning'),
            'joint': ('mlm', 'itm'), 'joint_masked': ('mlm', 'itm')}

  @property
  def heads(self):
    """Names of all heads."""
    return tuple(sorted({h for hs in self.views.values() for h in hs}))

  def setup(self):
    c = self.config
    self.backbone = models.build_backbone(c.backbone, self.dtype)
    self.project = nn.Dense(c.width, dtype=self.dtype)
    stack = dict(width=c.width, heads=c.heads, ffn=c.ffn, dropout=c.dropout,
                 pre_norm=c.pre_norm, act=c.act, epsilon=c.epsilon,
                 remat=c.remat, dtype=self.dtype)
    self.encoder = layers.Encoder(c.encoder_layers, **stack)
    self.decoder = decoder_lib.Decoder(
        c.decoder_layers, num_queries=c.num_queries, queries=c.queries,
        **stack)
    self.detection_head = heads_lib.Detection(self.num_classes,
                                              self.num_attributes)
    self.cells_head = heads_lib.Cells(self.num_classes, self.num_attributes)
    if self.vocab_size:
      self.text_embedding = layers.TextEmbedding(
          self.vocab_size, c.width, c.max_text, c.text_types, c.dropout,
          dtype=self.dtype)
      self.mlm_head = heads_lib.MaskedLM(self.vocab_size, c.width,
                                         dtype=self.dtype)
      self.itm_head = heads_lib.Matching(c.width, dtype=self.dtype)
      self.caption_bias = self.param('caption_bias', nn.initializers.zeros,
                                     (self.vocab_size,))

  def encode_image(self, image, image_mask, train=False) -> Dict:
    """Pixels -> grid tokens.

    Args:
      image: [B, H, W, 3] uint8, padded bottom and right.
      image_mask: [B, H, W] True on real pixels.
      train: BN statistics and dropout.

    Returns:
      dict: tokens [B, N, D], pos [B, N, D], mask [B, N], xy [B, N, 2],
      features [B, N, C] (before the projection).
    """
    c = self.config
    layers.check_canvas(image, self.backbone.multiple)
    pixels = image.astype(jnp.float32) / 255.
    pixels = (pixels - jnp.asarray(c.image_mean)) / jnp.asarray(c.image_std)
    # Padding is zero after normalisation (DETR), whatever its bytes were.
    pixels = pixels * image_mask[..., None]
    features = self.backbone(pixels.astype(self.dtype), train,
                             image_mask)[-1]
    b, h, w, _ = features.shape
    mask = layers.downsample_mask(image_mask, h, w)
    flat = lambda x: x.reshape(b, h * w, -1)
    features = flat(features)
    return {
        'tokens': self.project(features),
        'pos': flat(layers.sine_position_2d(mask, c.width)).astype(
            self.dtype),
        'mask': mask.reshape(b, h * w), 'xy': flat(layers.cell_centers(mask)),
        'features': features}

  def encode_text(self, ids, mask, train=False) -> Dict:
    """[B, S, L] ids -> dict: tokens [B, S, L, D], mask [B, S, L]."""
    return {'tokens': self.text_embedding(ids, train), 'mask': mask}

  def fuse(self, image, text=None, train=False):
    """Encoder over the grid alone, or over [grid ; text] for each sentence.

    Returns:
      The grid's states [B, N, D]; with text, the text's [B, S, L, D].
    """
    if text is None:
      return self.encoder(image['tokens'], image['pos'], image['mask'], train)
    b, s, l, d = text['tokens'].shape
    tile = lambda x: jnp.repeat(x, s, axis=0)
    words = text['tokens'].reshape(b * s, l, d)
    # Text positions are in the embedding; queries and keys get none (MDETR).
    x = self.encoder(
        jnp.concatenate([tile(image['tokens']), words], 1),
        jnp.concatenate([tile(image['pos']), jnp.zeros_like(words)], 1),
        jnp.concatenate([tile(image['mask']),
                         text['mask'].reshape(b * s, l)], 1), train, last=l)
    return x.reshape(b, s, l, d)

  def decode(self, image, memory, text=None, detect=True, train=False):
    """Decoder over object queries and/or caption tokens; see Decoder."""
    return self.decoder(
        memory, image['pos'], image['mask'], image['xy'],
        None if text is None else text['tokens'],
        None if text is None else text['mask'], detect, train)

  def caption_logits(self, states):
    """[..., D] decoder states -> [..., V], tied to the word embeddings."""
    return self.text_embedding.attend(states) + self.caption_bias

  def __call__(self, batch: Mapping[str, Any],
               requests: Mapping[str, Sequence[str]],
               train: bool = False) -> Dict[str, Dict[str, Any]]:
    """Runs the views that `requests` names, the CNN once.

    Args:
      batch: see data/pipeline.py; only what the views read is needed.
      requests: view -> heads: 'grid': cells; 'image_only': detection,
        captioning; 'joint' (batch['text']) and 'joint_masked'
        (batch['masked_text']): mlm, itm.
      train: dropout and BN statistics.

    Returns:
      view -> dict of outputs, names as in DETR where DETR has them.
    """
    image = self.encode_image(batch['image'], batch['image_mask'], train)
    out = {}
    for view, wanted in sorted(requests.items()):
      if view == 'grid':
        out[view] = {**self.cells_head(image['features']),
                     'cell_xy': image['xy'], 'cell_mask': image['mask']}
      elif view == 'image_only':
        memory = self.fuse(image, train=train)
        out[view] = self._image_only(image, memory, batch, wanted, train)
      else:
        prefix = {'joint': 'text', 'joint_masked': 'masked_text'}[view]
        text = self.encode_text(batch[prefix], batch[prefix + '_mask'], train)
        text = self.fuse(image, text, train)
        out[view] = {}
        if 'mlm' in wanted:
          out[view]['mlm_logits'] = self.mlm_head(text,
                                                  self.text_embedding.attend)
        if 'itm' in wanted:
          out[view]['itm_logits'] = self.itm_head(
              layers.pool(text, batch[prefix + '_mask'],
                          self.config.itm_pool))
    return out

  def _image_only(self, image, memory, batch, wanted, train):
    """Detection and captioning from a memory that never saw the text."""
    detect, text, out = 'detection' in wanted, None, {}
    if 'captioning' in wanted:
      text = self.encode_text(batch['text'], batch['text_mask'], train)
    states, boxes, tokens = self.decode(image, memory, text, detect, train)
    if detect:
      stacked = {**self.detection_head(states), 'pred_boxes': boxes}
      per_layer = [{k: v[i] for k, v in stacked.items()}
                   for i in range(boxes.shape[0])]
      out = {**per_layer[-1], 'aux_outputs': per_layer[:-1]}
    if text is not None:
      out['caption_logits'] = self.caption_logits(tokens)
    return out

  def init_caption(self, batch):
    """What caption generation keeps of the image: dict for `step_caption`."""
    image = self.encode_image(batch['image'], batch['image_mask'])
    memory = self.fuse(image)
    return {k: image[k] for k in ('pos', 'mask', 'xy')} | {'memory': memory}

  def step_caption(self, cache, ids):
    """ids [B, L] -> logits [B, L, V] of the next token after each one."""
    text = self.encode_text(ids[:, None], jnp.ones_like(ids[:, None], bool))
    _, _, states = self.decode(cache, cache['memory'], text, detect=False)
    return self.caption_logits(states[:, 0])


def describe(config):
  """`config.model` in one line, for people."""
  trunk = config['backbone']
  depth = f'-{trunk["depth"]}' if 'depth' in trunk else ''
  return (f'{trunk["name"]}{depth}, {config["encoder_layers"]} encoder and '
          f'{config["decoder_layers"]} decoder layers, width '
          f'{config["width"]}')
