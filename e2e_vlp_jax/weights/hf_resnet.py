"""transformers' ResNetModel, ResNetBackbone, ResNetForImageClassification."""
from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import resnet

SIGNATURE = ('embedder.embedder.convolution.weight',
             'encoder.stages.0.layers.0.layer.0.convolution.weight')
SURPLUS = (resnet.COUNTER,
           (r'classifier\..*', 'ImageNet classifier; no such head here'))
COPIES = {}


def canonical(name):
  return name.removeprefix('resnet.')


def describe(tensors):
  return resnet.describe({resnet.to_torchvision(k) for k in tensors})


def read_config(c):
  if c.get('downsample_in_bottleneck'):
    raise errors.UserError(
        'config.json beside --input: downsample_in_bottleneck is true; '
        'expected false, the stride in the 3x3 convolution')
  return {}


def entries(config):
  return [e._replace(theirs=resnet.to_transformers(e.theirs))
          for e in resnet.entries(config)]
