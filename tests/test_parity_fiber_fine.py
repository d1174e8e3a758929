"""FIBER's fine stage equals the original code, part by part.

The reference arrays come from the original (microsoft/FIBER, fine_grained) on
CPU with random weights; docs/fiber_fine.md says what is compared. The whole
model: test_parity_fiber_fine_whole.py.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax.models import dyhead
from e2e_vlp_jax.models import fpn
from e2e_vlp_jax.models import grounding_head
from e2e_vlp_jax.objectives import grounding
from e2e_vlp_jax.ops import anchors as anchors_lib
from e2e_vlp_jax.ops import atss
from e2e_vlp_jax.ops import boxes as boxes_lib
from e2e_vlp_jax.ops import deformable
from e2e_vlp_jax.ops import pixel_boxes
from e2e_vlp_jax.weights import fiber_fine as fine_weights
from e2e_vlp_jax.weights import mapping
from tests import parity

AGAINST = 'the original code (stored)'
STRIDE = 8


@pytest.fixture(scope='module')
def reference(shared):
  """name -> {array name: array} of the reference pack."""
  @functools.lru_cache(None)
  def load(name):
    path = shared / 'reference' / 'fiber_fine' / f'{name}.npz'
    with np.load(path, allow_pickle=False) as f:
      return {k: f[k] for k in f.files}
  return load


def nhwc(x):
  return jnp.asarray(x.transpose(0, 2, 3, 1))


def compare(record_property, title, pairs, tolerance, relative=False):
  """One row for several (ours, theirs); relative to each one's maximum."""
  worst = 0.
  for name, (a, b) in pairs.items():
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, (name, a.shape, b.shape)
    if a.size:
      gap = np.abs(a - b).max()
      worst = max(worst, gap / np.abs(b).max() if relative else gap)
  assert pairs
  parity.note(record_property, f'FIBER fine, {title}', AGAINST, worst,
              tolerance)


# --- Ops --------------------------------------------------------------------
def taps(maps, size):
  """A reference's offsets or masks [B, K, H, W] -> [B, h, w, 9(, 2)]."""
  x = deformable.read_flat(nhwc(maps), size)
  return x.reshape(*x.shape[:3], 9, -1) if x.shape[-1] > 9 else x


def test_deformable_convolution(record_property, reference):
  """Five sizes; in two, the offsets are of another size than the output."""
  data, pairs = reference('deform_conv'), {}
  kernel = jnp.asarray(data['param/weight'].transpose(2, 3, 1, 0))
  for i, (h, w, _, _, stride) in enumerate(data['cases']):
    size = -(-h // stride), -(-w // stride)
    get = lambda k, i=i: data[f'case{i}/{k}']
    out = jax.jit(deformable.convolve, static_argnums=4)(
        nhwc(get('input')), kernel, taps(get('offset'), size),
        taps(get('mask'), size), int(stride)) + data['param/bias']
    pairs[str(i)] = out, nhwc(get('output'))
  compare(record_property, 'deformable convolution: 5 sizes', pairs, 1e-5)


def reference_levels(data):
  return anchors_lib.pyramid(data['feature_sizes'].tolist(), STRIDE)


def each_row(levels, rows):
  """[[A_l, 4]] -> [[B, A_l, 4]], the same for each of `rows`."""
  return [jnp.broadcast_to(x, (len(rows), *x.shape)) for x in levels]


def test_anchors(record_property, reference):
  data = reference('anchors')
  levels = reference_levels(data)
  compare(record_property, 'anchors: 2777 of 5 levels', {
      str(k): (x, data[f'anchors_xyxy_l{k}']) for k, x in enumerate(levels)},
          0)


def test_box_code(record_property, reference):
  data = reference('box_coder')
  encoded = pixel_boxes.encode(data['gt_boxes'], data['anchors'])
  compare(record_property, 'box code: there and back, relative', {
      'encoded': (encoded, data['encoded']),
      'back': (pixel_boxes.decode(encoded, data['anchors']),
               data['decoded_of_encoded']),
      'random': (pixel_boxes.decode(data['random_deltas'], data['anchors']),
                 data['decoded_random'])}, 1e-4, relative=True)


def gathered(data, count):
  """(boxes [B, M, 4], mask [B, M]) of the images of a reference file."""
  rows = [data[f'im{i}/gt_boxes_xyxy'] for i in range(count)]
  most = max(map(len, rows)) + 2  # Padding holds boxes that would be positive.
  fill = np.array([100., 100., 163., 163.], np.float32)
  boxes = np.stack([np.concatenate([r, np.tile(fill, (most - len(r), 1))])
                    for r in rows])
  return boxes, np.arange(most) < np.array([len(r) for r in rows])[:, None]


def test_assignment(record_property, reference):
  """Labels, targets and centerness of three images; one has no boxes."""
  data = reference('atss_assign')
  levels = reference_levels(data)
  boxes, mask = gathered(data, 3)
  owner = np.asarray(atss.assign(each_row(levels, mask), boxes, mask))
  anchors = np.concatenate(levels)
  wrong, pairs, overlaps, rows = 0, {}, {}, np.cumsum([0, *data['num_boxes']])
  for i in range(3):
    wrong += (owner[i] + 1 != data[f'im{i}/labels']).sum()
    at = np.flatnonzero(owner[i] >= 0)
    assert (at == data[f'im{i}/positive_anchor_idx']).all()
    if not len(at):
      continue
    mine = boxes[i, owner[i, at]]
    pairs |= {
        f'{i} code': (pixel_boxes.encode(mine, anchors[at]),
                      data[f'im{i}/reg_targets'][at]),
        f'{i} centerness': (pixel_boxes.centerness(mine, anchors[at]),
                            data[f'im{i}/centerness_targets_at_pos'])}
    overlaps[str(i)] = (pixel_boxes.iou(jnp.asarray(anchors)[:, None],
                                        boxes[i][mask[i]]),
                        data[f'im{i}/iou_anchor_gt'])
    token = data['positive_map'][rows[i] + owner[i, at]] > 0
    assert (token == data[f'im{i}/token_labels'][at]).all()
  parity.note(record_property, 'FIBER fine, assignment: labels of 8331 anchors '
              'that differ', AGAINST, wrong, 0)
  compare(record_property, 'assignment: box code and centerness of positives',
          pairs, 1e-5)
  compare(record_property, 'assignment: IoU of anchors and boxes', overlaps,
          1e-6)


# --- Pyramid and head -------------------------------------------------------
def variables_of(data, entries):
  """The parameters of one module, from the entries of its tensors."""
  out = {}
  for e in entries:
    x = mapping.FORMS[e.form][0](data[f'param/{e.theirs}'])
    out.setdefault(e.ours.split('/', 2)[2], []).append(x)
  return {'params': parity.nested({k: jnp.asarray(np.concatenate(x, -1))
                                   for k, x in out.items()})}


def test_pyramid(record_property, reference):
  """Two batches; in one, a level is not twice the next one's size."""
  data, pairs = reference('fpn'), {}
  variables = variables_of(data, fine_weights.pyramid(2))
  module = fpn.Pyramid(32)
  for case in 'ab':
    out = jax.jit(module.apply)(variables, [
        nhwc(data[f'{case}/in_c{k}']) for k in (3, 4, 5)])
    pairs |= {f'{case} p{k}': (x, nhwc(data[f'{case}/out_p{k}']))
              for k, x in enumerate(out, 3)}
  compare(record_property, 'pyramid: 5 levels of 2 batches', pairs, 1e-5)


def head_inputs(data):
  return [nhwc(data[f'in_p{k}']) for k in range(3, 8)]


@pytest.fixture(scope='module')
def tower(reference):
  """(what each module of the tower returned, levels, data)."""
  data = reference('dyhead_grounding_head')
  module = dyhead.Tower(3, 32)
  variables = variables_of(data, fine_weights.tower(3))
  levels, seen = jax.jit(lambda v, x: module.apply(
      v, x, capture_intermediates=lambda m, name: name in ('__call__', 'mixed'),
      mutable=['intermediates']))(
          variables, head_inputs(data))
  return parity.flat(seen['intermediates']), levels, data


def test_dynamic_head(record_property, tower):
  seen, levels, data = tower
  pairs = {f'{b} p{k}': (seen[f'block{b}/__call__'][0][k - 3],
                         nhwc(data[f'block{b}/out_p{k}']))
           for b in range(3) for k in range(3, 8)}
  compare(record_property, 'dynamic head: 5 levels of 3 blocks', pairs, 5e-5)
  inside = {
      f'offset p{k}': (x, nhwc(data[f'block0/offset_mask_raw_p{k}']))
      for k, x in enumerate(seen['block0/offset/__call__'], 3)}
  inside |= {
      f'mixed p{k}': (x, nhwc(data[f'block0/before_dyrelu_p{k}']))
      for k, x in enumerate(seen['block0/mixed'], 3)}
  inside['weights'] = (
      np.maximum(np.array(seen['block0/level_weight/__call__'])[..., 0], 0),
      data['block0/attnconv_out_in_call_order'])
  compare(record_property, 'inside a block of the dynamic head: offsets, '
          'weights of levels, before the activation', inside, 5e-5)
  del levels


def test_resized_offsets_differ(tower):
  """The released reading of offsets is an option, and it matters."""
  _, levels, data = tower
  variables = variables_of(data, fine_weights.tower(3))
  other = jax.jit(dyhead.Tower(3, 32, released_offsets=False).apply)(
      variables, head_inputs(data))
  assert max(np.abs(a - b).max() for a, b in zip(levels, other)) > .02


def test_grounding_head(record_property, tower):
  _, levels, data = tower
  variables = variables_of(data, fine_weights.head())
  out = jax.jit(grounding_head.Grounding(32).apply)(
      variables, levels, jnp.asarray(data['text_embedded']))
  flat = lambda name: np.concatenate([
      data[f'out/{name}_p{k}'].transpose(0, 2, 3, 1).reshape(
          2, -1, data[f'out/{name}_p{k}'].shape[1])
      for k in range(3, 8)], 1)
  compare(record_property, 'grounding head: boxes, centerness, token logits', {
      'boxes': (out['box_code'], flat('bbox_pred')),
      'centerness': (out['centerness'], flat('centerness')[..., 0]),
      'tokens': (out['token_logits'], np.concatenate([
          data[f'out/dot_product_logits_p{k}'] for k in range(3, 8)], 1))},
          5e-5)


# --- Results ----------------------------------------------------------------
def flat_levels(data, name):
  """A reference's maps of 5 levels [B, K, h, w] -> [B, A, K]."""
  return jnp.concatenate([
      x.transpose(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]) for x in (
          data[f'{name}_l{k}'] for k in range(5))], 1)


def outputs_of(data):
  """The head's outputs [B, P=1, ...] from a reference file."""
  each = lambda x: jnp.asarray(x)[:, None]
  code = flat_levels(data, 'bbox_pred')
  return {
      'token_logits': each(np.concatenate([
          data[f'dot_product_logits_l{k}'] for k in range(5)], 1)),
      'box_code': each(code),
      'centerness': each(flat_levels(data, 'centerness')[..., 0]),
      'anchors': {f'p{k}': jnp.broadcast_to(x, (len(code), 1, *x.shape))
                  for k, x in enumerate(reference_levels(data), 3)}}


def label_tokens(data):
  """(numbers of the labels, [C, L] which tokens they have)."""
  out = np.zeros((len(data['map_labels']),
                  data['dot_product_logits_l0'].shape[-1]), bool)
  for row, tokens in zip(out, data['map_tokens_padded_minus1']):
    row[tokens[tokens >= 0]] = True
  return data['map_labels'], out


def objects_of(data):
  """(what `objects` finds, what `_candidates` does) of a reference file."""
  tokens = label_tokens(data)[1]
  size = jnp.asarray(data['image_sizes_hw'], jnp.float32)
  options = dict(threshold=float(data['cfg_pre_nms_thresh']),
                 candidates=int(data['cfg_pre_nms_top_n']),
                 iou=float(data['cfg_nms_thresh']),
                 most=int(data['cfg_detections_per_img']))
  out = outputs_of(data)
  found = jax.jit(functools.partial(grounding_head.objects, **options))(
      out, tokens, size)
  before = grounding_head._candidates(
      out, jnp.asarray(tokens), size, options['threshold'],
      options['candidates'])
  return found, before


def apart(ours, theirs):
  """Largest gap between two sets of (label, box, score) rows."""
  assert ours[0].shape == theirs[0].shape, (ours[0].shape, theirs[0].shape)
  def ordered(labels, boxes, scores):
    rows = np.column_stack([labels, boxes, scores])
    return rows[np.lexsort(np.round(rows, 2).T)]
  gap = np.abs(ordered(*ours) - ordered(*theirs))
  return gap[:, -1].max(), (gap[:, :-1] / np.maximum(
      1, np.abs(ordered(*theirs)[:, :-1]))).max()


@pytest.mark.parametrize('name', ['detection', 'truncated', 'refexp'])
def test_objects(name, record_property, reference):
  data = reference(f'postprocess_{name}')
  found, before = objects_of(data)
  numbers, scores, boxes = label_tokens(data)[0], 0., 0.
  for i, (h, w) in enumerate(data['image_sizes_hw']):
    start = 0
    for k in range(5):
      want = [data[f'im{i}/candidates_l{k}/{x}']
              for x in ('labels', 'boxes', 'scores')]
      stop = start + min(int(data['cfg_pre_nms_top_n']), len(numbers) * int(
          np.prod(data['feature_sizes'][k])))
      mine = [np.asarray(before[x])[i, 0, start:stop]
              for x in ('labels', 'boxes', 'scores')]
      mine = [x[mine[2] > 0] for x in mine]
      gaps = apart([numbers[mine[0]], *mine[1:]], want)
      scores, boxes, start = max(scores, gaps[0]), max(boxes, gaps[1]), stop
    mine = {k: np.asarray(x)[i, 0] for k, x in found.items()}
    assert (mine['labels'] >= 0).all() and (np.diff(mine['scores']) <= 0).all()
    pixels = mine['boxes'] * [w, h, w, h] - [0, 0, 1, 1]
    gaps = apart([numbers[mine['labels']], pixels, mine['scores']],
                 [data[f'im{i}/final/{x}']
                  for x in ('labels', 'boxes', 'scores')])
    scores, boxes = max(scores, gaps[0]), max(boxes, gaps[1])
  parity.note(record_property, f'FIBER fine, results ({name}): scores of '
              'candidates of 5 levels and of the rest after suppression',
              AGAINST, scores, 1e-5)
  parity.note(record_property, f'FIBER fine, results ({name}): labels and '
              'boxes of the same, relative', AGAINST, boxes, 1e-4)


# --- Losses -----------------------------------------------------------------
def test_pieces_of_losses(record_property, reference):
  data = reference('loss_pieces')
  alpha, gamma = data['focal_alpha_gamma']
  focal = grounding.focal(data['focal_logits'], data['focal_targets'], alpha,
                          gamma)
  boxes, targets = (pixel_boxes.decode(data[f'giou_{k}_deltas'],
                                       data['giou_anchors'])
                    for k in ('pred', 'target'))
  apart = pixel_boxes.giou_loss(boxes, targets)
  mask = data['focal_text_masks'][:, None]
  compare(record_property, 'focal and GIoU loss, relative', {
      'focal': (focal.sum(), data['focal_sum_unmasked']),
      'masked': ((focal * mask).sum(), data['focal_sum_masked']),
      'giou': (apart.sum(), data['giou_unweighted_sum']),
      'weighted': ((apart * data['giou_weight']).sum(),
                   data['giou_weighted_sum'])}, 1e-4, relative=True)


def loss_batch(data, count, canvas, text_masks, positive_map):
  """The pipeline's batch of a reference file."""
  sizes = np.array([data[f'im{i}/size_hw'] for i in range(count)])
  h, w = canvas
  boxes, mask = gathered(data, count)
  size = sizes[:, None, [1, 0, 1, 0]]
  corners = (boxes + [0, 0, 1, 1]) / size
  spans = np.zeros((*mask.shape, positive_map.shape[-1]), bool)
  spans[mask] = positive_map > 0
  spans[~mask] = True
  return jax.tree.map(jnp.asarray, {
      'valid': np.ones(count, bool),
      'image_mask': (np.arange(h)[:, None] < sizes[:, 0, None, None])
                    & (np.arange(w) < sizes[:, 1, None, None]),
      'text_mask': text_masks[:, None] > 0, 'box_mask': mask,
      'span_mask': spans,
      'boxes': np.asarray(boxes_lib.to_cxcywh(corners), np.float32)})


LOSSES = {'box_giou': 'loss_reg', 'centerness': 'loss_centerness',
          'token': 'loss_dot_product_token'}


@pytest.mark.parametrize('name', ['two_images', 'one_empty_image'])
def test_losses(name, record_property, reference):
  """Three losses and their gradients; one text fills every token."""
  data = reference(f'losses_{name}')
  out = outputs_of(data)
  anchors = out.pop('anchors')
  batch = loss_batch(data, 2, (320, 416), data['text_masks'],
                     data['positive_map'])

  def total(out):
    losses, _ = grounding.Objective()(
        {'joint': {**out, 'anchors': anchors}}, batch)
    values = {k: s / w for k, (s, w) in losses.items()}
    return sum(values.values()), values
  (loss, values), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(out)
  compare(record_property, f'losses ({name}), relative', {
      'total': (loss, data['loss_total']),
      **{k: (values[k], data[x]) for k, x in LOSSES.items()}}, 1e-4,
          relative=True)
  first = int(np.prod(data['feature_sizes'][0]))
  pairs = {
      'box code': (grads['box_code'][:, 0],
                   flat_levels(data, 'grad/bbox_pred')),
      'centerness': (grads['centerness'][:, 0],
                     flat_levels(data, 'grad/centerness')[..., 0]),
      'tokens': (grads['token_logits'][:, 0, first:], np.concatenate([
          data[f'grad/dot_product_logits_l{k}'] for k in range(1, 5)], 1))}
  compare(record_property, f'gradients of the losses ({name}), relative',
          pairs, 1e-4, relative=True)
