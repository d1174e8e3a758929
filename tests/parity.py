"""What the parity tests share: seeded weights, cases, inputs, comparisons.

Nothing here needs torch. The weights are random numbers drawn from their
tensors' published names, so that tests/data/parity_*.npz need hold results
alone (`make_parity_data.py` wrote them with transformers) and models of the
published sizes fit in a few kilobytes. numpy promises RandomState's streams
for ever.

Each comparison runs twice: against the stored results, for everybody, and
live against transformers where torch is installed (`parity_torch.py`).
"""
import dataclasses
import pathlib
import zlib

import flax
import jax
import jax.numpy as jnp
import numpy as np

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.weights import mapping

DATA = pathlib.Path(__file__).resolve().parent / 'data'
TOLERANCE = 1e-4


# --- Weights ----------------------------------------------------------------
def seeded(name, shape):
  """The tensor `name` (a published name) as float32, of sensible size."""
  draw = np.random.RandomState(zlib.crc32(name.encode()))
  trunk = 'backbone' in name or 'normalization' in name
  if name.endswith('running_var'):
    x = draw.uniform(.5, 1.5, shape)
  elif len(shape) == 1 and name.endswith('weight'):
    # Residual branches of a trunk must stay small for 33 blocks in a row.
    x = draw.uniform(.3, .7, shape) if trunk else draw.uniform(.5, 1.5, shape)
  elif trunk and name.endswith('bias'):
    # Far from zero: of a million units, few are then so close to the ReLU's
    # edge that rounding decides on which side, which a gradient would show.
    x = draw.uniform(.6, 1.2, shape) * draw.choice([-1, 1], shape)
  elif len(shape) == 1:
    x = draw.standard_normal(shape) * .1
  elif 'embeddings' in name:
    x = draw.standard_normal(shape)
  else:
    gain = 2. if len(shape) == 4 else 1.
    x = draw.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
    if name.endswith(('q_proj.weight', 'k_proj.weight')):
      x = 3 * x  # Sharp attention: gradients well above rounding.
  return np.asarray(x, np.float32)


def load(source, config, shapes):
  """Variables of `shapes` ({path: shape}) from seeded tensors of `source`."""
  tensors = {}
  for e in mapping.find(source).entries(config):
    if e.ours in shapes:
      shape = e.take(np.broadcast_to(np.float32(0), shapes[e.ours])).shape
      tensors[e.theirs] = e.theirs, seeded(e.theirs, shape)
  variables, record = mapping.to_ours(mapping.find(source), tensors, config,
                                      shapes, 'seeded')
  assert not record['surplus']
  return variables, record['missing']


def nested(variables):
  return flax.traverse_util.unflatten_dict(variables, sep='/')


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep='/')


def theirs(source, config, variables):
  """{published name: array} of our variables, or of their gradients."""
  return {e.theirs: e.take(np.asarray(variables[e.ours]))
          for e in mapping.find(source).entries(config)
          if e.ours in variables}


# --- DETR -------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Detr:
  """A DETR of some size and a batch for it.

  Attributes:
    depth: of the trunk; width, heads, ffn, encoder, decoder, queries,
      classes: of the rest.
    bucket: (H, W) of the padded batch.
    sizes: (h, w) of each image; boxes: number of objects of each image.
    seed: of the images and boxes. Rounding decides on which side of a ReLU a
      unit within 1e-6 of its edge falls, which gradients show: seeds are
      chosen so that no such unit matters.
  """
  depth: int
  width: int
  heads: int
  ffn: int
  encoder: int
  decoder: int
  queries: int
  classes: int
  bucket: tuple
  sizes: tuple
  boxes: tuple
  seed: int = 7

  @property
  def config(self):
    config = config_lib.get_config('detr')
    config.model.update(dict(
        width=self.width, attention_heads=self.heads, ffn=self.ffn,
        encoder_layers=self.encoder, decoder_layers=self.decoder,
        num_queries=self.queries))
    config.model.backbone.depth = self.depth
    # As DETR: what lies beyond an image's edge reaches its features.
    config.model.backbone.mask_padding = False
    return config

  def batch(self, max_boxes=None):
    """The batch as the pipeline would give it; padding holds no zeros."""
    draw = np.random.RandomState(self.seed)
    b, (h, w) = len(self.sizes), self.bucket
    m = max_boxes or max(self.boxes) + 1
    rows, cols = np.asarray(self.sizes).T
    mask = ((np.arange(h)[:, None] < rows[:, None, None])
            & (np.arange(w) < cols[:, None, None]))
    box_mask = np.arange(m) < np.asarray(self.boxes)[:, None]
    size = draw.uniform(.1, .5, (b, m, 2))
    center = draw.uniform(size / 2, 1 - size / 2)
    batch = {
        'image': draw.randint(0, 256, (b, h, w, 3)).astype(np.uint8),
        'image_mask': mask,
        'boxes': np.concatenate([center, size], -1).astype(np.float32),
        'box_labels': draw.randint(0, self.classes, (b, m)).astype(np.int32),
        'box_attributes': np.full((b, m, 1), -1, np.int32),
        'box_mask': box_mask,
        'task_mask/detection': np.ones(b, bool),
        'task_mask/attributes': np.zeros(b, bool)}
    return jax.tree.map(jnp.asarray, batch)

  def build(self, mask_padding=False):
    """(model, {path: array}) with seeded weights."""
    config = self.config
    config.model.backbone.mask_padding = mask_padding
    model = models.build(config, vocab_size=0, num_classes=self.classes,
                         num_attributes=0)
    shapes = flat(jax.eval_shape(
        lambda: model.init(jax.random.key(0), self.batch(),
                           {'image_only': ('detection',)})))
    variables, missing = load('hf_detr', self.config,
                              {k: x.shape for k, x in shapes.items()})
    assert not missing
    return model, variables


DETR = {
    'r18': Detr(18, 32, 4, 48, 1, 2, 7, 3, (64, 96), ((64, 70), (33, 96)),
                (3, 1)),
    'r50': Detr(50, 64, 8, 96, 2, 3, 12, 5, (64, 64),
                ((64, 40), (33, 64), (60, 64)), (4, 0, 2), seed=0),
    # facebook/detr-resnet-50
    'published': Detr(50, 256, 8, 2048, 6, 6, 100, 91, (64, 64),
                      ((64, 40), (30, 64)), (5, 3), seed=9),
}


# --- ResNet -----------------------------------------------------------------
RESNETS = (18, 50, 101)


def resnet_pixels():
  return np.random.RandomState(3).standard_normal((4, 64, 64, 3)).astype(
      np.float32)


def resnet_config(depth):
  config = config_lib.get_config('detr')
  config.model.backbone.depth = depth
  return config


def build_resnet(depth, **options):
  """(trunk, its variables), BN trained and all stages returned."""
  trunk = resnet.ResNet(depth, out_stages=(1, 2, 3, 4), **options)
  shapes = flat(jax.eval_shape(
      lambda: trunk.init(jax.random.key(0), resnet_pixels()[:1])))
  shapes = {'/backbone/'.join(k.split('/', 1)): x.shape
            for k, x in shapes.items()}
  variables, missing = load('hf_resnet', resnet_config(depth), shapes)
  assert not missing
  tree = nested(variables)
  return trunk, {k: v['backbone'] for k, v in tree.items()}


# --- BERT -------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Bert:
  """A BERT as the text side of E2E-VLP."""
  vocabulary: int
  width: int
  heads: int
  ffn: int
  layers: int
  positions: int
  types: int = 2

  @property
  def config(self):
    config = config_lib.get_config('r50')
    config.dtype = 'float32'
    config.model.backbone.depth = 18
    config.model.update(dict(
        width=self.width, attention_heads=self.heads, ffn=self.ffn,
        decoder_layers=1,
        encoder_layers=self.layers, max_text=self.positions, act='gelu',
        text_types=self.types, epsilon=1e-12))
    return config

  def batch(self):
    """Three texts of different lengths; an image of padding alone."""
    draw = np.random.RandomState(5)
    length, longest = np.array([9, 4, 12]), 12
    mask = np.arange(longest) < length[:, None]
    ids = np.where(mask, draw.randint(1, self.vocabulary, mask.shape), 0)
    return text_batch(ids, mask)

  def build(self):
    """(model, {path: array}), heads too; the trunk is zero, nobody sees it."""
    model = models.build(self.config, vocab_size=self.vocabulary,
                         num_classes=1, num_attributes=0)
    return model, text_variables(self.config, model, self.batch(), load)


BERT = {
    'small': Bert(60, 32, 4, 64, 2, 24),
    'wide': Bert(97, 96, 12, 160, 3, 40),
}


def text_batch(ids, mask):
  """A batch of texts for E2E-VLP's `joint` view.

  Its images are padding alone. Nothing attends to padding, so what the
  encoder makes of a text is what BERT makes of it.
  """
  b = len(ids)
  return {'image': jnp.full((b, 32, 32, 3), 200, jnp.uint8),
          'image_mask': jnp.zeros((b, 32, 32), bool),
          'text': jnp.asarray(ids)[:, None],
          'text_mask': jnp.asarray(mask, bool)[:, None]}


def text_variables(config, model, batch, read):
  """Variables for the `joint` view; read(source, config, shapes) -> some."""
  shapes = flat(jax.eval_shape(lambda: model.init(
      jax.random.key(0), batch, {'joint': ('mlm', 'itm')})))
  variables, _ = read('hf_bert', config,
                      {k: x.shape for k, x in shapes.items()})
  return {k: variables.get(k, np.zeros(x.shape, np.float32))
          for k, x in shapes.items()}


def text_states(model, variables, batch):
  """What a BERT returns: {name: array} of states and heads.

  'embedding' and 'layer<i>': [B, L, D] after the embedding and each layer;
  'pooler' [B, D]; 'mlm' [B, L, V]; 'nsp' [B, 2].
  """
  _, seen = model.apply(
      nested(variables), batch, {'joint': ('mlm', 'itm')},
      capture_intermediates=True, mutable=['intermediates'])
  seen = seen['intermediates']
  n = batch['text'].shape[-1]
  out = {'embedding': seen['text_embedding']['__call__'][0][:, 0],
         'mlm': seen['mlm_head']['__call__'][0][:, 0],
         'nsp': seen['itm_head']['__call__'][0][:, 0, ::-1],
         'pooler': jnp.tanh(seen['itm_head']['pooler']['__call__'][0][:, 0])}
  for name, layer in seen['encoder'].items():
    if name.startswith('layer'):
      out[name] = layer['__call__'][0][:, -n:]
  return out


# --- Comparing --------------------------------------------------------------
def pick(name, x, count):
  """The values of `x` that the stored data keep: all, or a random `count`."""
  x = np.asarray(x).ravel()
  if x.size <= count:
    return x
  draw = np.random.RandomState(zlib.crc32(name.encode()))
  return x[np.sort(draw.choice(x.size, count, replace=False))]


def stored(name):
  """Results of transformers for case `name`, as `make_parity_data` left."""
  with np.load(DATA / f'parity_{name}.npz') as f:
    return {k: f[k] for k in f.files}


def difference(name, ours, expected):
  """Largest |ours - expected|; `expected` may be what `pick` left."""
  ours, expected = np.asarray(ours), np.asarray(expected)
  if ours.shape != expected.shape:
    ours = pick(name, ours, expected.size)
  assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
  return float(np.max(np.abs(ours - expected))) if ours.size else 0.


def note(record_property, component, against, worst, tolerance):
  """Asserts worst <= tolerance, and leaves a row for docs/parity.md."""
  record_property('parity', (component, against, float(worst), tolerance))
  assert worst <= tolerance, f'{component}: {worst} > {tolerance}'
