"""The ResNet trunk in torchvision's and in transformers' names.

Shared by hf_resnet, torchvision_resnet and hf_detr. torchvision's names are
the canonical ones here; timm has the same.
"""
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.weights import mapping

COUNTER = (r'(.*\.)?num_batches_tracked',
           'counts batches, which only torch\'s BatchNorm does')

_STAGE = r'encoder\.stages\.(\d+)\.layers\.(\d+)\.'


def to_torchvision(name):
  """'encoder.stages.0.layers.1.layer.2...' -> 'layer1.1.conv3...'."""
  name = re.sub(r'^embedder\.embedder\.convolution\.', 'conv1.', name)
  name = re.sub(r'^embedder\.embedder\.normalization\.', 'bn1.', name)
  block = re.match(_STAGE, name)
  if not block:
    return name
  rest = name[block.end():]
  rest = rest.replace('shortcut.convolution.', 'downsample.0.')
  rest = rest.replace('shortcut.normalization.', 'downsample.1.')
  rest = re.sub(r'^layer\.(\d+)\.(convolution|normalization)\.',
                lambda m: ('conv' if m[2] == 'convolution' else 'bn')
                + f'{int(m[1]) + 1}.', rest)
  return f'layer{int(block[1]) + 1}.{block[2]}.{rest}'


def to_transformers(name):
  """The inverse of `to_torchvision`."""
  name = re.sub(r'^conv1\.', 'embedder.embedder.convolution.', name)
  name = re.sub(r'^bn1\.', 'embedder.embedder.normalization.', name)
  block = re.match(r'layer(\d+)\.(\d+)\.', name)
  if not block:
    return name
  rest = name[block.end():]
  rest = rest.replace('downsample.0.', 'shortcut.convolution.')
  rest = rest.replace('downsample.1.', 'shortcut.normalization.')
  rest = re.sub(r'^(conv|bn)(\d+)\.',
                lambda m: f'layer.{int(m[2]) - 1}.' + (
                    'convolution' if m[1] == 'conv' else 'normalization')
                + '.', rest)
  return f'encoder.stages.{int(block[1]) - 1}.layers.{block[2]}.{rest}'


def describe(tensors):
  """{config key: value} of a trunk, from its tensors in torchvision's names.

  Raises:
    UserError: a ResNet of an unsupported depth.
  """
  blocks = tuple(mapping.count(rf'layer{s}\.(\d+)\.', tensors)
                 for s in range(1, 5))
  bottleneck = 'layer1.0.conv3.weight' in tensors
  for depth, counts in resnet.BLOCKS.items():
    if counts == blocks and resnet.BOTTLENECK[depth] == bottleneck:
      return {'model.backbone.name': 'resnet', 'model.backbone.depth': depth}
  raise errors.UserError(
      f'--input: a ResNet with {", ".join(map(str, blocks))} '
      f'{"bottleneck" if bottleneck else "basic"} blocks a stage; expected '
      'one of the depths ' + ', '.join(map(str, resnet.BLOCKS)))


def entries(config, prefix=''):
  """Entries of the trunk in torchvision's names, after `prefix`."""
  backbone = config.model.backbone
  depth = backbone.depth
  defaults = resnet.ResNet.__dataclass_fields__
  stem, width = (backbone.get(k, defaults[k].default)
                 for k in ('stem', 'width'))
  # The first block has a shortcut where it changes the number of channels.
  widens = stem != width * (4 if resnet.BOTTLENECK[depth] else 1)

  def batch_norm(theirs, ours):
    t = f'{prefix}{theirs}'
    return [mapping.Entry(f'{t}.weight', f'params/backbone/{ours}/scale'),
            mapping.Entry(f'{t}.bias', f'params/backbone/{ours}/bias'),
            mapping.Entry(f'{t}.running_mean',
                          f'batch_stats/backbone/{ours}/mean'),
            mapping.Entry(f'{t}.running_var',
                          f'batch_stats/backbone/{ours}/var')]

  def conv(theirs, ours):
    return [mapping.Entry(f'{prefix}{theirs}.weight',
                          f'params/backbone/{ours}/kernel', 'conv')]

  out = conv('conv1', 'conv1') + batch_norm('bn1', 'bn1')
  for stage, count in enumerate(resnet.BLOCKS[depth], 1):
    for i in range(count):
      theirs, ours = f'layer{stage}.{i}', f'layer{stage}_{i}'
      for k in range(1, 4 if resnet.BOTTLENECK[depth] else 3):
        out += conv(f'{theirs}.conv{k}', f'{ours}/conv{k}')
        out += batch_norm(f'{theirs}.bn{k}', f'{ours}/bn{k}')
      if i == 0 and (stage > 1 or widens):
        out += conv(f'{theirs}.downsample.0', f'{ours}/downsample_conv')
        out += batch_norm(f'{theirs}.downsample.1', f'{ours}/downsample_bn')
  return out
