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

from e2e_vlp_jax.ops import anchors as anchors_lib
from e2e_vlp_jax.ops import atss
from e2e_vlp_jax.ops import deformable
from e2e_vlp_jax.ops import pixel_boxes
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
  owner = np.asarray(atss.assign(levels, boxes, mask))
  anchors = np.concatenate(levels)
  wrong, pairs, rows = 0, {}, np.cumsum([0, *data['num_boxes']])
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
                            data[f'im{i}/centerness_targets_at_pos']),
        f'{i} iou': (pixel_boxes.iou(
            jnp.asarray(anchors)[:, None], boxes[i][mask[i]]),
                     data[f'im{i}/iou_anchor_gt'])}
    token = data['positive_map'][rows[i] + owner[i, at]] > 0
    assert (token == data[f'im{i}/token_labels'][at]).all()
  parity.note(record_property, 'FIBER fine, assignment: labels of 8331 anchors '
              'that differ', AGAINST, wrong, 0)
  compare(record_property, 'assignment: box code, centerness, IoU at positives',
          pairs, 1e-5)
