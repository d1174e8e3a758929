"""torchvision's and timm's ResNet-18 to -152: the trunk of a model."""
from e2e_vlp_jax.weights import resnet

SIGNATURE = ('conv1.weight', 'bn1.running_mean', 'layer1.0.conv1.weight')
SURPLUS = (resnet.COUNTER,
           (r'fc\.(weight|bias)', 'ImageNet classifier; no such head here'))
COPIES = {}

describe = resnet.describe
entries = resnet.entries


def canonical(name):
  return name.removeprefix('module.')  # of torch's DataParallel


def read_config(c):
  del c  # torchvision has no such file.
  return {}
