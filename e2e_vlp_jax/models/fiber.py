"""FIBER's coarse stage (Dou et al., NeurIPS 2022): assembly.

Swin and RoBERTa with gated cross-attention inside their top `fuse` pairs of
layers. The same weights are a dual encoder (views `image_only`, `text_only`:
cross-attention skipped), a fusion encoder (`joint`, `joint_masked`,
`hard_negative`) and, with a causal text, a captioner. Names and numbers as
the public code (microsoft/FIBER, coarse_grained); docs/fiber.md says where we
differ.

What lies below the first pair is the same in every view: it runs once per
image and step. (The original runs all of Swin five times. In training our
views therefore share the draws of stochastic depth and dropout down there.)
"""
from typing import Any, Dict, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import fusion
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import feature_queue
from e2e_vlp_jax.models import swin as swin_lib
from e2e_vlp_jax.models import roberta

_TEMPERATURE = .07
_LEAST_WEIGHT = 1e-9  # of a negative's chance to be drawn


class Model(nn.Module):
  """FIBER.

  Attributes:
    config: the `model` part of a config (configs/fiber.py).
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
    return {'grid': ('cells',), 'image_only': ('itc', 'captioning'),
            'text_only': ('itc',), 'joint': ('mlm', 'itm'),
            'joint_masked': ('mlm', 'itm'), 'hard_negative': ('itm',)}

  @property
  def heads(self):
    """Names of all heads."""
    return tuple(sorted({h for hs in self.views.values() for h in hs}))

  def setup(self):
    c = self.config
    self.swin = swin_lib.Swin(**c.swin, remat=c.remat, dtype=self.dtype)
    self.text = roberta.TextEncoder(
        self.vocab_size, **c.text, remat=c.remat, dtype=self.dtype)
    if not 0 < c.fuse <= min(sum(c.swin.depths), c.text.depth):
      raise errors.UserError(
          f'model.fuse: {c.fuse}; expected 1 to '
          f'{min(sum(c.swin.depths), c.text.depth)}, the number of blocks of '
          'the shorter trunk')
    dense = lambda n: nn.Dense(n, dtype=self.dtype,
                               kernel_init=fusion.TEXT_INIT)
    # The fusion encoder and the dual encoder have their own projections.
    for name in ('image', 'text', 'itc_image', 'itc_text'):
      setattr(self, f'{name}_projection', dense(c.width))
      setattr(self, f'{name}_pooler', dense(c.width))
    # Captions read the last image tokens in every pair.
    widths = [self.swin.width_at(i) for i in range(self.swin.depth)]
    self.caption_projections = {
        f'layer{c.text.depth - k}': dense(widths[-k])
        for k in range(c.fuse, 0, -1) if widths[-k] != widths[-1]}
    self.itm_head = nn.Dense(2, kernel_init=fusion.TEXT_INIT)
    self.mlm_head = heads_lib.MaskedLM(self.vocab_size, c.width,
                                       dtype=self.dtype,
                                       kernel_init=fusion.TEXT_INIT)
    self.mlm_decoder = self.param('mlm_decoder', fusion.TEXT_INIT,
                                  (c.width, self.vocab_size))
    self.cells_norm = layers.LayerNorm()
    self.cells_head = heads_lib.Cells(self.num_classes, self.num_attributes)
    if c.queue < 0:
      raise errors.UserError(f'model.queue: {c.queue}; expected 0 (none) or '
                             'a number of past examples')
    if c.queue:
      self.queue = feature_queue.Queue(c.queue)
      self.temperature = self.param(
          'temperature', nn.initializers.constant(_TEMPERATURE), ())
    else:
      self.logit_scale = self.param(
          'logit_scale', nn.initializers.constant(-jnp.log(_TEMPERATURE)), ())

  # --- The trunks -------------------------------------------------------------

  def encode_image(self, image, image_mask, train=False):
    """Pixels -> tokens below the first pair.

    Args:
      image: [B, H, W, 3] uint8, padded bottom and right.
      image_mask: [B, H, W] True on real pixels.
      train: stochastic depth.

    Returns:
      [B, h, w, C]. Padding has the mean colour and is seen, as nothing in
      Swin masks tokens; FIBER resizes to squares, so that there is none.
    """
    c = self.config
    wide = jnp.promote_types(self.dtype, jnp.float32)
    pixels = image.astype(wide) / 255.
    pixels = ((pixels - jnp.asarray(c.image_mean, wide))
              / jnp.asarray(c.image_std, wide))
    pixels = pixels * image_mask[..., None]
    x = self.swin.embed(pixels.astype(self.dtype))
    return self.swin.run(x, 0, self.swin.depth - c.fuse, train)

  def encode_text(self, ids, mask, train=False):
    """[B, S, L] ids and mask -> states below the first pair [B, S, L, D]."""
    b, s, l = ids.shape
    flat = mask.reshape(b * s, l)
    x = self.text.embed(ids.reshape(b * s, l), flat, train)
    x = self.text.run(x, _key_bias(flat), 0,
                      self.text.depth - self.config.fuse, train)
    return x.reshape(b, s, l, -1)

  def finish_image(self, x, train=False):
    """Upper blocks without text: [B, h, w, C] -> [B, N, C'], no last norm."""
    depth = self.swin.depth
    return _flat(self.swin.run(x, depth - self.config.fuse, depth, train))

  def finish_text(self, x, mask, train=False):
    """Upper layers without image: [B, S, L, D] -> the same."""
    b, s, l, d = x.shape
    depth = self.text.depth
    y = self.text.run(x.reshape(b * s, l, d), _key_bias(mask.reshape(-1, l)),
                      depth - self.config.fuse, depth, train)
    return y.reshape(b, s, l, d)

  def fuse(self, image, text, mask, train=False):
    """The pairs, with cross-attention.

    Args:
      image: [B, P, h, w, C] of `encode_image`, an image for each text.
      text: [B, P, L, D] of `encode_text`.
      mask: [B, P, L].
      train: dropout and stochastic depth.

    Returns:
      projected text [B, P, L, E] and image tokens [B, P, N, E]. Neither
      trunk's last LayerNorm is applied, as in the original.
    """
    b, p, l = mask.shape
    x = image.reshape(b * p, *image.shape[2:])
    y = text.reshape(b * p, l, -1)
    bias = _key_bias(mask.reshape(b * p, l))
    for k in range(self.config.fuse, 0, -1):
      i, j = self.swin.depth - k, self.text.depth - k
      x = self.swin.enter(i, x)
      seen = _flat(x)  # Both read what the other was before the pair.
      x = self.swin.block(i, x, y, bias, train)
      y = self.text.layer(j, y, bias, seen, train, k > 1)
    x = self.image_projection(_flat(x))
    return (self.text_projection(y).reshape(b, p, l, -1),
            x.reshape(b, p, *x.shape[1:]))

  def decode(self, image, ids, mask, train=False):
    """Causal text over an image.

    Args:
      image: [B, N, C] of `finish_image`; it never sees the text.
      ids, mask: [B, S, L].
      train: dropout on.

    Returns:
      [B, S, L, E] projected states.
    """
    b, s, l = ids.shape
    image = jnp.repeat(image, s, 0)
    mask = mask.reshape(b * s, l)
    y = self.text.embed(ids.reshape(b * s, l), mask, train)
    bias = layers.mask_bias(jnp.tril(jnp.ones((l, l), bool)) & mask[:, None])
    for j in range(self.text.depth):
      project = self.caption_projections.get(f'layer{j}', lambda x: x)
      y = self.text.layer(
          j, y, bias[:, None],
          project(image) if j >= self.text.depth - self.config.fuse else None,
          train)
    return self.text_projection(y).reshape(b, s, l, -1)

  # --- Heads ------------------------------------------------------------------

  def embed_image(self, image):
    """[B, N, C] of `finish_image` -> unit vectors [B, E], float32."""
    x = self.itc_image_projection(self.swin.norm(image)).mean(1)
    return _unit(jnp.tanh(self.itc_image_pooler(x)))

  def embed_text(self, text):
    """[B, S, L, D] of `finish_text` -> unit vectors [B, S, E], float32."""
    x = self.itc_text_projection(text[:, :, 0])
    return _unit(jnp.tanh(self.itc_text_pooler(x)))

  def itc_scale(self):
    """What cosines are multiplied with."""
    if not self.config.queue:
      return jnp.exp(self.logit_scale)
    # The original clamps the parameter in place before each use; the gradient
    # passes there too.
    t = self.temperature
    return 1 / (t + jax.lax.stop_gradient(jnp.clip(t, .001, 1.) - t))

  def pair(self, text, image, mask):
    """Projected tokens, text mask -> both pooled [..., 2E], text first."""
    text = layers.pool(text, mask, self.config.itm_pool)
    return jnp.concatenate([
        jnp.tanh(self.text_pooler(text)),
        jnp.tanh(self.image_pooler(image.mean(-2)))], -1)

  def itm_logits(self, text, image, mask):
    """Projected tokens [B, P, ., E] -> [B, P, 2]; 1 = they belong together."""
    x = self.pair(text, image, mask)
    return self.itm_head(x.astype(layers.wide(x)))

  def mlm_logits(self, text):
    """[..., E] projected text -> [..., V]."""
    return self.mlm_head(text, lambda x: jnp.einsum(
        '...d,dv->...v', x, self.mlm_decoder.astype(x.dtype),
        preferred_element_type=layers.wide(x)))

  # --- Views ------------------------------------------------------------------

  def __call__(self, batch: Mapping[str, Any],
               requests: Mapping[str, Sequence[str]],
               train: bool = False) -> Dict[str, Dict[str, Any]]:
    """Runs the views that `requests` names.

    Args:
      batch: see data/pipeline.py; only what the views read is needed.
      requests: view -> heads, see `views`. Negatives are drawn from the rng
        stream 'sample'; without it the most similar ones are taken.
      train: dropout, stochastic depth, and the queue moves on.

    Returns:
      view -> dict of outputs:
      'grid': cells. 'image_only', 'text_only': image_embedding [B, E],
      text_embedding [B, S, E], itc_scale; both with a queue: image_queue,
      text_queue [Q, E], queue_filled [Q]. 'image_only': caption_logits
      [B, S, L, V]. 'joint', 'joint_masked': mlm_logits [B, S, L, V],
      itm_logits [B, S, 2]. 'hard_negative': itm_logits [B, 3S, 2],
      itm_labels [B, 3S] (-1 = no such pair).
    """
    out = {view: {} for view in requests}
    hard = 'hard_negative' in requests
    low = words = dual = None
    if set(requests) - {'text_only'} or self.is_initializing():
      low = self.encode_image(batch['image'], batch['image_mask'], train)
    if {'text_only', 'joint'} & set(requests) or hard:
      words = self.encode_text(batch['text'], batch['text_mask'], train)

    if 'image_only' in requests or hard:
      dual = self.finish_image(low, train)
    if 'grid' in requests:
      out['grid'] = self._grid(low, batch)
    if 'captioning' in requests.get('image_only', ()):
      states = self.decode(dual, batch['text'], batch['text_mask'], train)
      out['image_only']['caption_logits'] = self.mlm_logits(states)

    image = text = held = None
    if 'itc' in requests.get('image_only', ()) or hard:
      image = self.embed_image(dual)
    if 'text_only' in requests or hard:
      text = self.embed_text(self.finish_text(words, batch['text_mask'],
                                              train))
    if self.config.queue and image is not None and text is not None:
      held = self._queue(image, text, batch, train)
    for view, name, x in (('image_only', 'image', image),
                          ('text_only', 'text', text)):
      if view in requests and x is not None:
        out[view] |= {f'{name}_embedding': x, 'itc_scale': self.itc_scale()}
        if held:
          out[view] |= {f'{name}_queue': held[0][f'{name}_features'],
                        'queue_filled': held[1]}

    for view, prefix in (('joint', 'text'), ('joint_masked', 'masked_text')):
      if view in requests:
        mask = batch[prefix + '_mask']
        below = words if view == 'joint' else self.encode_text(
            batch[prefix], mask, train)
        fused = self.fuse(_for_each(low, mask.shape[1]), below, mask, train)
        if 'mlm' in requests[view]:
          out[view]['mlm_logits'] = self.mlm_logits(fused[0])
        if 'itm' in requests[view]:
          out[view]['itm_logits'] = self.itm_logits(*fused, mask)
    if hard:
      out['hard_negative'] = self._hard_negative(
          low, words, image, text, held, batch, train)
    elif self.is_initializing() and not any(v.startswith('joint')
                                            for v in requests):
      # One trunk's weights are made as a whole, whatever is trained first.
      s = batch['text'].shape[1]
      if words is None:
        words = self.encode_text(batch['text'], batch['text_mask'])
      self.fuse(_for_each(low, s), words, batch['text_mask'])
    return out

  def _grid(self, low, batch):
    """Labels of the tokens that the first pair reads, to warm-start both.

    Not of the last ones: the text never sees those, and would have to wait
    until cross-attention finds out what an image token holds.
    """
    x = self.swin.enter(self.swin.depth - self.config.fuse, low)
    mask = layers.downsample_mask(batch['image_mask'], *x.shape[1:3])
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    return {**self.cells_head(self.cells_norm(_flat(x))),
            'cell_xy': flat(layers.cell_centers(mask)),
            'cell_mask': mask.reshape(mask.shape[0], -1)}

  def _queue(self, image, text, batch, train):
    """Past features and inputs: ({name: [Q, ...]}, filled [Q])."""
    if text.shape[1] != 1:
      raise errors.UserError(
          f'data.sentences: {text.shape[1]}; model.queue keeps pairs of one '
          'image and one text, expected data.sentences=1')
    return self.queue({
        'image_features': jax.lax.stop_gradient(image),
        'text_features': jax.lax.stop_gradient(text[:, 0]),
        'image': batch['image'], 'image_mask': batch['image_mask'],
        'text': batch['text'][:, 0], 'text_mask': batch['text_mask'][:, 0],
    }, train)

  def _hard_negative(self, low, words, image, text, held, batch, train):
    """Each pair, each image with a hard text, each text with a hard image."""
    mask = batch['text_mask']
    b, s, _ = mask.shape
    there = mask.any(-1)  # A row without text takes no part.
    images, texts = image, text.reshape(b * s, -1)
    has_image, has_text = there.any(1), there.reshape(-1)
    if held:
      images = jnp.concatenate([images, held[0]['image_features']])
      texts = jnp.concatenate([texts, held[0]['text_features']])
      has_image = jnp.concatenate([has_image, held[1]])
      has_text = jnp.concatenate([has_text, held[1]])
    own = jnp.arange(b)[:, None]
    scale = self.config.hardness * self.itc_scale()
    # [B, S] each: indices into images and texts.
    image_at, image_found = self._draw(
        scale * jnp.einsum('bse,ne->bsn', text, images), has_image,
        (jnp.arange(len(images)) == own)[:, None])
    text_at, text_found = self._draw(
        scale * jnp.repeat(jnp.einsum('be,ne->bn', image, texts)[:, None], s,
                           1), has_text,
        (jnp.arange(len(texts)) // s == own)[:, None]
        & (jnp.arange(len(texts)) < b * s))

    if held:
      every = lambda k, x: jnp.concatenate([x, held[0][k]])
      pick = lambda k, at: every(k, batch[k].reshape(
          -1, *held[0][k].shape[1:]))[at]
      hard_image = self.encode_image(
          pick('image', image_at[:, 0]), pick('image_mask', image_at[:, 0]),
          train)[:, None]
      hard_mask = pick('text_mask', text_at)
      hard_text = self.encode_text(pick('text', text_at), hard_mask, train)
    else:
      hard_image = low[image_at]
      pick = lambda x: x.reshape(b * s, *x.shape[2:])[text_at]
      hard_text, hard_mask = pick(words), pick(mask)

    stack = lambda *xs: jnp.concatenate(xs, 1)
    true = _for_each(low, s)
    masks = stack(mask, hard_mask, mask)
    fused = self.fuse(stack(true, true, hard_image),
                      stack(words, hard_text, words), masks, train)
    label = lambda ok, value: jnp.where(ok & there, value, -1)
    return {'itm_logits': self.itm_logits(*fused, masks),
            'itm_labels': stack(label(True, 1), label(text_found, 0),
                                label(image_found, 0))}

  def _draw(self, similarity, allowed, own):
    """[B, S] index of a negative and whether there is one; see `negatives`."""
    logits = negatives(jax.lax.stop_gradient(similarity), allowed, own)
    if self.has_rng('sample'):
      index = jax.random.categorical(self.make_rng('sample'), logits)
    else:
      index = jnp.argmax(logits, -1)
    return index, jnp.isfinite(logits).any(-1)

  # --- Captions ---------------------------------------------------------------

  def init_caption(self, batch):
    """What caption generation keeps of the image: dict for `step_caption`."""
    low = self.encode_image(batch['image'], batch['image_mask'])
    return {'tokens': self.finish_image(low)}

  def step_caption(self, cache, ids):
    """ids [B, L] -> logits [B, L, V] of the next token after each one."""
    ids = ids[:, None]
    states = self.decode(cache['tokens'], ids, jnp.ones_like(ids, bool))
    return self.mlm_logits(states)[:, 0]

  # --- Checkpoints of another image side --------------------------------------

  def adapt(self, params, shapes):
    """`params` with relative position tables resized to those of `shapes`.

    Args:
      params, shapes: nested dicts of arrays, and of what they should be.

    Returns:
      `params`, with other tables where the windows have another size.
    """
    def fit(path, x):
      want = shapes
      for key in path:
        want = want.get(key.key) if hasattr(want, 'get') else None
      if (want is None or path[-1].key != 'relative_bias'
          or want.shape == x.shape):
        return x
      return swin_lib.resize_relative_bias(x, want.shape[0])
    return jax.tree_util.tree_map_with_path(fit, params)


def negatives(similarity, allowed, own):
  """Log-weights by which negatives are drawn: softmax of the similarities.

  Args:
    similarity: [..., n], tempered.
    allowed: [n] candidates that exist.
    own: broadcasts to [..., n], those of the same pair; never drawn. (The
      original leaves them a weight of 1e-9, as it adds to all.)
  """
  weight = jax.nn.softmax(jnp.where(allowed, similarity, layers.MASKED))
  return jnp.where(allowed & ~own, jnp.log(weight + _LEAST_WEIGHT), -jnp.inf)


def _key_bias(mask):
  """[B, L] True on tokens -> [B, 1, 1, L]."""
  return layers.mask_bias(mask)[:, None, None]


def _flat(x):
  """[B, h, w, C] -> [B, N, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _for_each(x, s):
  """[B, ...] -> [B, S, ...], the same for each of S texts."""
  return jnp.broadcast_to(x[:, None], (x.shape[0], s, *x.shape[1:]))


def _unit(x):
  """Vectors of length 1, float32."""
  x = x.astype(layers.wide(x))
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def describe(config):
  """`config.model` in one line, for people."""
  swin = config['swin']
  depths = '-'.join(map(str, swin['depths']))
  text = config.get('roberta') or config['text']
  fused = config.get('fused_layers') or config['fuse']
  return (f'Swin {depths} of width {swin["width"]}, RoBERTa of '
          f'{text["depth"]} layers, {fused} of them fused, width '
          f'{config["width"]}')
