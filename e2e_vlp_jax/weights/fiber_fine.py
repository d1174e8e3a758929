"""FIBER's fine-grained checkpoints (github.com/microsoft/FIBER, fine_grained).

Of pre-training and of fine-tuning on COCO, LVIS and RefCOCO/+/g. Two variants
of fusion were published, see `model.swin.fusion`; the file tells which it has.
A file holds the trained weights (`model`) and their average (`model_ema`); the
released evaluation reads the former.
"""
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import roberta
from e2e_vlp_jax.weights import swin

_BODY = 'fusion_backbone.backbone.body.'
_PYRAMID = 'fusion_backbone.backbone.fpn.'
_TEXT = 'fusion_backbone.language_backbone.body.model.'
_HEAD = 'rpn.head.'
_TOWER = _HEAD + 'dyhead_tower.'
SIGNATURE = (_BODY + 'patch_embed.proj.weight',
             _TEXT + 'embeddings.word_embeddings.weight',
             _HEAD + 'dot_product_projection_text.weight')
_UNUSED = 'the original never uses it'
SURPLUS = (
    swin.SIZES, roberta.POSITION_IDS,
    (r'rpn\.anchor_generator\..*', 'follows from the sizes'),
    (r'rpn\.head\.cls_logits\..*',
     'frozen, its loss has weight 0; only its number of outputs is used'),
    (r'fusion_backbone\.language_backbone\..*\.pooler\..*', _UNUSED),
    (r'.*\.crossattention_t2i\.output\.LayerNorm\..*', _UNUSED),
    (r'.*\.encoder\.layer\.\d+\.alpha_t2i',
     f'of a layer below the first pair, {_UNUSED}'))
COPIES = {}
UNSAID = ('model.roberta.heads', 'model.head.released_offsets')
RESIZABLE, resize = swin.RESIZABLE, swin.resize


def canonical(name):
  return name.removeprefix('module.')


def describe(tensors):
  part = lambda prefix: {k.removeprefix(prefix): x for k, x in tensors.items()
                         if k.startswith(prefix)}
  body, text = part(_BODY), part(_TEXT)
  return {**swin.describe(body), **roberta.describe(text),
          'model.swin.fusion': swin.fusion(body),
          'model.fused_layers': len({k.split('.')[2] for k in text
                                     if '.crossattention_t2i.' in k}),
          'model.head.blocks': mapping.count(
              _TOWER.replace('.', r'\.') + r'(\d+)\.', tensors),
          'model.head.width': len(tensors[f'{_HEAD}centerness.weight'][0])}


def read_config(c):
  del c  # The release has no such file.
  return {}


def entries(config):
  c = config.model
  blocks = [(s, k) for s, n in enumerate(c.swin.depths) for k in range(n)]
  out = swin.entries(config, _BODY, blocks[-c.fused_layers:], last_norm=False)
  out += roberta.entries(config, _TEXT, range(
      c.roberta.depth - c.fused_layers, c.roberta.depth))
  first = len(c.swin.depths) - 3  # the first stage of the pyramid
  for k in range(3):
    out += mapping.norm(f'{_BODY}norm{k + first}', f'stage_norms_{k}')
  return out + pyramid(first + 1) + tower(c.head.blocks) + head()


def pyramid(first):
  """Entries of the pyramid; `first`: number of its first stage, from 1."""
  out = []
  for k in range(3):
    for theirs, ours in (('inner', 'lateral'), ('layer', 'level')):
      out += mapping.dense(f'{_PYRAMID}fpn_{theirs}{k + first}',
                           f'pyramid/{ours}{k}', form='conv')
  for k in range(2):
    out += mapping.dense(f'{_PYRAMID}top_blocks.p{k + 6}',
                         f'pyramid/coarser{k}', form='conv')
  return out


def tower(blocks):
  """Entries of the dynamic head."""
  out = []
  for i in range(blocks):
    a, b = f'{_TOWER}{i}', f'tower/block{i}'
    for k, name in enumerate(('coarser', 'same', 'finer')):
      out += mapping.dense(f'{a}.DyConv.{k}.conv', f'{b}/{name}', form='conv')
      out += mapping.norm(f'{a}.DyConv.{k}.bn', f'{b}/{name}')
    out += mapping.dense(f'{a}.offset', f'{b}/offset', form='conv')
    out += mapping.dense(f'{a}.AttnConv.1', f'{b}/level_weight',
                         form='conv1x1')
    out += mapping.dense(f'{a}.relu.fc.0', f'{b}/activation/in')
    out += mapping.dense(f'{a}.relu.fc.2', f'{b}/activation/out')
  return out


def head():
  """Entries of boxes, centerness and token logits."""
  out = mapping.dense(f'{_HEAD}bbox_pred', 'head/boxes', form='conv1x1')
  out += mapping.dense(f'{_HEAD}centerness', 'head/centerness',
                       form='conv1x1')
  out += mapping.dense(f'{_HEAD}dot_product_projection_text',
                       'head/text_projection')
  out += [mapping.Entry(f'{_HEAD}{theirs}', f'params/head/{ours}')
          for theirs, ours in (('log_scale', 'log_scale'),
                               ('bias_lang', 'token_bias'),
                               ('bias0', 'bias'))]
  return out + [mapping.Entry(f'{_HEAD}scales.{k}.scale',
                              'params/head/scales', part=(k, 5))
                for k in range(5)]
