"""DETR equals transformers' DetrForObjectDetection.

Same random weights, a padded batch, uint8 images through our normalisation:
logits, boxes, every part of the set loss, gradients. The stored results are
for everybody; the live ones need the extra [torch].
"""
import functools
import sys

import jax
import numpy as np
import pytest

from e2e_vlp_jax.objectives import detection
from tests import memory
from tests import parity

GRADIENT_TOLERANCE = 1e-3  # of the largest magnitude in the tensor
slow = pytest.mark.slow
STORED = ['r18', 'r50', pytest.param('published', marks=slow)]
LIVE = ['r18', pytest.param('r50', marks=slow),
        pytest.param('published', marks=slow)]
REQUEST = {'image_only': ('detection',)}


@pytest.fixture(scope='module')
def name(request):
  """Name of a case; pytest runs the tests of one case after one another.

  The programs and gradients of all cases together would take 2 GiB.
  """
  yield request.param
  memory.forget(sys.modules[__name__])


@functools.lru_cache(None)
def built(name):
  """(outputs, pull) of our model on the case's batch.

  pull: cotangents of the outputs -> {published name: gradient}. One program
  serves both, whatever the loss.
  """
  case = parity.DETR[name]
  model, variables = case.build()
  tree = parity.nested(variables)
  params = tree.pop('params')

  @jax.jit
  def run(params, cotangents):
    out, pull = jax.vjp(lambda p: model.apply(
        {'params': p, **tree}, case.batch(), REQUEST)['image_only'], params)
    return out, pull(cotangents)[0]
  shapes = jax.eval_shape(lambda p: model.apply(
      {'params': p, **tree}, case.batch(), REQUEST)['image_only'], params)
  out, _ = run(params, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype),
                                    shapes))
  return out, lambda cotangents: parity.theirs(
      'hf_detr', case.config,
      parity.flat({'params': run(params, cotangents)[1]}))


def ours(name, aux):
  """(outputs, {published name: gradient}, loss) of our model."""
  out, pull = built(name)

  def loss(out):
    terms, _ = detection.Objective(aux=aux)({'image_only': out},
                                            parity.DETR[name].batch())
    return sum(s / w for s, w in terms.values())
  value, cotangents = jax.jit(jax.value_and_grad(loss))(out)
  return out, pull(cotangents), value


def expected(name, kind, live):
  """(results, their source); kind: '', '_no_aux' or '_alone'."""
  if not live:
    return parity.stored(f'detr_{name}{kind}'), 'stored transformers results'
  from tests import parity_torch  # pylint: disable=import-outside-toplevel
  case = parity.DETR[name]
  if kind == '_alone':
    return parity_torch.detr_alone(case), parity_torch.WITH
  results = parity_torch.detr_results(case, aux=not kind)
  for key in [k for k in results if k.startswith('grad/')]:
    results['max/' + key] = np.abs(results[key]).max()
  return results, parity_torch.WITH


def parts(layer, case):
  """{'ce', 'bbox', 'giou'} of one decoder layer, as they are named there."""
  objective = detection.Objective(aux=False, box_weight=1., giou_weight=1.)
  terms, _ = objective({'image_only': layer}, case.batch())
  names = {'class': 'ce', 'box': 'bbox', 'giou': 'giou'}
  return {names[k]: s / w for k, (s, w) in terms.items()}


def compare(record_property, name, aux, live):
  case = parity.DETR[name]
  out, grads, value = ours(name, aux)
  want, against = expected(name, '' if aux else '_no_aux', live)
  title = (f'DETR {name} (ResNet-{case.depth}, width {case.width}, '
           f'{case.encoder}+{case.decoder} layers), '
           + ('with' if aux else 'without') + ' auxiliary losses: ')

  def row(what, worst, tolerance=parity.TOLERANCE):
    parity.note(record_property, title + what, against, worst, tolerance)
  layers = [(out, '')]
  if aux:
    layers += [(x, f'_{i}') for i, x in enumerate(out['aux_outputs'])]
    assert len(layers) == case.decoder
  gap = lambda key, x: parity.difference(key, x, want[key])
  row('logits', max(gap('logits' + s, x['pred_logits']) for x, s in layers))
  row('boxes', max(gap('boxes' + s, x['pred_boxes']) for x, s in layers))
  by_part = [(k, s, v) for x, s in layers for k, v in parts(x, case).items()]
  for part in ('ce', 'bbox', 'giou'):
    row(f'loss_{part}', max(gap(f'loss_{k}{s}', v) for k, s, v in by_part
                            if k == part))
  row('total loss', gap('loss', value))
  keys = [k for k in want if k.startswith('grad/')]
  frozen = {k for k in grads if 'grad/' + k not in want}
  trunk = 'model.backbone.conv_encoder.model.'
  # What transformers does not train: the stem, layer1 and all BatchNorms.
  assert all(k.startswith(trunk) and not np.any(grads[k]) for k in frozen)
  assert keys and {k[len('grad/'):] for k in keys} | frozen == set(grads)
  # Some gradients are zero by symmetry: those of the keys' biases, and of
  # queries and keys where all values are equal. What is left is rounding.
  zero = 1e-6 * max(want['max/' + k] for k in keys)
  ratios = []
  for k in keys:
    largest, grad = want['max/' + k], grads[k[len('grad/'):]]
    if largest < zero:
      assert np.abs(grad).max() < zero, k
    else:
      ratios.append(gap(k, grad) / largest)
  assert len(ratios) > .8 * len(keys)
  row(f'gradients of {len(keys)} tensors, relative to each one\'s maximum',
      max(ratios), GRADIENT_TOLERANCE)


@pytest.mark.parametrize('name', STORED, indirect=True)
def test_equals_stored_results(record_property, name):
  compare(record_property, name, True, live=False)


@pytest.mark.parametrize('name', LIVE, indirect=True)
def test_equals_transformers(record_property, torch_extra, name):
  compare(record_property, name, True, live=True)


@pytest.mark.parametrize('live', [False, True], ids=['stored', 'live'])
@pytest.mark.parametrize('name', LIVE[:2], indirect=True)
def test_without_auxiliary_losses(record_property, request, name, live):
  if live:
    request.getfixturevalue('torch_extra')
  compare(record_property, name, False, live)


@pytest.mark.parametrize('live', [False, True], ids=['stored', 'live'])
@pytest.mark.parametrize('name', LIVE[:2], indirect=True)
def test_padding_is_kept_out(record_property, request, name, live):
  """mask_padding: an image in a batch equals that image alone."""
  if live:
    request.getfixturevalue('torch_extra')
  case = parity.DETR[name]
  want, against = expected(name, '_alone', live)
  out = masked_outputs(name)(case.batch())
  for key in ('logits', 'boxes'):
    parity.note(record_property, f'DETR {name}, padded batch with '
                f'mask_padding, against each image alone: {key}', against,
                parity.difference(key, out[f'pred_{key}'], want[key]),
                parity.TOLERANCE)


@functools.lru_cache(None)
def masked_outputs(name):
  model, variables = parity.DETR[name].build(mask_padding=True)
  # As an argument: constants of a program would be kept twice, and compiled.
  run = jax.jit(lambda v, batch: model.apply(v, batch, REQUEST)['image_only'])
  return functools.partial(run, parity.nested(variables))


def test_the_canvas_changes_nothing(record_property):
  """The same images on a larger canvas, whose padding holds noise."""
  apply, batch = masked_outputs('r18'), parity.DETR['r18'].batch()
  wide = dict(batch)
  for key in ('image', 'image_mask'):
    x = np.asarray(batch[key])
    pad = [(0, 0), (0, 32), (0, 64)] + [(0, 0)] * (x.ndim - 3)
    wide[key] = np.pad(x, pad, constant_values=77 if x.ndim == 4 else False)
  a, b = apply(batch), apply(wide)
  for key in ('pred_logits', 'pred_boxes'):
    parity.note(record_property, f'DETR r18, 64x96 and 96x160 canvas: {key}',
                'itself', parity.difference(key, a[key], b[key]), 2e-5)
