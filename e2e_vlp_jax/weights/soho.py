"""The released SOHO checkpoints (github.com/researchmm/soho).

Checkpoints of pre-training have the trunk, the neck with the visual dictionary,
BERT and the matching head; the masked LM's output layer is a copy of the word
embeddings. Checkpoints of VQA have no dictionary (`model.dictionary.size=0`)
and no matching head; their head becomes the head of `model.heads` in the view
`joint`.
"""
from e2e_vlp_jax.weights import hf_bert
from e2e_vlp_jax.weights import mapping
from e2e_vlp_jax.weights import resnet

_L = 'language.'
SIGNATURE = ('neck.conv.conv.weight', 'neck.ln.weight', 'neck.ln.bias',
             *(_L + name for name in hf_bert.SIGNATURE))
SURPLUS = (resnet.COUNTER,
           (r'head\.vqa\..*', 'the config has no such head'))
COPIES = {'mask_l_fc.weight': _L + hf_bert.SIGNATURE[0]}
UNSAID = hf_bert.UNSAID


def canonical(name):
  return name.removeprefix('module.')  # of torch's DistributedDataParallel


def describe(tensors):
  trunk = {k.removeprefix('backbone.'): x for k, x in tensors.items()
           if k.startswith('backbone.')}
  text = hf_bert.describe({k.removeprefix(_L): x for k, x in tensors.items()
                           if k.startswith(_L + 'bert.')})
  widths = {f'model.backbone.{key}': trunk[name].shape[0]
            for key, name in (('stem', 'conv1.weight'),
                              ('width', 'layer1.0.conv1.weight'))
            if name in trunk}
  facts = {**resnet.describe(trunk), **widths, **text,
           'model.dictionary.size': 0,
           'model.neck.norm': 'neck.conv.bn.weight' in tensors}
  if 'neck.vq.embed' not in tensors:
    return facts
  return {
      **facts, 'model.dictionary.size': tensors['neck.vq.embed'].shape[0],
      'model.neck.mix': 'gate' if 'neck.gate_fc.conv.weight' in tensors
                        else 'add',
      'model.neck.begin_align': 'neck.begin_line.weight' in tensors,
      'model.neck.pos_align': 'neck.pos_line.weight' in tensors}


def read_config(c):
  del c  # The release has no such file.
  return {}


def _projection(theirs, ours, norm):
  """A 1x1 convolution, with BatchNorm or a bias, which is a dense layer."""
  conv = mapping.dense(f'{theirs}.conv', f'neck/{ours}', form='conv1x1')
  if not norm:
    return conv
  kinds = {'weight': ('params', 'scale'), 'bias': ('params', 'bias'),
           'running_mean': ('batch_stats', 'mean'),
           'running_var': ('batch_stats', 'var')}
  return conv[:1] + [
      mapping.Entry(f'{theirs}.bn.{name}', f'{kind}/neck/{ours}_norm/{leaf}')
      for name, (kind, leaf) in kinds.items()]


def entries(config):
  neck = config.model.neck
  out = resnet.entries(config, 'backbone.')
  out += _projection('neck.conv', 'conv', neck.norm)
  out += mapping.norm('neck.ln', 'neck/token_norm')
  if config.model.dictionary.size:
    out.append(mapping.Entry('neck.mask_emb.weight', 'params/neck/mask_token'))
    out += [mapping.Entry(f'neck.vq.{name}', f'codebook/neck/words/{name}')
            for name in ('embed', 'cluster_size', 'cluster_sum', 'embed_avg')]
    if neck.begin_align:
      out += mapping.dense('neck.begin_line', 'neck/begin')
    if neck.pos_align:
      out += mapping.dense('neck.pos_line', 'neck/after')
    if neck.mix == 'gate':
      out += _projection('neck.gate_fc', 'gate', neck.norm)
  out += [e._replace(theirs=_L + e.theirs) for e in hf_bert.entries(config)
          if e.theirs.startswith(('bert.embeddings.', 'bert.encoder.'))]
  # Required in checkpoints of pre-training, which have a dictionary.
  out.append(mapping.Entry('head.match_class.weight', 'params/itm_head/kernel',
                           'dense', '' if config.model.dictionary.size
                           else 'itm'))
  name = mapping.head_of(config, 'joint')
  if name:
    out += mapping.dense('head.vqa.0', f'heads_{name}/hidden', name)
    out += mapping.dense('head.vqa.3', f'heads_{name}/out', name)
  return out
