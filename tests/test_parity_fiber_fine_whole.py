"""FIBER's fine stage as a whole equals the original code, in both variants.

The reference is the original detector with random weights: all 24 blocks of
Swin and 12 layers of RoBERTa, narrow, on two images of different sizes.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fiber_fine as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.objectives import grounding
from e2e_vlp_jax.training import optim
from e2e_vlp_jax.weights import fiber_fine as fine_weights
from e2e_vlp_jax.weights import mapping
from tests import parity
from tests import test_parity_fiber_fine as parts
from tests import xla_flags

pytestmark = pytest.mark.large

reference, compare = parts.reference, parts.compare
AGAINST = parts.AGAINST
VARIANTS = ('v2', 'v3')


def reference_config(variant):
  config = config_lib.get_config(f'base,fusion={variant}')
  config.dtype = 'float32'
  config.model.remat = 'none'
  config.model.swin.update(dict(width=8, heads=(1, 2, 4, 8), window=4,
                                drop_path=0.))
  config.model.roberta.update(dict(width=48, heads=4, ffn=96, positions=40,
                                   dropout=0.))
  config.model.head.update(dict(width=32, blocks=2, drop_block=0.))
  # Its images are normalised already, and in its order of channels.
  config.model.update(dict(channels='rgb', image_mean=(0., 0., 0.),
                           image_std=(1 / 255,) * 3))
  return config


def tensors_of(reference, variant):
  """Arrays of a variant; v3's file has only what v2's lacks."""
  return {**reference('tiny_end_to_end_fusion_v2'),
          **(reference('tiny_end_to_end_fusion_v3') if variant == 'v3'
             else {})}


def variables_of(config, data):
  parts_of = {}
  for e in fine_weights.entries(config):
    x = mapping.FORMS[e.form][0](data[f'param/{e.theirs}'])
    parts_of.setdefault(e.ours, []).append(x)
  return parity.nested({k: jnp.asarray(np.concatenate(x, -1))
                        for k, x in parts_of.items()})


def batch_of(data):
  sizes, pixels = data['image_sizes_hw'], data['images']
  # Padding is zero there; our mask makes it so.
  assert not pixels[1, :, sizes[1][0]:].any()
  held = {**data, **{f'im{i}/size_hw': sizes[i] for i in range(2)}}
  batch = parts.loss_batch(held, 2, pixels.shape[2:], data['attention_mask'],
                           data['loss_positive_map'])
  return {**batch, 'image': parts.nhwc(pixels),
          'text': jnp.asarray(data['input_ids'][:, None], jnp.int32)}


class Case:
  """One variant, run once: outputs, intermediates, losses, gradients."""

  def __init__(self, reference, variant):
    self.config = reference_config(variant)
    self.data = tensors_of(reference, variant)
    self.model = models.build(self.config, vocab_size=100, num_classes=3,
                              num_attributes=0)
    self.variables = variables_of(self.config, self.data)
    self.batch = batch_of(self.data)

  @functools.cached_property
  def trained(self):
    """(outputs, {path: returned}, {loss: value}, total, {path: gradient})."""
    def total(params):
      out, seen = self.model.apply(
          {'params': params}, self.batch, {'joint': ('grounding',)},
          train=True, mutable=['intermediates'], capture_intermediates=True,
          rngs={'dropout': jax.random.key(0)})
      losses, _ = grounding.Objective()(out, self.batch)
      losses = {k: s / jnp.maximum(w, 1e-9) for k, (s, w) in losses.items()}
      return sum(losses.values()), (out['joint'], parity.flat(
          seen['intermediates']), losses)
    (loss, (out, seen, losses)), grads = jax.jit(
        jax.value_and_grad(total, has_aux=True),
        compiler_options=xla_flags.EXACT)(self.variables['params'])
    return out, seen, losses, loss, parity.flat({'params': grads})


@pytest.fixture(scope='module')
def case(reference):
  return functools.cache(lambda variant: Case(reference, variant))


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_features(variant, record_property, case, compiles_much):
  """Text layers, Swin's blocks, stages, pyramid, head."""
  out, seen, *_ = case(variant).trained
  want = case(variant).data
  get = lambda path: seen[f'{path}/__call__'][0]
  pairs = {}
  for name in (k for k in want if k.startswith('tap/')):
    where = name.removeprefix('tap/').replace('swin_layers', 'swin/blocks_')
    where = where.replace('text_layer', 'text/layers_').replace('_block', '_')
    pairs[name] = (np.reshape(get(where), want[name].shape), want[name])
  for k, path in enumerate(('swin/blocks_0_1', 'stage_norms_0',
                            'stage_norms_1', 'stage_norms_2'), 2):
    pairs[f'c{k}'] = get(path), parts.nhwc(want[f'backbone_out_c{k}'])
  for k, x in enumerate(get('pyramid'), 3):
    pairs[f'p{k}'] = x, parts.nhwc(want[f'fpn_out_p{k}'])
  hidden, mask = get('text/layers_11'), want['attention_mask'][..., None]
  pairs |= {'hidden': (hidden, want['lang_hidden']),
            'embedded': (hidden * mask, want['lang_embedded']),
            'aggregate': ((hidden * mask).sum(1) / mask.sum(1),
                          want['lang_aggregate'])}
  assert len(pairs) == 12 + 4 + 5 + 3
  compare(record_property, f'whole, fusion {variant}: text layers, blocks, '
          'stages, pyramid', pairs, 1e-4)
  levels = lambda name: np.concatenate([
      x.transpose(0, 2, 3, 1).reshape(2, -1, x.shape[1]) for x in (
          want[f'{name}_p{k}'] for k in range(3, 8))], 1)
  compare(record_property, f'whole, fusion {variant}: boxes, centerness, token '
          'logits', {
              'boxes': (out['box_code'][:, 0], levels('bbox_pred')),
              'centerness': (out['centerness'][:, 0],
                             levels('centerness')[..., 0]),
              'tokens': (out['token_logits'][:, 0], np.concatenate([
                  want[f'dot_product_logits_p{k}'] for k in range(3, 8)], 1))},
          1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_results(variant, record_property, case):
  """Boxes of the whole model; equal scores may change places at the cut."""
  out, want = case(variant).trained[0], case(variant).data
  tokens = np.zeros((len(want['map_labels']), 32), bool)
  for row, at in zip(tokens, want['map_tokens_padded_minus1']):
    row[at[at >= 0]] = True
  found = jax.jit(functools.partial(grounding_head.objects, most=40))(
      out, jnp.asarray(tokens), grounding_head.image_size(
          case(variant).batch['image_mask']))
  worst, missed = 0., 0
  for i, (h, w) in enumerate(want['image_sizes_hw']):
    mine = {k: np.asarray(x)[i, 0] for k, x in found.items()}
    boxes = mine['boxes'] * [w, h, w, h] - [0, 0, 1, 1]
    theirs = [want[f'im{i}/final/{k}'] for k in ('labels', 'boxes', 'scores')]
    for label, box, score in zip(*theirs):
      gap = np.abs(boxes - box).max(1) + 1e3 * (
          want['map_labels'][mine['labels']] != label)
      if gap.min() > .05:
        missed += 1
      else:
        worst = max(worst, abs(mine['scores'][gap.argmin()] - score))
  print(f'{variant}: {missed} of 80 boxes not found')
  assert missed <= 1
  parity.note(record_property, f'FIBER fine, whole, fusion {variant}: scores '
              'of results', AGAINST, worst, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_losses_and_gradients(variant, record_property, case):
  _, _, losses, loss, grads = case(variant).trained
  want = case(variant).data
  compare(record_property, f'whole, fusion {variant}: losses, relative', {
      'total': (loss, want['loss/total']),
      **{k: (losses[k], want[f'loss/{x}'])
         for k, x in parts.LOSSES.items()}}, 1e-4, relative=True)
  entries = fine_weights.entries(case(variant).config)
  ours = {e.theirs: e.take(np.asarray(grads[e.ours])) for e in entries}
  listed = dict(zip(want['grad_param_names'], want['grad_param_l2norm']))
  # There Swin's first stage is frozen; the classifier is never trained.
  still = set(want['frozen_param_names'])
  assert set(listed) | {n for n in still if 'cls_logits' not in n} == set(ours)
  # Those of saturated attention are rounding alone: 1e-3 of a norm, and 1e-6.
  worst = max(abs(np.linalg.norm(ours[n]) - x) / (x + 1e-3)
              for n, x in listed.items())
  parity.note(record_property, f'FIBER fine, whole, fusion {variant}: L2 norms '
              f'of {len(listed)} gradients, relative to each one and 1e-3',
              AGAINST, worst, 1e-3)
  full = {k.removeprefix('grad/'): x for k, x in want.items()
          if k.startswith('grad/')}
  assert len(full) == 4
  compare(record_property, f'whole, fusion {variant}: four gradients, relative',
          {k: (ours[k], x) for k, x in full.items()}, 1e-4, relative=True)


@pytest.mark.parametrize('variant', VARIANTS)
def test_optimiser_groups(variant, record_property, reference):
  """Learning rate and decay of every tensor; which ones are frozen."""
  config, data = reference_config(variant), tensors_of(reference, variant)
  entries = fine_weights.entries(config)
  params = {e.ours.removeprefix('params/'): np.zeros(1) for e in entries}
  groups = parity.flat(optim.group_of(parity.nested(params),
                                      config.optim.groups))
  listed = {n: (lr, wd) for n, lr, wd in zip(
      data['optim_param_names'], data['optim_lr'],
      data['optim_weight_decay'])}
  frozen, other = set(), 0
  for e in entries:
    group = dict(config.optim.groups[int(groups[
        e.ours.removeprefix('params/')])][1])
    if group.get('freeze'):
      frozen.add(e.theirs)
      continue
    lr, wd = listed.pop(e.theirs)
    other += not np.isclose(group.get('lr_multiplier', 1.)
                            * config.optim.learning_rate, lr, rtol=1e-9)
    other += group.get('weight_decay', config.optim.weight_decay) != wd
  assert not listed
  assert frozen == {n for n in data['frozen_param_names']
                    if 'cls_logits' not in n}
  parity.note(record_property, f'FIBER fine, fusion {variant}: learning rates, '
              'decays and frozen tensors that differ', AGAINST, other, 0)


def test_schedule(record_property, reference):
  """Of pre-training's learning rate; and where its weight decay drops."""
  data, config = reference('transforms_schedule'), config_lib.get_config('base')
  assert config.optim.decay_steps == tuple(data['schedule_milestones'])
  assert config.optim.weight_decay_steps == (357_512, 474_904)
  ours = np.asarray(jax.vmap(optim.make_schedule(
      config.optim, config.total_steps))(data['schedule_step']))
  theirs = data['schedule_lr_base_1e-4']
  parity.note(record_property, 'FIBER fine, learning rate at 15 steps, '
              'relative', AGAINST, np.abs(ours / theirs - 1).max(), 1e-5)
