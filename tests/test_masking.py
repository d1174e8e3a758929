"""Who sees what: attention masks and padded feature maps."""
import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from e2e_vlp_jax.models import decoder
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import patch_cnn
from e2e_vlp_jax.models import resnet

fast = hypothesis.settings(max_examples=30, deadline=None)


@fast
@hypothesis.given(st.sampled_from([(4, 2, 3), (0, 1, 5), (3, 0, 1)]),
                  st.integers(0, 2**32 - 1))
def test_decoder_mask_says_what_it_promises(sizes, seed):
  """Queries see queries; a token its own sentence up to itself."""
  q, s, l = sizes
  valid = np.random.default_rng(seed).random((2, s, l)) < .7
  mask = np.asarray(decoder.block_mask(q, valid))
  assert mask.shape == (2, q + s * l, q + s * l)
  place = [('query', 0)] * q + [(i, j) for i in range(s) for j in range(l)]
  for b in range(2):
    real = [True] * q + valid[b].ravel().tolist()
    for i, (group, position) in enumerate(place):
      for j, (other, before) in enumerate(place):
        want = i == j or (group == other and before <= position and real[j])
        assert mask[b, i, j] == want, (b, i, j)


@fast
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_what_is_masked_has_no_influence(seed):
  r = np.random.default_rng(seed)
  query, key, value = r.normal(size=(3, 2, 5, 2, 4)).astype(np.float32)
  mask = r.random((2, 5)) < .6
  mask[:, 0] = True
  bias = layers.mask_bias(mask)[:, None, None]
  hidden = ~mask[:, :, None, None]
  a = layers.attention(query, key, value, bias)
  b = layers.attention(query, np.where(hidden, 1e3, key),
                       np.where(hidden, -1e3, value), bias)
  np.testing.assert_array_equal(a, b)


def test_a_row_without_valid_keys_is_finite():
  x = np.ones((1, 3, 2, 4), np.float32)
  bias = layers.mask_bias(np.zeros((1, 3), bool))[:, None, None]
  assert np.all(np.isfinite(layers.attention(x, x, x, bias)))


@fast
@hypothesis.given(st.integers(1, 96), st.integers(1, 64))
def test_positions_do_not_depend_on_the_canvas(h, w):
  """Valid cells have the positions that they have without padding."""
  height, width = 96, 64
  mask = np.zeros((1, height, width), bool)
  mask[:, :h, :w] = True
  cells = np.asarray(layers.downsample_mask(mask, height // 32, width // 32))
  rows, cols = -(-h // 32), -(-w // 32)
  assert cells.sum() == rows * cols and cells[0, :rows, :cols].all()
  alone = np.ones((1, rows, cols), bool)
  for f in (lambda m: layers.sine_position_2d(m, 8), layers.cell_centers):
    np.testing.assert_allclose(np.asarray(f(cells))[:, :rows, :cols],
                               f(alone), atol=1e-5)
  centers = np.asarray(layers.cell_centers(alone))
  assert centers.min() > 0 and centers.max() < 1


FROZEN = (('.*', True),)  # BatchNorm as constants, as in DETR


@pytest.mark.parametrize('trunk, stride', [
    (resnet.ResNet(18, frozen=FROZEN), 32),
    (resnet.ResNet(18, dilated=True, frozen=FROZEN), 16),
    (patch_cnn.PatchCNN(8, 16, 2), 12)], ids=['resnet18', 'dc5', 'patch_cnn'])
def test_features_do_not_depend_on_the_canvas(trunk, stride):
  """An image on a larger canvas has the features that it has alone."""
  r = np.random.default_rng(0)
  h, w, height, width = 2 * stride - 5, 96 - stride, 4 * stride, 96 + stride
  image = r.normal(size=(1, h, w, 3)).astype(np.float32)
  canvas = np.zeros((1, height, width, 3), np.float32)
  canvas[:, :h, :w] = image
  mask = np.zeros((1, height, width), bool)
  mask[:, :h, :w] = True
  variables = jax.jit(trunk.init)(jax.random.key(0), image)
  # Fresh normalisations shift nothing, and would hide what comes in.
  variables = jax.tree_util.tree_map_with_path(
      lambda path, x: x + .3 if path[-1].key in ('bias', 'mean') else x,
      variables)
  alone = jax.jit(trunk.apply)(variables, image)[-1]
  run = jax.jit(lambda mask: trunk.apply(variables, canvas, mask=mask)[-1])
  rows, cols = alone.shape[1:3]
  on_canvas = run(mask)[:, :rows, :cols]
  scale = float(np.abs(alone).max())
  np.testing.assert_allclose(on_canvas, alone, atol=1e-5 * scale)
  unmasked = run(np.ones_like(mask))[:, :rows, :cols]
  assert np.abs(unmasked - alone).max() > 1e-3 * scale  # the test can fail
