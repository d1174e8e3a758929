"""Decodes photographs of any kind to upright RGB pixels."""
import contextlib
import io
import os

import numpy as np
from PIL import Image, ImageOps

from e2e_vlp_jax import errors

# What lies under transparent pixels is never shown: they are drawn on this.
BACKGROUND = (255, 255, 255)
_CONVERT = 'convert it to JPEG or PNG first'
# How files begin that people take for images, and what to do about them:
# (offset, bytes, what it is, what to do).
_KINDS = (
    *((4, b'ftyp' + brand, 'a HEIC or HEIF photograph', _CONVERT)
      for brand in (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx',
                    b'mif1', b'msf1')),
    (4, b'ftypavif', 'an AVIF image', _CONVERT),
    (4, b'ftypavis', 'an AVIF image', _CONVERT),
    (4, b'ftypcrx ', 'a raw photograph of a camera', _CONVERT),
    (4, b'ftyp', 'a film', 'extract its frames first'),
    (0, b'\xff\x0a', 'a JPEG XL image', _CONVERT),
    (0, b'\0\0\0\x0cJXL ', 'a JPEG XL image', _CONVERT),
    (0, b'%PDF', 'a PDF document', 'draw its pages as PNG first'),
    (0, b'<svg', 'an SVG drawing', 'draw it as PNG first'),
    (0, b'<!doctype html', 'a web page', 'download the image itself'),
    (0, b'<html', 'a web page', 'download the image itself'),
    (0, b'<?xml', 'an XML file, such as a drawing or the answer of a server',
     'draw it as PNG, or download the image itself'),
    (0, b'{', 'JSON, such as the answer of a server',
     'download the image itself'),
    (0, b'version https://git-lfs', 'a pointer of Git LFS', 'run git lfs pull'),
    (0, b'\x93NUMPY', 'a NumPy array', _CONVERT),
    (0, b'\x89HDF', 'an HDF5 file', _CONVERT),
    (128, b'DICM', 'a DICOM image', _CONVERT),
    (0, b'PK\x03\x04', 'a zip file', 'unpack it'),
    (0, b'\x1f\x8b', 'a gzip file', 'unpack it'))


def decode_image(source, name=None):
  """Decodes any photograph to uint8 [H, W, 3]: upright, RGB, 8 bit.

  Grey, CMYK, palette and 16-bit images are converted, transparent pixels are
  drawn on white, and the EXIF orientation is applied. Of an animation this is
  the first image.

  Args:
    source: encoded bytes, or a path.
    name: name of the image in errors; the path by default.

  Raises:
    UserError: no such file, or it is truncated or not an image, or its numbers
      have no known white (see `upright`); names it.
  """
  with readable(name or (source if isinstance(source, (str, os.PathLike))
                         else 'image')):
    if not isinstance(source, bytes):
      with open(source, 'rb') as f:
        source = f.read()
    with opened(source) as image:
      return np.asarray(upright(image))


@contextlib.contextmanager
def opened(data):
  """The PIL image of encoded bytes; for use inside `readable`."""
  try:
    image = Image.open(io.BytesIO(data))
  except Image.UnidentifiedImageError as e:
    start = data[:4096].lstrip().lower()
    for offset, magic, what, remedy in _KINDS:
      place = data[offset:] if offset else start
      if place.startswith(magic.lower() if not offset else magic):
        raise _Kind(f'{what}, not an image that can be read; {remedy}') from e
    raise
  with image:
    yield image


def upright(image):
  """A PIL image as RGB, 8 bit, its EXIF orientation applied.

  Raises:
    ValueError: its values are floats or 32-bit integers. Nothing says which of
      them is white (1, 255, 65535, the largest?), so they are not guessed.
  """
  # Pillow opens 16 bits of grey as I;16, or as I from these formats.
  deep = image.mode.startswith('I')
  if image.mode == 'F' or (image.mode == 'I'
                           and image.format not in ('PNG', 'PPM')):
    raise ValueError('its values are '
                     + ('floats' if image.mode == 'F' else '32-bit integers')
                     + ', of which none is known to be white; convert it to 8 '
                     'or 16 bits first')
  image = ImageOps.exif_transpose(image)
  if deep:
    # 16 bits of grey: Pillow's own conversion would clip at 255.
    grey = np.asarray(image, np.float64)
    if (hidden := image.info.get('transparency')) is not None:
      grey = np.where(grey == hidden, 65535., grey)
    grey = np.uint8(np.clip(np.rint(grey * (255 / 65535)), 0, 255))
    return Image.fromarray(grey).convert('RGB')
  if not image.has_transparency_data:
    return image.convert('RGB')
  drawn = Image.new('RGBA', image.size, BACKGROUND)
  drawn.alpha_composite(_with_alpha(image))
  return drawn.convert('RGB')


def transparent(image):
  """Whether a PIL image has pixels that are not opaque."""
  if not image.has_transparency_data:
    return False
  if image.mode.startswith('I'):
    return bool((np.asarray(image) == image.info['transparency']).any())
  return _with_alpha(image).getchannel('A').getextrema()[0] < 255


def _with_alpha(image):
  """A PIL image with transparency data as RGBA."""
  key = image.info.get('transparency')
  if image.mode == 'RGB' and isinstance(key, tuple) and max(key) > 255:
    # Of a PNG with 16 bits, of which Pillow keeps the upper 8.
    image = image.copy()
    image.info['transparency'] = tuple(k >> 8 for k in key)
  if image.mode == 'La':
    image = image.convert('LA')
  return image.convert('RGBA')


class _Kind(Exception):
  """What a file is instead of an image."""


@contextlib.contextmanager
def readable(name):
  """Turns whatever Pillow raises on a file into a UserError that names it."""
  try:
    yield
  except (FileNotFoundError, IsADirectoryError) as e:
    raise errors.UserError(f'no image file {str(name)!r}') from e
  except _Kind as e:
    raise errors.UserError(f'{str(name)!r} is {e}') from e
  except Image.UnidentifiedImageError as e:
    raise errors.UserError(f'{str(name)!r} is not an image') from e
  except Exception as e:  # pylint: disable=broad-except
    # OSError where pixels are cut off, but struct.error, SyntaxError,
    # TypeError and others where a header is broken.
    raise errors.UserError(f'{str(name)!r} is not a readable image: {e}'
                           ) from e
