"""Images and texts as the original SOHO and FIBER pipelines make them.

Arrays: soho/soho_image_pipeline.npz and soho_tokenizer_toy.npz,
fiber_coarse/randaug_ops.npz of the reference data.
"""
import io

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax.data import ops_image, ops_randaug, pp as pp_lib
from e2e_vlp_jax.data import tokenizer as tokenizer_lib
from tests import parity

MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])
SOHO = 'the original pipeline (OpenCV)'
FIBER = 'the original ops (OpenCV 5.0)'


def load(shared, name):
  with np.load(shared / 'reference' / f'{name}.npz') as f:
    return {k: f[k] for k in f.files}


def planned(pp, size, bucket, image=b'', seed=0):
  context = pp_lib.Context(None, None, True, 1, 16, 1, 1)
  return pp_lib.build(pp, context)(
      {'image': image, 'height': int(size[0]), 'width': int(size[1]),
       'bucket': tuple(map(int, bucket)), 'texts': [], 'objects': [],
       'seed': seed})


def test_soho_sizes(shared, record_property):
  """169 sizes under the two limits, in a bucket that holds them all."""
  data = load(shared, 'soho/soho_image_pipeline')
  worst = 0
  for limits in ((1000, 600), (1333, 800)):
    expected = data[f'sizes/out_hw_{limits[0]}x{limits[1]}']
    for size, want in zip(data['sizes/in_hw'], expected):
      bucket = (1344, 832) if size[0] > size[1] else (832, 1344)
      got = planned(f'decode|fit({limits})', size, bucket)['target']
      worst = max(worst, np.abs(got - want).max())
    assert len(expected) == 169
  parity.note(record_property, 'SOHO resize: 338 sizes', SOHO, worst, 0)


def test_soho_images(shared, record_property):
  """Resized, normalised and padded; two of them in one batch's bucket."""
  data = load(shared, 'soho/soho_image_pipeline')
  worst, other = 0., []

  def check(pixels, bucket, want):
    file = io.BytesIO()
    Image.fromarray(pixels[..., ::-1]).save(file, 'PNG')
    plan = planned("decode|fit((100, 60), resample='opencv')",
                   pixels.shape[:2], bucket, file.getvalue())
    canvas = np.zeros((*bucket, 3), np.uint8)
    assert ops_image.render(plan, canvas)
    inside = plan['image_mask'][..., None]
    got = (canvas - MEAN) / STD * inside
    want = want.transpose(1, 2, 0)
    assert not want[~inside[..., 0]].any()
    difference = np.abs(got - want)
    other.append((difference > 1e-5)[inside[..., 0]].mean())
    return difference.max()
  for i in range(4):
    worst = max(worst, check(data[f'img{i}/bgr_uint8'],
                             data[f'img{i}/pad_shape'], data[f'img{i}/out']))
  for i, want in enumerate(data['collated_0_1']):
    worst = max(worst, check(data[f'img{i}/bgr_uint8'], (64, 128), want))
  parity.note(record_property, 'SOHO images: normalised pixels (a grey level '
              'is 0.018)', SOHO, worst, 1e-6)
  parity.note(record_property, 'SOHO images: share of pixels that differ, of '
              'the worst image', SOHO, max(other), 0)


def test_soho_texts(shared, tmp_path, record_property):
  data = load(shared, 'soho/soho_tokenizer_toy')
  (tmp_path / 'v.txt').write_text('\n'.join(data['vocab']))
  tokenizer = tokenizer_lib.load_tokenizer('wordpiece',
                                           str(tmp_path / 'v.txt'))
  context = pp_lib.Context(tokenizer, None, False, 1, 16, 1, 1)
  apply = pp_lib.build('text', context)
  wrong = 0
  for text, ids, mask in zip(data['sentences'], data['input_ids'],
                             data['attention_mask']):
    out = apply({'texts': [str(text)], 'partner_texts': [], 'seed': 0})
    if not text.strip():  # No text is a masked row here, not [CLS] [SEP].
      assert not out['text_mask'].any() and mask.sum() == 2
      continue
    wrong += not (np.array_equal(out['text'][0], ids)
                  and np.array_equal(out['text_mask'][0], mask))
  parity.note(record_property, 'SOHO texts: 9 texts with other ids or mask',
              'the original tokenizer', wrong, 0)


@pytest.mark.parametrize('image', 'ab')
def test_randaug_changes(shared, record_property, image):
  data = load(shared, 'fiber_coarse/randaug_ops')
  pixels = data['image' if image == 'a' else 'image_min_gt_0']
  levels = planned('decode|randaug(count=400, p=1.)', (9, 9), (9, 9))
  levels = dict(sorted(levels['augment'], key=lambda x: x[1] or 0))
  np.testing.assert_allclose(  # the largest of each is the positive one
      [levels['Brightness'], levels['ShearX'], levels['TranslateX'],
       levels['Rotate']], data['magnitudes'])
  worst = seen = 0
  for key, want in data.items():
    if not key.startswith(f'{image}.'):
      continue
    _, name, *sign = key.split('.')
    level = levels[name]
    plan = [(name, -level if sign == ['neg'] else level)]
    got = ops_randaug.augment(pixels, plan, released=True)
    assert got.dtype == np.uint8
    worst, seen = max(worst, np.abs(got.astype(int) - want).max()), seen + 1
  assert seen == 15
  parity.note(record_property, f'FIBER RandAugment, image {image}: 15 changes, '
              'grey levels', FIBER, worst, 0)


def test_randaug_without_its_faults(shared):
  data = load(shared, 'fiber_coarse/randaug_ops')
  bright = data['image_min_gt_0']
  assert (data['b.AutoContrast'] == 255).all()
  got = ops_randaug.augment(bright, [('AutoContrast', None)])
  assert (got.min((0, 1)) == 0).all() and (got.max((0, 1)) >= 254).all()
  # One slope for a channel: order is kept.
  order = np.argsort(bright[..., 0].ravel(), kind='stable')
  assert (np.diff(got[..., 0].ravel()[order].astype(int)) >= 0).all()
  a = data['image']
  sharp = ops_randaug.augment(a, [('Sharpness', 1.36)])
  wrapped = np.abs(sharp.astype(int) - data['a.Sharpness']) > 1
  assert wrapped.any() and np.isin(sharp[wrapped], (0, 255)).all()
