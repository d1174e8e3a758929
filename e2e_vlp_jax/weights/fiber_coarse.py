"""FIBER's coarse-grained checkpoints (github.com/microsoft/FIBER).

Reads checkpoints of pre-training and fine-tuning. The head of VQA becomes a
head of `model.heads` in the view `joint`, that of NLVR2 one in the view `pair`.
The checkpoints have two generations: the released code has a queue and stores
the temperature, the earlier one (June 2022) stores the logarithm of its
inverse.
"""
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import roberta
from e2e_vlp_jax.weights import swin

_IMAGE, _TEXT = 'vit_model.', 'text_transformer.'
_UNUSED = 'the original never uses it'
SIGNATURE = (_IMAGE + 'patch_embed.proj.weight',
             _TEXT + 'embeddings.word_embeddings.weight',
             'cross_modal_text_transform.weight')
SURPLUS = (
    swin.SIZES, roberta.POSITION_IDS,
    (r'text_transformer\.pooler\..*', _UNUSED),
    (r'text_transformer\..*\.crossattention_t2i\.output\.LayerNorm\..*',
     _UNUSED),
    (r'text_transformer\.encoder\.layer\.\d+\.alpha_t2i',
     f'of a layer below the first pair, {_UNUSED}'),
    (r'cross_modal_att_layers\.\d+\..*',
     f'of a layer that does not need it, {_UNUSED}'),
    (r'rank_output\..*', 'an old copy of row 1 of itm_score; we use its '
     'logit of class 1 as the score'),
    (r'temp|logit_scale', 'model.queue decides which of the two is used; the '
     'other one starts from its initial value'),
    (r'(vqa|nlvr2)_classifier\..*', 'the config has no such head'),
    (r'(image|text|image_input|text_input|text_input_mask)_queue|queue_(ptr|'
     r'total)', 'past examples; the queue starts empty'))
COPIES = {}
UNSAID = ('model.roberta.heads',)
RESIZABLE, resize = swin.RESIZABLE, swin.resize


def canonical(name):
  return name


def describe(tensors):
  part = lambda prefix: {k.removeprefix(prefix): x for k, x in tensors.items()
                         if k.startswith(prefix)}
  image, text = part(_IMAGE), part(_TEXT)
  fused = {k.split('.')[2] for k in text if '.crossattention_t2i.' in k}
  return {**swin.describe(image), **roberta.describe(text),
          'model.swin.fusion': swin.fusion(image),
          'model.fused_layers': len(fused),
          'model.width': tensors['cross_modal_text_transform.weight'].shape[0]}


def read_config(c):
  del c  # The release has no such file.
  return {}


def entries(config):
  c = config.model
  blocks = [(s, k) for s, n in enumerate(c.swin.depths) for k in range(n)]
  layers = range(c.roberta.depth - c.fused_layers, c.roberta.depth)
  out = swin.entries(config, _IMAGE, blocks[-c.fused_layers:])
  out += roberta.entries(config, _TEXT, layers)
  for side in ('text', 'image'):
    for theirs, ours in (('', ''), ('_itc', 'itc_')):
      group = theirs.removeprefix('_')
      out += mapping.dense(f'cross_modal_{side}_transform{theirs}',
                           f'{ours}{side}_projection', group)
      out += mapping.dense(f'cross_modal_{side}_pooler{theirs}.dense',
                           f'{ours}{side}_pooler', group)
  for i, (stage, _) in zip(layers, blocks[-c.fused_layers:]):
    if stage + 1 < len(c.swin.depths):
      out += mapping.dense(f'cross_modal_att_layers.{i}',
                           f'caption_projections_layer{i}', 'caption')
  out += mapping.dense('mlm_score.transform.dense', 'mlm_head/dense', 'mlm')
  out += mapping.norm('mlm_score.transform.LayerNorm', 'mlm_head/norm', 'mlm')
  out += [mapping.Entry('mlm_score.bias', 'params/mlm_head/bias',
                        group='mlm'),
          mapping.Entry('mlm_score.decoder.weight', 'params/mlm_decoder',
                        'dense', 'mlm'),
          mapping.Entry('temp', 'params/temperature', group='temp')
          if c.queue else
          mapping.Entry('logit_scale', 'params/logit_scale', group='scale')]
  out += mapping.dense('itm_score.fc', 'itm_head', 'itm')
  for view, theirs in (('joint', 'vqa'), ('pair', 'nlvr2')):
    name = mapping.head_of(config, view)
    if name:
      ours, theirs = f'heads_{name}', f'{theirs}_classifier'
      out += mapping.dense(f'{theirs}.0', f'{ours}/hidden', name)
      out += mapping.norm(f'{theirs}.1', f'{ours}/norm', name)
      out += mapping.dense(f'{theirs}.3', f'{ours}/out', name)
  return out
