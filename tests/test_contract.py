"""Every model keeps the promises of models/contract.py."""
import pathlib

import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from tests import conformance

_CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 'configs'
# Smaller than `tiny`, where a model has these keys.
_SMALL = {'data.buckets': ((48, 48),), 'data.max_text': 12,
          # Every key that the checks read, whatever the config trains on.
          'data.pp_train': 'decode|fit|boxes|text|mlm(.2)|itm(.5)',
          'model.width': 32, 'model.ffn': 48, 'model.attention_heads': 4,
          'model.max_text': 24,
          'model.encoder_layers': 1, 'model.num_queries': 5,
          'model.dictionary.size': 12, 'model.backbone.stem': 8,
          'model.backbone.width': 16, 'model.backbone.blocks': 1,
          'model.swin.width': 8, 'model.swin.depths': (1, 2, 1),
          'model.swin.heads': (1, 2, 2), 'model.swin.patch': 3,
          'model.swin.window': 4, 'model.fused_layers': 2,
          'model.roberta.width': 24, 'model.roberta.heads': 2,
          'model.roberta.ffn': 48, 'model.roberta.positions': 30}


def small_config(name):
  """A model's `tiny`, smaller still."""
  config = cli.load_config(f'{_CONFIGS}/{name}.py:tiny')
  for key, value in _SMALL.items():
    *groups, last = key.split('.')
    node = config
    for group in groups:
      node = node.get(group, {})
    if last in node:
      node[last] = value
  return config


@pytest.fixture(scope='module',
                params=discovery.names('e2e_vlp_jax.models', 'Model'))
def case(request):
  return conformance.Case.build(small_config(request.param))


@pytest.mark.parametrize('check', conformance.CHECKS,
                         ids=lambda f: f.__name__.removeprefix('check_'))
def test_contract(case, check):
  found = check(case)
  if found:
    for unit, (with_cache, without) in zip(('FLOPs', 'seconds'), found):
      print(f'{case.model.config.name}: 20 tokens in {with_cache:.3g} {unit} '
            f'with caches, {without:.3g} without')


@pytest.mark.parametrize('head, message', [
    (dict(views=('joined',)), "answer.views: no view 'joined'.*'joint'"),
    (dict(state='pool'), "no state 'pool'; did you mean 'pooled'"),
    (dict(kind='classify'), "kind: 'classify'; did you mean 'classifier'"),
    (dict(hiden=3), "no such option; did you mean 'hidden'"),
    (dict(init='kaimin'), "did you mean 'kaiming'"),
    (dict(outputs='answer'), "outputs: 'answer'; expected a number"),
    (dict(outputs='answers'), 'of which there are 0')])
def test_heads_that_cannot_be(head, message):
  config = small_config('soho')
  config.model.heads = {'answer': {'outputs': 2, **head}}
  with pytest.raises(errors.UserError, match=message):
    conformance.initialise(models.build(config, **{
        **conformance.SIZES, 'num_answers': 0}), config)


def test_requests_that_no_model_has(case):
  head = case.model.views['joint'].heads[0]
  for requests, message in (({'joined': ()}, "no view 'joined'"),
                            ({'joint': (f'{head}x',)},
                             f"no head '{head}x'.*'{head}'")):
    with pytest.raises(errors.UserError, match=message):
      case.run(requests)
