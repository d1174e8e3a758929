"""FIBER's fine stage (Dou et al., NeurIPS 2022): assembly.

The trunk of the coarse stage (fiber_trunk.py) reads an image and a text
together. The outputs of Swin's last three stages become a feature pyramid
(fpn.py), a dynamic head mixes its levels (dyhead.py), and every location gets a
box and a logit for each token of the text (grounding_head.py). After the trunk
the text is only read by that last product. Names and numbers follow the public
code (microsoft/FIBER, fine_grained); docs/fiber_fine.md lists the differences.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.models import dyhead
from e2e_vlp_jax.models import fiber_trunk
from e2e_vlp_jax.models import fpn
from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.ops import anchors as anchors_lib

_STAGES = 3  # of Swin that the pyramid reads
_CHANNELS = ('rgb', 'bgr')


class Fused(NamedTuple):
  """`contract.Fused`, and the pyramid.

  Attributes:
    text: [B, P, L, D] states of the text's tokens, zero on padding.
    image: [B, P, N, C] tokens of Swin's last stage, normalised.
    pooled: [B, P, D] of the text's states, which saw the image.
    levels: [[B, P, h, w, C] of each level of the pyramid], or None.
  """
  text: Any
  image: Any
  pooled: Any
  levels: Any


class Model(fiber_trunk.Trunk):
  """FIBER's fine stage; see contract.BaseModel. Config: configs/fiber_fine.py.

  `frozen` (optim.groups) may hold Swin's first stages, which then get no
  gradient and no stochastic depth.
  """

  HEADS = {'grounding': contract.Head(('levels', 'text'),
                                      'grounding_outputs')}

  @property
  def table(self):
    return {'joint': contract.View(inputs=('image', 'text'),
                                   heads=('grounding',),
                                   **contract.FUSED_VIEW)}

  def setup(self):
    self.setup_trunk()
    c = self.config
    if len(c.swin.depths) < _STAGES:
      raise errors.UserError(
          f'model.swin.depths: {tuple(c.swin.depths)}; expected at least '
          f'{_STAGES} stages, which the pyramid reads')
    if c.channels not in _CHANNELS:
      raise errors.UserError(f'model.channels: {c.channels!r}'
                             + errors.nearest(c.channels, _CHANNELS))
    self.stage_norms = [layers.LayerNorm(c.swin.epsilon)
                        for _ in range(_STAGES)]
    self.pyramid = fpn.Pyramid(c.head.width, c.head.drop_block, self.dtype)
    self.tower = dyhead.Tower(c.head.blocks, c.head.width,
                              c.head.released_offsets, c.remat, self.dtype)
    self.head = grounding_head.Grounding(c.head.width)
    self.setup_heads()

  @property
  def stride(self):
    """Pixels between the locations of the pyramid's finest level."""
    c = self.config.swin
    return c.patch * 2**(len(c.depths) - _STAGES)

  # --- Features ---------------------------------------------------------------

  def pixels(self, image, image_mask):
    """Normalised, in the order of channels that the weights expect."""
    x = super().pixels(image, image_mask)
    return x[..., ::-1] if self.config.channels == 'bgr' else x

  def encode_image(self, batch, train=False):
    """image, image_mask -> dict: tokens below the first pair [B, h, w, C], and
    stages, the outputs of earlier stages that the pyramid reads."""
    stages = []
    tokens = self.lower_image(batch['image'], batch['image_mask'], train,
                              stages)
    unread = len(self.config.swin.depths) - _STAGES
    return {'tokens': tokens, 'stages': stages[unread:]}

  def encode_text(self, ids, mask, train=False):
    """[B, S, L] -> dict: tokens below the first pair [B, S, L, D], mask."""
    b, s, l = ids.shape
    x = self.lower_text(ids.reshape(b * s, l), mask.reshape(b * s, l), train)
    return {'tokens': x.reshape(b, s, l, -1), 'mask': mask}

  def fuse(self, image, text, train=False, want=contract.FUSED):
    """The pairs of layers, the norms of stages, the pyramid: a `Fused`."""
    b, p, l = text['mask'].shape
    flat = lambda x: x.reshape(b * p, *x.shape[2:])
    image = jax.tree.map(lambda x: flat(fiber_trunk.for_each(x, p)), image)
    stages = list(image['stages'])
    pair = image['tokens'], flat(text['tokens']), flat(text['mask'])
    if self.config.cross_attention:
      y, _ = self.fused_pairs(*pair, train, stages, last_norm=True)
    else:
      self.upper_image(pair[0], train, stages)
      y = self.upper_text(*pair[1:], train)
    stages = [norm(x) for norm, x in zip(self.stage_norms, stages[-_STAGES:])]
    levels = self.pyramid(stages, train) if 'levels' in want else None
    back = lambda x: x.reshape(b, p, *x.shape[1:])
    y = back(y) * text['mask'][..., None].astype(y.dtype)
    return Fused(y, back(fiber_trunk.flatten(stages[-1])),
                 layers.pool(y, text['mask'], self.config.text_pool),
                 jax.tree.map(back, levels))

  def grounding_outputs(self, states):
    """token_logits [B, P, A, L], box_code [B, P, A, 4], centerness [B, P, A],
    and anchors {level: [B, P, A_l, 4]} in pixels of the canvas."""
    b, p = states['text'].shape[:2]
    flat = lambda x: x.reshape(b * p, *x.shape[2:])
    levels = self.tower([flat(x) for x in states['levels']])
    out = self.head(levels, flat(states['text']))
    out = {k: x.reshape(b, p, *x.shape[1:]) for k, x in out.items()}
    anchors = anchors_lib.pyramid([x.shape[1:3] for x in levels], self.stride,
                                  self.config.head.anchor_scale)
    return {**out, 'anchors': {
        f'p{k}': jnp.broadcast_to(x, (b, p, *x.shape))
        for k, x in enumerate(anchors, 3)}}

  # --- Checkpoints of the coarse stage ----------------------------------------

  def adapt(self, loaded, params):
    """`loaded` as it is: all that fits is taken, the rest starts anew.

    Raises:
      UserError: its trunk has the other variant of fusion or another window,
        so that much of it would silently not fit.
    """
    theirs, ours = _facts(loaded), _facts(params)
    for key, value in ours.items():
      if theirs.get(key, value) != value:
        raise errors.UserError(
            f'init_from: the checkpoint has {key}={theirs[key]}, this model '
            f'{value}; expected a checkpoint of the same {key}, or '
            f'--config.{key}={theirs[key]}')
    return loaded


def _facts(params):
  """{config key: value} that the parameters of a trunk tell."""
  names = {'/'.join(k.key for k in path): x for path, x in
           jax.tree_util.tree_flatten_with_path(params)[0]}
  found = {}
  fused = [n for n in names if n.startswith('swin/') and '/cross/' in n]
  if fused:
    found['model.swin.fusion'] = ('v3' if any('/cross/norm/' in n
                                              for n in fused) else 'v2')
  tables = [x.shape[0] for n, x in names.items()
            if n.startswith('swin/') and n.endswith('/relative_bias')]
  if tables:  # (2w - 1)^2 rows, fewer where a grid is smaller than w
    found['model.swin.window'] = int(max(tables)**.5 + 1) // 2
  return found


def describe(config):
  """`config.model` in one line, for people."""
  swin, head = config['swin'], config['head']
  depths = '-'.join(map(str, swin['depths']))
  return (f'Swin {depths} of width {swin["width"]}, RoBERTa of '
          f'{config["roberta"]["depth"]} layers, {config["fused_layers"]} of '
          f'them fused ({swin["fusion"]}), dynamic head of {head["blocks"]} '
          f'blocks, width {head["width"]}')
