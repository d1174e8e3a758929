"""The Swin trunk in Microsoft's and in transformers' names.

Shared by fiber_coarse, hf_swin and timm_swin. Microsoft's names are the
canonical ones here; timm had the same up to version 0.6.
"""
import re

from e2e_vlp_jax.models import swin
from e2e_vlp_jax.weights import mapping

_WINDOW = 'model.swin.window'
RESIZABLE = (_WINDOW,)  # See mapping.py.
SIZES = (r'(.*\.)?(relative_position_index|attn_mask)',
         'follows from the sizes')
_BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
# Parts of a block; transformers' spelling of 2022, still that of its files.
_NAMES = (('norm1.', 'layernorm_before.'), ('norm2.', 'layernorm_after.'),
          ('attn.proj.', 'attention.output.dense.'),
          ('attn.relative', 'attention.self.relative'),
          ('mlp.fc1.', 'intermediate.dense.'), ('mlp.fc2.', 'output.dense.'))


# Cross-attention, which plain Swin files never have.
NEVER = (r'params/swin/.*/cross/.*',)


def resize(table, shape):
  """A table of relative positions for windows of another size."""
  return swin.resize_relative_bias(table, shape[0]).astype(table.dtype)


def describe(tensors):
  """{config key: value} of a trunk, from its tensors in canonical names."""
  stages = mapping.count(r'layers\.(\d+)\.', tensors)
  tables = [tensors[f'layers.{s}.blocks.0.attn.relative_position_bias_table']
            for s in range(stages)]
  width, _, patch, _ = tensors['patch_embed.proj.weight'].shape
  ffn = tensors['layers.0.blocks.0.mlp.fc1.weight'].shape[0]
  return {
      'model.swin.depths': tuple(
          mapping.count(rf'layers\.{s}\.blocks\.(\d+)\.', tensors)
          for s in range(stages)),
      'model.swin.heads': tuple(t.shape[1] for t in tables),
      'model.swin.width': width, 'model.swin.patch': patch,
      'model.swin.mlp_ratio': ffn / width,
      # (2w - 1)^2 rows; a stage smaller than the window may have fewer.
      _WINDOW: int(max(t.shape[0] for t in tables)**.5 + 1) // 2}


def fusion(tensors):
  """FIBER's variant of fusion (`model.swin.fusion`) of a trunk's tensors."""
  return 'v3' if any('.norm_i2t_i.' in name for name in tensors) else 'v2'


def entries(config, prefix='', fused=(), last_norm=True):
  """Entries of the trunk in canonical names, after `prefix`.

  Args:
    config: whole config.
    prefix: prefix of the tensors' names.
    fused: (stage, block) of the blocks with cross-attention.
    last_norm: whether the trunk ends in a norm.
  """
  c = config.model.swin
  out = [mapping.Entry(f'{prefix}patch_embed.proj.weight',
                       'params/swin/patch_embed/kernel', 'conv'),
         mapping.Entry(f'{prefix}patch_embed.proj.bias',
                       'params/swin/patch_embed/bias')]
  out += mapping.norm(f'{prefix}patch_embed.norm', 'swin/patch_norm')
  for s, depth in enumerate(c.depths):
    for k in range(depth):
      a, b = f'{prefix}layers.{s}.blocks.{k}', f'swin/blocks_{s}_{k}'
      out += mapping.norm(f'{a}.norm1', f'{b}/norm1')
      out.append(mapping.Entry(f'{a}.attn.relative_position_bias_table',
                               f'params/{b}/attention/relative_bias',
                               'table'))
      out += mapping.dense(f'{a}.attn.qkv', f'{b}/attention/qkv')
      out += mapping.dense(f'{a}.attn.proj', f'{b}/attention/out')
      if (s, k) in fused:
        out.append(mapping.Entry(f'{a}.attn.alpha_i2t',
                                 f'params/{b}/cross/gate'))
        if c.get('fusion', 'v3') == 'v3':
          out += mapping.norm(f'{a}.attn.norm_i2t_i', f'{b}/cross/norm')
        for theirs, ours in (('qkv_i2t', 'query'), ('proj_i2t', 'out'),
                             ('qkv_text_i2t', 'key_value')):
          out += mapping.dense(f'{a}.attn.{theirs}', f'{b}/cross/{ours}')
      out += mapping.norm(f'{a}.norm2', f'{b}/norm2')
      out += mapping.dense(f'{a}.mlp.fc1', f'{b}/ffn/in')
      out += mapping.dense(f'{a}.mlp.fc2', f'{b}/ffn/out')
    if s + 1 < len(c.depths):
      a, b = f'{prefix}layers.{s}.downsample', f'swin/merges_{s}'
      out.append(mapping.Entry(f'{a}.reduction.weight',
                               f'params/{b}/reduce/kernel', 'dense'))
      out += mapping.norm(f'{a}.norm', f'{b}/norm')
  return out + (mapping.norm(f'{prefix}norm', 'swin/norm') if last_norm
                else [])


def to_transformers(entry):
  """[Entry] in transformers' names; it keeps query, key and value apart."""
  name = entry.theirs
  name = re.sub(r'^patch_embed\.proj\.',
                'embeddings.patch_embeddings.projection.', name)
  name = re.sub(r'^patch_embed\.norm\.', 'embeddings.norm.', name)
  name = re.sub(r'^norm\.', 'layernorm.', name)
  block = re.match(_BLOCK, name)
  if not block:
    return [entry._replace(theirs=re.sub(r'^layers', 'encoder.layers', name))]
  rest = name[block.end():]
  for a, b in _NAMES:
    if rest.startswith(a):
      rest = b + rest.removeprefix(a)
  at = f'encoder.{block[0]}'
  if not rest.startswith('attn.qkv.'):
    return [entry._replace(theirs=at + rest)]
  return [entry._replace(theirs=at + rest.replace('attn.qkv',
                                                  f'attention.self.{part}'),
                         part=(i, 3))
          for i, part in enumerate(('query', 'key', 'value'))]
