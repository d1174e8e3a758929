"""timm's and Microsoft's SwinTransformer, as a trunk.

Such as swin_base_patch4_window12_384_in22k, from which FIBER starts. Up to
timm 0.6, and in Microsoft's files, patch merging ends a stage; from 0.8 on it
begins the next one, and the classifier is `head.fc`.
"""
import re

from e2e_vlp_jax.weights import swin

SIGNATURE = ('patch_embed.proj.weight',
             'layers.0.blocks.0.attn.relative_position_bias_table')
SURPLUS = (swin.SIZES,
           (r'head\..*', 'ImageNet classifier; no such head here'))
COPIES = {}
NEVER, RESIZABLE, resize = swin.NEVER, swin.RESIZABLE, swin.resize
_MERGING = re.compile(r'layers\.(\d+)\.downsample\.')


def canonical(name):
  return name


def spelling(names):
  """`canonical` for merging layers, in files of either version."""
  stages = {int(m[1]) for m in map(_MERGING.match, names) if m}
  if not stages or 0 in stages:
    return canonical
  return lambda name: _MERGING.sub(
      lambda m: f'layers.{int(m[1]) - 1}.downsample.', name)


def describe(tensors):
  return swin.describe(tensors)


def read_config(c):
  del c  # timm's config.json adds nothing to its tensors.
  return {}


def entries(config):
  return swin.entries(config)
