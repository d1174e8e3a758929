"""What pixels mean: transparency, depths, and files that are no images."""
import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data.datasets import image_files

NOISE, SEEN = 60, 200  # what lies under the transparent half, and the other


def encode(image, form='PNG', **options):
  out = io.BytesIO()
  image.save(out, form, **options)
  return out.getvalue()


def png(colour, depth, pixels, transparent):
  """A PNG of 16 bits with a transparent colour, which Pillow cannot write."""
  chunk = lambda kind, data: (
      struct.pack('>I', len(data)) + kind + data
      + struct.pack('>I', zlib.crc32(kind + data)))
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack(
      '>IIBBBBB', pixels.shape[1], len(pixels), depth, colour, 0, 0, 0))
          + chunk(b'tRNS', transparent) + chunk(b'IDAT', zlib.compress(rows))
          + chunk(b'IEND', b''))


def half(noise=NOISE, seen=SEEN, channels=()):
  """Left half noise, right half seen: [4, 8, ...]."""
  pixels = np.full((4, 8, *channels), noise, np.uint16)
  pixels[:, 4:] = seen
  return pixels


def images():
  """{name: encoded image whose left half is transparent}."""
  grey = Image.fromarray(np.uint8(half()))
  alpha = Image.fromarray(np.uint8(half(0, 255)))
  rgba = grey.convert('RGBA')
  rgba.putalpha(alpha)
  la = grey.copy()
  la.putalpha(alpha)
  palette = Image.fromarray(np.uint8(half(1, 2)), 'P')
  palette.putpalette([0, 0, 0, *[NOISE] * 3, *[SEEN] * 3])
  deep = half(NOISE * 257, SEEN * 257, (3,))
  return {
      'RGBA': encode(rgba), 'LA': encode(la), 'webp': encode(
          rgba, 'WEBP', lossless=True, exact=True),
      'palette': encode(palette, transparency=1),
      'palette with alphas': encode(palette, transparency=b'\xff\0\xff'),
      'gif': encode(palette, 'GIF', transparency=1),
      'RGB with a colour': encode(grey.convert('RGB'),
                                  transparency=(NOISE,) * 3),
      'grey with a colour': encode(grey, transparency=NOISE),
      'RGB of 16 bits': png(2, 16, deep, struct.pack('>HHH', *deep[0, 0])),
      'grey of 16 bits': png(0, 16, deep[..., 0],
                             struct.pack('>H', deep[0, 0, 0])),
      'tiff': encode(rgba, 'TIFF')}


@pytest.mark.parametrize('name, data', images().items(), ids=images())
def test_transparent_pixels_are_white(name, data):
  del name
  wanted = np.uint8(half(255, SEEN))[..., None].repeat(3, -1)
  np.testing.assert_array_equal(photographs.decode_image(data), wanted)
  stored = image_files.storable(data, 'x')
  assert 'transparency, drawn on white' in stored.changed
  np.testing.assert_array_equal(photographs.decode_image(stored.data), wanted)
  assert not Image.open(io.BytesIO(stored.data)).has_transparency_data


def test_half_transparent_pixels_are_mixed_with_white():
  data = encode(Image.new('RGBA', (2, 2), (0, 0, 0, 128)))
  assert (photographs.decode_image(data) == 127).all()


def test_opaque_images_are_as_they_were():
  pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
  image = Image.fromarray(pixels)
  for data in (encode(image), encode(image.convert('RGBA'))):
    stored = image_files.storable(data, 'x')
    assert 'transparency' not in stored.changed
    np.testing.assert_array_equal(photographs.decode_image(stored.data),
                                  pixels)


def test_of_several_images_the_first_is_taken():
  images = [Image.new('RGB', (4, 4), (c,) * 3) for c in (10, 200)]
  for form in ('TIFF', 'GIF', 'PNG', 'WEBP'):
    data = encode(images[0], form, save_all=True, append_images=images[1:])
    stored = image_files.storable(data, 'x')
    assert 'the first of several images' in stored.changed
    assert (photographs.decode_image(stored.data) < 20).all()
  photo = encode(images[0], 'MPO', save_all=True, append_images=images[1:])
  assert image_files.storable(photo, 'x').data == photo  # As cameras write it.


@pytest.mark.parametrize('image, form, says', [
    (Image.new('F', (4, 4), .5), 'TIFF', 'floats'),
    (Image.new('I', (4, 4), 9), 'TIFF', '32-bit integers')])
def test_values_without_a_known_white_are_refused(image, form, says):
  data = encode(image, form)
  for read in (photographs.decode_image, image_files.storable):
    with pytest.raises(errors.UserError, match=f'{says}.*8 or 16 bits'):
      read(data, 'x.tif')


@pytest.mark.parametrize('pixels, form', [
    (half(0, 65535), 'PNG'), (half(0, 65535), 'TIFF'), (half(0, 65535), 'PPM')])
def test_16_bits_of_grey_are_kept(pixels, form):
  found = photographs.decode_image(encode(Image.fromarray(pixels), form))
  np.testing.assert_array_equal(found[..., 0], pixels // 257)


@pytest.mark.parametrize('start, says', [
    (b'\0\0\0\x18ftypheic', 'HEIC or HEIF photograph.*convert it'),
    (b'%PDF-1.4', 'PDF document.*draw its pages'),
    (b'\n <!DOCTYPE HTML>', 'web page.*download the image'),
    (b'<svg xmlns=""/>', 'SVG drawing'),
    (b'\0' * 128 + b'DICM', 'DICOM'),
    (b'version https://git-lfs.github.com', 'git lfs pull'),
    (b'nothing known', "'x' is not an image"), (b'', "'x' is not an image")])
def test_files_that_are_no_images_are_named(start, says):
  with pytest.raises(errors.UserError, match=says):
    photographs.decode_image(start, 'x')
