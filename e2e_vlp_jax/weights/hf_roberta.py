"""transformers' RobertaModel and RobertaForMaskedLM, as a trunk.

The masked-LM head is not converted: FIBER's has the same layers, but starts
with random weights, as in the original.
"""
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import roberta

_R = 'roberta.'
SIGNATURE = tuple(_R + name for name in (
    'embeddings.word_embeddings.weight',
    'embeddings.position_embeddings.weight',
    'embeddings.token_type_embeddings.weight',
    'encoder.layer.0.intermediate.dense.weight'))
SURPLUS = (roberta.POSITION_IDS,
           (r'lm_head\..*', 'the masked-LM head starts from random weights'),
           (r'roberta\.pooler\..*', 'never used'))
COPIES = {}
NEVER = roberta.NEVER
UNSAID = ('model.roberta.heads',)


def canonical(name):
  if re.match(r'(embeddings|encoder|pooler)\.', name):  # a bare RobertaModel
    return _R + name
  return name


def describe(tensors):
  return roberta.describe({k.removeprefix(_R): x for k, x in tensors.items()
                           if k.startswith(_R)})


def read_config(c):
  for key, expected in (('position_embedding_type', 'absolute'),
                        ('hidden_act', 'gelu'), ('pad_token_id', 1)):
    if c.get(key, expected) != expected:
      raise errors.UserError(f'config.json beside --input: {key} is '
                             f'{c[key]!r}; expected {expected!r}')
  names = {'num_attention_heads': 'model.roberta.heads',
           'layer_norm_eps': 'model.roberta.epsilon'}
  return {ours: c[k] for k, ours in names.items() if c.get(k) is not None}


def entries(config):
  return roberta.entries(config, _R)
