"""Properties of box geometry, on boxes that hypothesis makes up."""
import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np

from e2e_vlp_jax.ops import boxes

N = 8  # boxes drawn at a time, so that one program serves all draws
fast = hypothesis.settings(max_examples=60, deadline=None)
number = st.floats(0, 1, width=32)
giou = jax.jit(boxes.generalized_iou)
iou_and_union = jax.jit(boxes.iou_and_union)


@st.composite
def xyxy(draw):
  """[N, 4] boxes; some without width, height or both, some equal."""
  a = draw(hnp.arrays(np.float32, (N, 2, 2), elements=number))
  return np.concatenate([a.min(1), a.max(1)], -1)


def slow_giou(a, b):
  """One pair, in double precision, straight from the paper's algorithm."""
  a, b = a.astype(float), b.astype(float)
  overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
      0, min(a[3], b[3]) - max(a[1], b[1]))
  size = lambda x: (x[2] - x[0]) * (x[3] - x[1])
  union = size(a) + size(b) - overlap
  hull = (max(a[2], b[2]) - min(a[0], b[0])) * (
      max(a[3], b[3]) - min(a[1], b[1]))
  return ((overlap / union if union else 0)
          - ((hull - union) / hull if hull else 0))


@fast
@hypothesis.given(xyxy())
def test_conversion_goes_both_ways(a):
  b = boxes.to_xyxy(boxes.to_cxcywh(a))
  np.testing.assert_allclose(b, a, atol=1e-6)


@fast
@hypothesis.given(xyxy(), xyxy())
def test_giou_is_bounded_symmetric_and_below_iou(a, b):
  g, (iou, union) = giou(a, b), iou_and_union(a, b)
  assert np.all(np.isfinite(g))
  assert np.all(g >= -1 - 1e-5) and np.all(g <= iou + 1e-5)
  assert np.all((iou >= 0) & (iou <= 1 + 1e-5))
  assert np.all(union >= -1e-7)
  np.testing.assert_allclose(g, giou(b, a), atol=1e-5)


@st.composite
def solid(draw):
  """[N, 4] boxes with sides of at least .05."""
  low = draw(hnp.arrays(np.float32, (N, 2), elements=number))
  side = draw(hnp.arrays(np.float32, (N, 2),
                         elements=st.floats(.0625, 1, width=32)))
  return np.concatenate([low, low + side], -1)


@fast
@hypothesis.given(solid(), solid())
def test_giou_is_the_papers(a, b):
  want = [slow_giou(x, y) for x, y in zip(a, b)]
  np.testing.assert_allclose(giou(a, b), want, atol=2e-5)


@fast
@hypothesis.given(solid())
def test_giou_with_itself_is_one(a):
  np.testing.assert_allclose(giou(a, a), 1, atol=1e-5)


@fast
@hypothesis.given(solid(), solid(), st.sampled_from([.125, .5, 4., 64.]),
                  st.integers(-2, 2))
def test_giou_survives_scaling_and_moving(a, b, scale, shift):
  np.testing.assert_allclose(giou(a * scale, b * scale), giou(a, b),
                             atol=1e-5)
  np.testing.assert_allclose(giou(a + shift, b + shift), giou(a, b),
                             atol=2e-4)  # coordinates lose bits
  flip = lambda x: np.stack([1 - x[:, 2], x[:, 1], 1 - x[:, 0], x[:, 3]], -1)
  np.testing.assert_allclose(giou(flip(a), flip(b)), giou(a, b), atol=1e-4)


def test_giou_of_boxes_apart():
  """Two unit squares with a gap of one: hull 3, union 2."""
  a, b = np.array([0., 0, 1, 1]), np.array([2., 0, 3, 1])
  np.testing.assert_allclose(boxes.generalized_iou(a, b), -1 / 3, atol=1e-6)


def test_degenerate_boxes_have_finite_values_and_gradients():
  """Points, lines, equal boxes: what a fresh model predicts."""
  point = np.array([.5, .5, .5, .5], np.float32)
  line = np.array([.2, .5, .8, .5], np.float32)
  for a in (point, line):
    for b in (point, line, np.array([0., 0, 1, 1], np.float32)):
      value, grad = jax.value_and_grad(
          lambda x: boxes.generalized_iou(x, b))(a)
      assert np.isfinite(value) and np.all(np.isfinite(grad)), (a, b)


def test_all_pairs_by_broadcasting():
  draw = np.random.default_rng(0)
  a, b = (np.sort(draw.random((n, 2, 2)), 1).reshape(n, 4) for n in (3, 5))
  pairs = boxes.generalized_iou(a[:, None], b[None])
  assert pairs.shape == (3, 5)
  np.testing.assert_allclose(pairs[2, 4], slow_giou(a[2], b[4]), atol=1e-6)
