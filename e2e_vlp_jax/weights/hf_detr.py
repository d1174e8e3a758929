"""transformers' DetrForObjectDetection, such as facebook/detr-resnet-50.

The trunk may have timm's names, as the published files do, or those of
transformers' own ResNet; exports have timm's.
"""
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import resnet

_TRUNK = 'model.backbone.conv_encoder.model.'
SIGNATURE = ('class_labels_classifier.weight',
             'model.query_position_embeddings.weight',
             'model.encoder.layers.0.fc1.weight',
             'model.decoder.layers.0.fc1.weight', _TRUNK + 'conv1.weight')
SURPLUS = (resnet.COUNTER,)
COPIES = {}
UNSAID = ('model.attention_heads',)
# DETR has no attributes.
NEVER = (r'params/detection_head/attributes/.*',)


def canonical(name):
  # transformers 5 uses other names in memory than in its files.
  name = re.sub(r'^model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?',
                _TRUNK, name)
  name = name.replace('.o_proj.', '.out_proj.').replace('.mlp.fc', '.fc')
  if name.startswith(_TRUNK):
    return _TRUNK + resnet.to_torchvision(name.removeprefix(_TRUNK))
  return name


def describe(tensors):
  trunk = {k.removeprefix(_TRUNK) for k in tensors if k.startswith(_TRUNK)}
  classes, width = tensors['class_labels_classifier.weight'].shape
  queries = tensors['model.query_position_embeddings.weight'].shape[0]
  return {
      **resnet.describe(trunk), 'model.width': width,
      'model.encoder_layers': mapping.count(r'model\.encoder\.layers\.(\d+)',
                                            tensors),
      'model.decoder_layers': mapping.count(r'model\.decoder\.layers\.(\d+)',
                                            tensors),
      'model.ffn': tensors['model.encoder.layers.0.fc1.weight'].shape[0],
      'model.num_queries': queries, 'classes': classes - 1,
      'model.queries': 'learned', 'model.pre_norm': False,
      'model.act': 'relu', 'model.epsilon': 1e-5}


def read_config(c):
  if c.get('position_embedding_type', 'sine') != 'sine':
    raise errors.UserError(
        'config.json beside --input: position_embedding_type is '
        f'{c["position_embedding_type"]!r}; expected \'sine\'')
  heads = c.get('encoder_attention_heads'), c.get('decoder_attention_heads')
  if heads[0] != heads[1]:
    raise errors.UserError(
        'config.json beside --input: encoder_attention_heads and '
        f'decoder_attention_heads are {heads[0]} and {heads[1]}; expected '
        'the same number')
  names = {'encoder_attention_heads': 'model.attention_heads',
           'activation_function': 'model.act',
           'dilation': 'model.backbone.dilated'}
  return {ours: c[k] for k, ours in names.items() if c.get(k) is not None}


def _attention(theirs, ours):
  return [e for a, b in (('q_proj', 'query'), ('k_proj', 'key'),
                         ('v_proj', 'value'), ('out_proj', 'out'))
          for e in mapping.dense(f'{theirs}.{a}', f'{ours}/{b}')]


def _layer(theirs, ours, norms):
  """An encoder or decoder layer; `norms` in the order of their use."""
  out = _attention(f'{theirs}.self_attn', f'{ours}/self_attention')
  if len(norms) == 3:
    out += _attention(f'{theirs}.encoder_attn', f'{ours}/cross_attention')
  out += mapping.dense(f'{theirs}.fc1', f'{ours}/ffn/in')
  out += mapping.dense(f'{theirs}.fc2', f'{ours}/ffn/out')
  for i, name in enumerate(norms, 1):
    out += mapping.norm(f'{theirs}.{name}_layer_norm', f'{ours}/norm{i}')
  return out


def entries(config):
  out = resnet.entries(config, _TRUNK)
  out += mapping.dense('model.input_projection', 'project', form='conv1x1')
  for i in range(config.model.encoder_layers):
    out += _layer(f'model.encoder.layers.{i}', f'encoder/layer{i}',
                  ('self_attn', 'final'))
  for i in range(config.model.decoder_layers):
    out += _layer(f'model.decoder.layers.{i}', f'decoder/layer{i}',
                  ('self_attn', 'encoder_attn', 'final'))
  out += mapping.norm('model.decoder.layernorm', 'decoder/norm')
  out.append(mapping.Entry('model.query_position_embeddings.weight',
                           'params/decoder/query_embedding'))
  out += mapping.dense('class_labels_classifier', 'detection_head/classes')
  for i in range(3):
    out += mapping.dense(f'bbox_predictor.layers.{i}',
                         f'decoder/box_head/dense{i}')
  return out
