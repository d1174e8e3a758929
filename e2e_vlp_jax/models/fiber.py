"""FIBER's coarse stage (Dou et al., NeurIPS 2022): assembly.

The same weights are a dual encoder (views `image_only`, `text_only`:
cross-attention skipped), a fusion encoder (`joint`, `joint_masked`,
`hard_negative`) and, with a causal text, a captioner. Names and numbers follow
the public code (microsoft/FIBER, coarse_grained); docs/fiber.md lists the
differences.

The part below the first pair of layers (fiber_trunk.py) is the same in every
view, so it runs once per image and step. (The original runs all of Swin five
times. In training our views therefore share the random numbers of stochastic
depth and dropout in that part.)
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.models import feature_queue
from e2e_vlp_jax.models import fiber_trunk
from e2e_vlp_jax.models import heads as heads_lib
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import swin as swin_lib

_TEMPERATURE = .07
_MIN_WEIGHT = 1e-9  # added to the weight of each candidate negative


class Model(fiber_trunk.Trunk):
  """FIBER; see contract.BaseModel. Its config is configs/fiber.py."""

  HEADS = {'grid_classes': contract.Head(('grid',), 'grid_outputs'),
           'itc': contract.Head(('embedding',), 'itc_outputs'),
           'captioning': contract.Head(('caption',), 'caption_outputs'),
           'mlm': contract.Head(('text',), 'mlm_outputs'),
           'itm': contract.Head(('pooled',), 'itm_outputs')}
  batchless_outputs = ('itc_scale', 'image_queue', 'text_queue',
                       'queue_filled')

  @property
  def table(self):
    view, heads = contract.View, ('mlm', 'itm')
    return {
        'grid': view('grid_states', ('image',), ('grid_classes',), ('grid',)),
        'image_only': view('image_only_states', ('image', 'text'),
                           ('itc', 'captioning')),
        'text_only': view('text_only_states', ('text',), ('itc',)),
        'joint': view(inputs=('image', 'text'), heads=heads,
                      **contract.FUSED_VIEW),
        'joint_masked': view(inputs=('image', 'masked_text'), heads=heads,
                             **contract.FUSED_VIEW),
        'hard_negative': view('hard_negative_states', ('image', 'text'),
                              ('itm',))}

  @property
  def pieces(self):
    return {
        **super().pieces,
        'upper_image': lambda p: self.upper_image(p['image'], p.train),
        'image_embedding': lambda p: self.embed_image(p['upper_image']),
        'text_embedding': lambda p: self.embed_text(p['text'], p.train),
        'past': lambda p: self.past_examples(
            p['image_embedding'], p['text_embedding'], p.batch, p.train)}

  @property
  def keeps_past_examples(self):
    return self.config.queue > 0

  def setup(self):
    self.setup_trunk()
    c = self.config
    dense = lambda n: nn.Dense(n, dtype=self.dtype,
                               kernel_init=fiber_trunk.INIT)
    # The fusion encoder and the dual encoder have their own projections.
    for name in ('image', 'text', 'itc_image', 'itc_text'):
      setattr(self, f'{name}_projection', dense(c.width))
      setattr(self, f'{name}_pooler', dense(c.width))
    # Captions attend to the last image tokens in every pair.
    widths = [self.swin.width_at(i) for i in range(self.swin.depth)]
    self.caption_projections = {
        f'layer{c.roberta.depth - k}': dense(widths[-k])
        for k in range(c.fused_layers, 0, -1) if widths[-k] != widths[-1]}
    self.itm_head = nn.Dense(2, kernel_init=fiber_trunk.INIT)
    self.mlm_head = heads_lib.MaskedLM(self.vocab_size, c.width,
                                       dtype=self.dtype,
                                       kernel_init=fiber_trunk.INIT)
    self.mlm_decoder = self.param('mlm_decoder', fiber_trunk.INIT,
                                  (c.width, self.vocab_size))
    self.cells_norm = layers.LayerNorm()
    self.cells_head = heads_lib.GridClasses(self.num_classes,
                                            self.num_attributes)
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
    self.setup_heads()

  def complete(self, pieces):
    """Creates both trunks in full, even if this stage only trains one."""
    fused = 'joint', 'joint_masked', 'hard_negative'
    if not set(fused) & set(pieces.requests):
      self.fuse(pieces['image'], pieces['text'])

  # --- Features ---------------------------------------------------------------

  def encode_image(self, batch, train=False):
    """image, image_mask -> tokens below the first pair [B, h, w, C]."""
    return self.lower_image(batch['image'], batch['image_mask'], train)

  def encode_text(self, ids, mask, train=False):
    """[B, S, L] -> dict: tokens below the first pair [B, S, L, D], mask."""
    b, s, l = ids.shape
    x = self.lower_text(ids.reshape(b * s, l), mask.reshape(b * s, l), train)
    return {'tokens': x.reshape(b, s, l, -1), 'mask': mask}

  def fuse(self, image, text, train=False, want=contract.FUSED):
    """The pairs of layers, and projections of their last tokens."""
    return self._fuse(fiber_trunk.for_each(image, text['mask'].shape[1]), text,
                      train, want)

  def _fuse(self, image, text, train, want):
    """`fuse` of images [B, P, h, w, C], one for each text."""
    b, p, l = text['mask'].shape
    y, x = self.fused_pairs(
        image.reshape(b * p, *image.shape[2:]),
        text['tokens'].reshape(b * p, l, -1), text['mask'].reshape(b * p, l),
        train)
    x = self.image_projection(fiber_trunk.flatten(x))
    y = self.text_projection(y).reshape(b, p, l, -1)
    x = x.reshape(b, p, *x.shape[1:])
    return contract.Fused(
        y, x, self.pool(y, x, text['mask']) if 'pooled' in want else None)

  def pool(self, text, image, mask):
    """Projected tokens and text mask -> pooled states [..., 2E], text first."""
    text = layers.pool(text, mask, self.config.text_pool)
    return jnp.concatenate([
        jnp.tanh(self.text_pooler(text)),
        jnp.tanh(self.image_pooler(image.mean(-2)))], -1)

  def embed_image(self, image):
    """[B, N, C] of `upper_image` -> unit vectors [B, E], float32."""
    x = self.itc_image_projection(self.swin.norm(image)).mean(1)
    return _unit(jnp.tanh(self.itc_image_pooler(x)))

  def embed_text(self, text, train=False):
    """Text features -> unit vectors [B, S, E], float32."""
    b, s, l, d = text['tokens'].shape
    x = self.upper_text(text['tokens'].reshape(b * s, l, d),
                        text['mask'].reshape(b * s, l), train)
    x = self.itc_text_projection(x.reshape(b, s, l, d)[:, :, 0])
    return _unit(jnp.tanh(self.itc_text_pooler(x)))

  def itc_scale(self):
    """Logit scale (inverse temperature) of the cosine similarities."""
    if not self.config.queue:
      return jnp.exp(self.logit_scale)
    # The original clamps the parameter in place before each use; the gradient
    # passes there too.
    t = self.temperature
    return 1 / (t + jax.lax.stop_gradient(jnp.clip(t, .001, 1.) - t))

  def past_examples(self, image, text, batch, train):
    """({name: [Q, ...]}, filled [Q]) of the queue, which then takes these.

    Args:
      image, text: embeddings [B, E], [B, 1, E].
      batch: their images and texts.
      train: whether they are added to the queue.
    """
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

  # --- States of views --------------------------------------------------------

  def grid_states(self, pieces, view, want):
    """The tokens that the first pair reads, to warm-start both trunks.

    Not the last ones: the text never attends to those, so cross-attention would
    still have to learn what an image token represents.
    """
    del view, want
    x = self.swin.enter(self.first_block, pieces['image'])
    mask = layers.downsample_mask(pieces.batch['image_mask'], *x.shape[1:3])
    return {'grid': self.cells_norm(fiber_trunk.flatten(x)),
            'mask': mask.reshape(len(mask), -1),
            'xy': layers.cell_centers(mask).reshape(len(mask), -1, 2)}

  def image_only_states(self, pieces, view, want):
    del view
    states = {}
    if 'caption' in want:
      states['caption'] = self.decode(
          pieces['upper_image'], pieces.batch['text'],
          pieces.batch['text_mask'], pieces.train)
    if 'embedding' in want:
      states['embedding'] = self._embedding(pieces, 'image')
    return states

  def text_only_states(self, pieces, view, want):
    del view, want
    return {'embedding': self._embedding(pieces, 'text')}

  def _embedding(self, pieces, side):
    """ITC outputs of one side; with past examples if both sides run."""
    found = {f'{side}_embedding': pieces[f'{side}_embedding']}
    if self.config.queue and ('hard_negative' in pieces.requests or all(
        'itc' in pieces.requests.get(v, ()) for v in ('image_only',
                                                      'text_only'))):
      past, filled = pieces['past']
      found |= {f'{side}_queue': past[f'{side}_features'],
                'queue_filled': filled}
    return found

  def hard_negative_states(self, pieces, view, want):
    """Each pair, each image with a hard text, each text with a hard image.

    Negatives are sampled with the rng stream 'sample', by the ITC similarities
    of the batch's pairs and, with a queue, of past ones.
    """
    del view
    batch, image, text = pieces.batch, pieces['image'], pieces['text']
    mask = text['mask']
    b, s, _ = mask.shape
    past, filled = pieces['past'] if self.config.queue else (None, None)
    image_at, image_found, text_at, text_found = self._choose(
        pieces['image_embedding'], pieces['text_embedding'], mask.any(-1),
        past, filled)
    if past:
      every = lambda k: jnp.concatenate(
          [batch[k].reshape(-1, *past[k].shape[1:]), past[k]])
      hard_image = self.lower_image(
          every('image')[image_at[:, 0]], every('image_mask')[image_at[:, 0]],
          pieces.train)[:, None]
      hard_text = self.encode_text(every('text')[text_at],
                                   every('text_mask')[text_at], pieces.train)
    else:
      hard_image = image[image_at]
      hard_text = jax.tree.map(
          lambda x: x.reshape(b * s, *x.shape[2:])[text_at], text)
    stack = lambda *xs: jnp.concatenate(xs, 1)
    own = fiber_trunk.for_each(image, s)
    fused = self._fuse(stack(own, own, hard_image),
                       jax.tree.map(stack, text, hard_text, text),
                       pieces.train, want)
    label = lambda ok, value: jnp.where(ok & mask.any(-1), value, -1)
    return {**fused._asdict(),
            'labels': stack(label(True, 1), label(text_found, 0),
                            label(image_found, 0))}

  def _choose(self, image, text, valid, past, filled):
    """A hard image for each text, and a hard text for each image and text.

    Args:
      image, text: embeddings [B, E], [B, S, E].
      valid: [B, S] False where there is no text; such rows are ignored.
      past, filled: contents of the queue, or None.

    Returns:
      (indices of images [B, S], whether there is one, indices of texts, ...)
      into the batch's images or texts, followed by those of the queue.
    """
    b, s, _ = text.shape
    images, texts = image, text.reshape(b * s, -1)
    has_image, has_text = valid.any(1), valid.reshape(-1)
    if past:
      images = jnp.concatenate([images, past['image_features']])
      texts = jnp.concatenate([texts, past['text_features']])
      has_image = jnp.concatenate([has_image, filled])
      has_text = jnp.concatenate([has_text, filled])
    own = jnp.arange(b)[:, None]
    scale = self.config.negative_hardness * self.itc_scale()
    of_text = self._sample(
        scale * jnp.einsum('bse,ne->bsn', text, images), has_image,
        (jnp.arange(len(images)) == own)[:, None])
    of_image = self._sample(
        scale * jnp.repeat(jnp.einsum('be,ne->bn', image, texts)[:, None], s,
                           1), has_text,
        (jnp.arange(len(texts)) // s == own)[:, None]
        & (jnp.arange(len(texts)) < b * s))
    return *of_text, *of_image

  def _sample(self, similarity, allowed, own):
    """[B, S] index of a negative and whether there is one; see `negatives`."""
    logits = negatives(jax.lax.stop_gradient(similarity), allowed, own)
    if self.has_rng('sample'):
      index = jax.random.categorical(self.make_rng('sample'), logits)
    else:
      index = jnp.argmax(logits, -1)
    return index, jnp.isfinite(logits).any(-1)

  # --- Heads ------------------------------------------------------------------

  def grid_outputs(self, states):
    return {**self.cells_head(states['grid']), 'grid_xy': states['xy'],
            'grid_mask': states['mask']}

  def itc_outputs(self, states):
    """image_embedding [B, E] or text_embedding [B, S, E], itc_scale, and of
    the queue image_queue or text_queue [Q, E], queue_filled [Q]."""
    return {**states['embedding'], 'itc_scale': self.itc_scale()}

  def itm_outputs(self, states):
    """itm_logits [B, P, 2] (1 = they belong together), and itm_labels [B, P]
    (-1 = no such pair) of a view that makes its own pairs."""
    x = states['pooled']
    out = {'itm_logits': self.itm_head(x.astype(layers.wide(x)))}
    return out | ({'itm_labels': states['labels']} if 'labels' in states
                  else {})

  def mlm_outputs(self, states):
    return {'mlm_logits': self.mlm_logits(states['text'])}

  def caption_outputs(self, states):
    return {'caption_logits': self.mlm_logits(states['caption'])}

  def mlm_logits(self, text):
    """[..., E] projected text -> [..., V]."""
    return self.mlm_head(text, lambda x: jnp.einsum(
        '...d,dv->...v', x, self.mlm_decoder.astype(x.dtype),
        preferred_element_type=layers.wide(x)))

  # --- Captions ---------------------------------------------------------------

  def decode(self, image, ids, mask, train=False):
    """Causal text over an image.

    Args:
      image: [B, N, C] of `upper_image`; it never attends to the text.
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
      y = self.text.layer(
          j, y, bias[:, None], self._caption_image(image, j)
          if j >= self.first_layer else None, train)
    return self.text_projection(y).reshape(b, s, l, -1)

  def _caption_image(self, image, j):
    """The image's tokens as captions attend to them in layer j."""
    name = f'layer{j}'
    return (self.caption_projections[name](image)
            if name in self.caption_projections else image)

  def decode_start(self, image, length=None):
    c = self.config.roberta
    length = length or self.text.longest
    image = self.upper_image(image)
    kept = {str(j): self.text.layers[j].project_image(
        self._caption_image(image, j))
            for j in range(self.first_layer, self.text.depth)}
    empty = layers.empty_cache(len(image), length, c.heads, c.width,
                               self.dtype)
    return {'image': kept, 'text': [empty] * self.text.depth,
            'position': jnp.zeros(len(image), jnp.int32)}

  def decode_step(self, cache, ids):
    position, text = cache['position'], list(cache['text'])
    y = self.text.embed_one(ids, position)
    for j, layer in enumerate(self.text.layers):
      y, text[j] = layer.step(y, position, text[j],
                              cache['image'].get(str(j)))
    logits = self.mlm_logits(self.text_projection(y[:, 0]))
    return logits, {**cache, 'text': text, 'position': position + 1}

  # --- Checkpoints of another image side --------------------------------------

  def adapt(self, loaded, params):
    """`loaded` with relative position tables resized to those of `params`."""
    def fit(path, x):
      want = params
      for key in path:
        want = want.get(key.key) if hasattr(want, 'get') else None
      if (want is None or path[-1].key != 'relative_bias'
          or want.shape == x.shape):
        return x
      return swin_lib.resize_relative_bias(x, want.shape[0])
    return jax.tree_util.tree_map_with_path(fit, loaded)


def negatives(similarity, allowed, own):
  """Log-weights with which negatives are sampled: softmax of similarities.

  Args:
    similarity: [..., n], divided by the temperature.
    allowed: [n] candidates that exist.
    own: broadcasts to [..., n], candidates of the same pair; never sampled.
      (The original adds 1e-9 to all weights, these included.)
  """
  weight = jax.nn.softmax(jnp.where(allowed, similarity, layers.MASKED))
  return jnp.where(allowed & ~own, jnp.log(weight + _MIN_WEIGHT), -jnp.inf)


def _unit(x):
  """Vectors of length 1, float32."""
  x = x.astype(layers.wide(x))
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def describe(config):
  """`config.model` in one line, for people."""
  swin = config['swin']
  depths = '-'.join(map(str, swin['depths']))
  return (f'Swin {depths} of width {swin["width"]}, RoBERTa of '
          f'{config["roberta"]["depth"]} layers, {config["fused_layers"]} of '
          f'them fused, width {config["width"]}')
