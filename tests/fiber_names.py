"""FIBER's tensors (microsoft/FIBER, coarse_grained) and our variables."""
from e2e_vlp_jax.weights import mapping

# Tensors that the released code has and never uses (facts of the code), or
# that follow from the sizes.
UNUSED = (
    r'vit_model\..*\.(relative_position_index|attn_mask)',
    r'text_transformer\.embeddings\.position_ids',
    r'text_transformer\.pooler\..*',
    r'text_transformer\..*\.crossattention_t2i\.output\.LayerNorm\..*',
    r'text_transformer\.encoder\.layer\.[0-5]\.alpha_t2i',
    r'cross_modal_att_layers\.[0-5]\..*',
    r'rank_output\..*')          # row 1 of the matching head
# Heads of the fine-tuning tasks.
OTHER_TASKS = (r'vqa_classifier\..*', r'nlvr2_classifier\..*')


def swin(theirs, ours, depths, fused=()):
  """Entries of a Swin; `fused`: (stage, block) with cross-attention."""
  out = [mapping.Entry(f'{theirs}.patch_embed.proj.weight',
                       f'params/{ours}/patch_embed/kernel', 'conv'),
         mapping.Entry(f'{theirs}.patch_embed.proj.bias',
                       f'params/{ours}/patch_embed/bias')]
  out += mapping.norm(f'{theirs}.patch_embed.norm', f'{ours}/patch_norm')
  for s, depth in enumerate(depths):
    for k in range(depth):
      a, b = f'{theirs}.layers.{s}.blocks.{k}', f'{ours}/blocks_{s}_{k}'
      out += mapping.norm(f'{a}.norm1', f'{b}/norm1')
      out.append(mapping.Entry(
          f'{a}.attn.relative_position_bias_table',
          f'params/{b}/attention/relative_bias'))
      out += mapping.dense(f'{a}.attn.qkv', f'{b}/attention/qkv')
      out += mapping.dense(f'{a}.attn.proj', f'{b}/attention/out')
      if (s, k) in fused:
        out.append(mapping.Entry(f'{a}.attn.alpha_i2t',
                                 f'params/{b}/cross/gate'))
        out += mapping.norm(f'{a}.attn.norm_i2t_i', f'{b}/cross/norm')
        out += mapping.dense(f'{a}.attn.qkv_i2t', f'{b}/cross/query')
        out += mapping.dense(f'{a}.attn.qkv_text_i2t',
                             f'{b}/cross/key_value')
        out += mapping.dense(f'{a}.attn.proj_i2t', f'{b}/cross/out')
      out += mapping.norm(f'{a}.norm2', f'{b}/norm2')
      out += mapping.dense(f'{a}.mlp.fc1', f'{b}/ffn/in')
      out += mapping.dense(f'{a}.mlp.fc2', f'{b}/ffn/out')
    if s + 1 < len(depths):
      a, b = f'{theirs}.layers.{s}.downsample', f'{ours}/merges_{s}'
      out.append(mapping.Entry(f'{a}.reduction.weight',
                               f'params/{b}/reduce/kernel', 'dense'))
      out += mapping.norm(f'{a}.norm', f'{b}/norm')
  return out + mapping.norm(f'{theirs}.norm', f'{ours}/norm')


def roberta(theirs, ours, depth, fused=()):
  """Entries of a RoBERTa; `fused`: layers with cross-attention."""
  a, b = f'{theirs}.embeddings', f'{ours}/embedding'
  out = [mapping.Entry(f'{a}.{x}_embeddings.weight',
                       f'params/{b}/{y}/embedding')
         for x, y in (('word', 'words'), ('position', 'positions'),
                      ('token_type', 'token_types'))]
  out += mapping.norm(f'{a}.LayerNorm', f'{b}/norm')

  def attention(theirs, ours):
    return [e for name in ('query', 'key', 'value') for e in
            mapping.dense(f'{theirs}.self.{name}', f'{ours}/{name}')
            ] + mapping.dense(f'{theirs}.output.dense', f'{ours}/out')
  for i in range(depth):
    a, b = f'{theirs}.encoder.layer.{i}', f'{ours}/layers_{i}'
    out += attention(f'{a}.attention', f'{b}/self_attention')
    out += mapping.norm(f'{a}.attention.output.LayerNorm', f'{b}/norm1')
    if i in fused:
      out.append(mapping.Entry(f'{a}.alpha_t2i', f'params/{b}/cross/gate'))
      out += attention(f'{a}.crossattention_t2i', f'{b}/cross/attention')
    out += mapping.dense(f'{a}.intermediate.dense', f'{b}/ffn/in')
    out += mapping.dense(f'{a}.output.dense', f'{b}/ffn/out')
    out += mapping.norm(f'{a}.output.LayerNorm', f'{b}/norm2')
  return out


def entries(config):
  """mapping.Entry of every tensor that the model of `config` has."""
  c = config.model
  stages = [(s, k) for s, n in enumerate(c.swin.depths) for k in range(n)]
  first = c.text.depth - c.fuse
  out = swin('vit_model', 'swin', c.swin.depths, stages[-c.fuse:])
  out += roberta('text_transformer', 'text', c.text.depth,
                 range(first, c.text.depth))
  for side in ('text', 'image'):
    for theirs, ours in (('', ''), ('_itc', 'itc_')):
      out += mapping.dense(f'cross_modal_{side}_transform{theirs}',
                           f'{ours}{side}_projection')
      out += mapping.dense(f'cross_modal_{side}_pooler{theirs}.dense',
                           f'{ours}{side}_pooler')
  for i, (s, _) in zip(range(first, c.text.depth), stages[-c.fuse:]):
    if s != len(c.swin.depths) - 1:
      out += mapping.dense(f'cross_modal_att_layers.{i}',
                           f'caption_projections_layer{i}', 'caption')
  out += mapping.dense('mlm_score.transform.dense', 'mlm_head/dense', 'mlm')
  out += mapping.norm('mlm_score.transform.LayerNorm', 'mlm_head/norm', 'mlm')
  out.append(mapping.Entry('mlm_score.bias', 'params/mlm_head/bias',
                           group='mlm'))
  out.append(mapping.Entry('mlm_score.decoder.weight', 'params/mlm_decoder',
                           'dense', 'mlm'))
  out += mapping.dense('itm_score.fc', 'itm_head', 'itm')
  # The released code stores the temperature, the earlier one the logarithm
  # of its inverse.
  out.append(mapping.Entry('temp', 'params/temperature', group='itc')
             if c.queue else
             mapping.Entry('logit_scale', 'params/logit_scale', group='itc'))
  return out
