"""The RoBERTa trunk in transformers' names, shared by two formats."""
from e2e_vlp_jax.weights import mapping

POSITION_IDS = (r'(.*\.)?embeddings\.position_ids',
                'the numbers from 0, a constant')


# Cross-attention, which plain RoBERTa files never have.
NEVER = (r'params/text/.*/cross/.*',)


def describe(tensors):
  """{config key: value}, from tensors in the names of a bare RobertaModel."""
  rows = lambda name: tensors[f'embeddings.{name}_embeddings.weight'].shape[0]
  return {
      'vocabulary': rows('word'),
      'model.roberta.width':
          tensors['embeddings.word_embeddings.weight'].shape[1],
      'model.roberta.ffn':
          tensors['encoder.layer.0.intermediate.dense.weight'].shape[0],
      'model.roberta.depth': mapping.count(r'encoder\.layer\.(\d+)\.', tensors),
      'model.roberta.positions': rows('position'),
      'model.roberta.types': rows('token_type')}


def entries(config, prefix='', fused=()):
  """Entries of the trunk, after `prefix`; `fused`: cross-attending layers."""
  a, b = f'{prefix}embeddings', 'text/embedding'
  out = [mapping.Entry(f'{a}.{x}_embeddings.weight',
                       f'params/{b}/{y}/embedding')
         for x, y in (('word', 'words'), ('position', 'positions'),
                      ('token_type', 'token_types'))]
  out += mapping.norm(f'{a}.LayerNorm', f'{b}/norm')

  def attention(theirs, ours):
    return [e for name in ('query', 'key', 'value') for e in
            mapping.dense(f'{theirs}.self.{name}', f'{ours}/{name}')
            ] + mapping.dense(f'{theirs}.output.dense', f'{ours}/out')
  for i in range(config.model.roberta.depth):
    a, b = f'{prefix}encoder.layer.{i}', f'text/layers_{i}'
    out += attention(f'{a}.attention', f'{b}/self_attention')
    out += mapping.norm(f'{a}.attention.output.LayerNorm', f'{b}/norm1')
    if i in fused:
      out.append(mapping.Entry(f'{a}.alpha_t2i', f'params/{b}/cross/gate'))
      out += attention(f'{a}.crossattention_t2i', f'{b}/cross/attention')
    out += mapping.dense(f'{a}.intermediate.dense', f'{b}/ffn/in')
    out += mapping.dense(f'{a}.output.dense', f'{b}/ffn/out')
    out += mapping.norm(f'{a}.output.LayerNorm', f'{b}/norm2')
  return out
