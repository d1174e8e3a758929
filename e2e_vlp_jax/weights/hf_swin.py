"""transformers' SwinModel and SwinForImageClassification, as a trunk."""
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import swin

SIGNATURE = ('embeddings.patch_embeddings.projection.weight',
             'encoder.layers.0.blocks.0.layernorm_before.weight')
SURPLUS = (swin.SIZES,
           (r'classifier\..*', 'ImageNet classifier; no such head here'),
           (r'embeddings\.mask_token', 'for masked images; no such task here'))
COPIES = {}
NEVER, RESIZABLE, resize = swin.NEVER, swin.RESIZABLE, swin.resize
# transformers 5 uses other names in memory than in its files.
_NEWER = (('attention.q_proj.', 'attention.self.query.'),
          ('attention.k_proj.', 'attention.self.key.'),
          ('attention.v_proj.', 'attention.self.value.'),
          ('attention.o_proj.', 'attention.output.dense.'),
          ('attention.relative_position_bias.relative_position_bias_table',
           'attention.self.relative_position_bias_table'),
          ('.mlp.fc1.', '.intermediate.dense.'),
          ('.mlp.fc2.', '.output.dense.'))


def canonical(name):
  name = name.removeprefix('swin.')
  for new, old in _NEWER:
    name = name.replace(new, old)
  return name


def describe(tensors):
  # The tensors that `swin.describe` reads, under its names.
  known = {}
  for name, x in tensors.items():
    name = re.sub(r'^encoder\.', '', name)
    name = name.replace('embeddings.patch_embeddings.projection.',
                        'patch_embed.proj.')
    name = name.replace('attention.self.relative', 'attn.relative')
    known[name.replace('.intermediate.dense.', '.mlp.fc1.')] = x
  return swin.describe(known)


def read_config(c):
  for key, expected in (('use_absolute_embeddings', False),
                        ('qkv_bias', True), ('hidden_act', 'gelu')):
    if c.get(key, expected) != expected:
      raise errors.UserError(f'config.json beside --input: {key} is '
                             f'{c[key]!r}; expected {expected!r}')
  found = c.get('layer_norm_eps')
  return {} if found is None else {'model.swin.epsilon': found}


def entries(config):
  return [e for entry in swin.entries(config)
          for e in swin.to_transformers(entry)]
