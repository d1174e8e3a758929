"""transformers' BertModel, BertForMaskedLM and BertForPreTraining.

The embeddings and the encoder become those of the model. Heads are converted if
the file has them: masked LM, the pooler as that of image-text matching, and
next-sentence prediction as its classifier, since both decide whether two inputs
belong together. Its classes are swapped: "belong together" is 0 in BERT and 1
here. A model with fewer layers takes the first ones, as SOHO does with three.
"""
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import mapping

_B = 'bert.'
SIGNATURE = tuple(_B + name for name in (
    'embeddings.word_embeddings.weight',
    'embeddings.position_embeddings.weight',
    'embeddings.token_type_embeddings.weight',
    'encoder.layer.0.intermediate.dense.weight'))
_DENSE = (('attention.self.query', 'self_attention/query'),
          ('attention.self.key', 'self_attention/key'),
          ('attention.self.value', 'self_attention/value'),
          ('attention.output.dense', 'self_attention/out'),
          ('intermediate.dense', 'ffn/in'), ('output.dense', 'ffn/out'))
_NORMS = (('attention.output.LayerNorm', 'norm1'),
          ('output.LayerNorm', 'norm2'))
_LAYER = '|'.join(re.escape(theirs) for theirs, _ in _DENSE + _NORMS)
SURPLUS = (
    (r'bert\.embeddings\.position_ids', 'the numbers from 0, a constant'),
    (rf'bert\.encoder\.layer\.\d+\.({_LAYER})\.(weight|bias)',
     'of a layer above the last one of the config'))
FEWER = ('model.encoder_layers',)
COPIES = {
    'cls.predictions.decoder.weight': _B + 'embeddings.word_embeddings.weight',
    'cls.predictions.decoder.bias': 'cls.predictions.bias'}
UNSAID = ('model.attention_heads',)
# Files of a bare BertModel have a pooler, but no next-sentence prediction.
NEVER = (r'params/itm_head/classifier/.*',)


def canonical(name):
  if re.match(r'(embeddings|encoder|pooler)\.', name):  # of a bare BertModel
    name = _B + name
  # The earliest published files have TensorFlow's names.
  name = re.sub(r'LayerNorm\.gamma$', 'LayerNorm.weight', name)
  return re.sub(r'LayerNorm\.beta$', 'LayerNorm.bias', name)


def describe(tensors):
  rows = lambda name: tensors[f'{_B}embeddings.{name}_embeddings.weight'
                              ].shape[0]
  return {
      'vocabulary': rows('word'),
      'model.width': tensors[SIGNATURE[0]].shape[1],
      'model.ffn': tensors[SIGNATURE[3]].shape[0],
      'model.encoder_layers': mapping.count(r'bert\.encoder\.layer\.(\d+)',
                                            tensors),
      # A shorter table would work, but the whole could not be exported.
      'model.max_text': rows('position'),
      'model.text_types': rows('token_type'),
      'model.pre_norm': False, 'model.act': 'gelu', 'model.epsilon': 1e-12}


def read_config(c):
  if c.get('position_embedding_type', 'absolute') != 'absolute':
    raise errors.UserError(
        'config.json beside --input: position_embedding_type is '
        f'{c["position_embedding_type"]!r}; expected \'absolute\'')
  names = {'num_attention_heads': 'model.attention_heads',
           'hidden_act': 'model.act',
           'layer_norm_eps': 'model.epsilon'}
  return {ours: c[k] for k, ours in names.items() if c.get(k) is not None}


def entries(config):
  out = [mapping.Entry(SIGNATURE[0], 'params/text_embedding/words/embedding'),
         mapping.Entry(SIGNATURE[1],
                       'params/text_embedding/positions/embedding'),
         mapping.Entry(SIGNATURE[2],
                       'params/text_embedding/token_types/embedding')]
  out += mapping.norm(f'{_B}embeddings.LayerNorm', 'text_embedding/norm')
  for i in range(config.model.encoder_layers):
    theirs, ours = f'{_B}encoder.layer.{i}', f'encoder/layer{i}'
    for a, b in _DENSE:
      out += mapping.dense(f'{theirs}.{a}', f'{ours}/{b}')
    for a, b in _NORMS:
      out += mapping.norm(f'{theirs}.{a}', f'{ours}/{b}')
  out += mapping.dense('cls.predictions.transform.dense', 'mlm_head/dense',
                       'mlm')
  out += mapping.norm('cls.predictions.transform.LayerNorm', 'mlm_head/norm',
                      'mlm')
  out.append(mapping.Entry('cls.predictions.bias', 'params/mlm_head/bias',
                           group='mlm'))
  out += mapping.dense(f'{_B}pooler.dense', 'itm_head/pooler', 'pooler')
  out += mapping.dense('cls.seq_relationship', 'itm_head/classifier', 'nsp',
                       'dense_flip')
  return out
