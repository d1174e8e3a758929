"""Until the models read the new config keys: gives them the old ones."""
import re

import ml_collections


def old_model(config):
  """`config.model` as the models of before want it."""
  m = config.model.to_dict()
  for new, old in (('fused_layers', 'fuse'), ('text_pool', 'itm_pool'),
                   ('negative_hardness', 'hardness'),
                   ('use_text', 'text'), ('roberta', 'text')):
    if new in m:
      m[old] = m[new]
  m['heads'] = m.get('attention_heads', 0)
  for trunk in ('swin', 'text'):
    if isinstance(m.get(trunk), dict) and 'from_scratch' in m[trunk]:
      m[trunk]['scratch'] = m[trunk].pop('from_scratch')
  if m.get('backbone', {}).get('name') == 'resnet' and (
      'frozen_bn' not in m['backbone']):
    frozen = lambda name: any(
        dict(o).get('freeze') and re.fullmatch(p, name)
        for p, o in config.optim.groups)
    m['backbone']['frozen_bn'] = frozen('backbone/layer4_0/bn1/scale')
    m['backbone']['frozen_stages'] = 2 if frozen('backbone/conv1/kernel') else 0
  return ml_collections.ConfigDict(m)
