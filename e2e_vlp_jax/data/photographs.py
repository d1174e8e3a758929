"""Decodes photographs of any kind to upright RGB pixels."""
import contextlib
import io
import os

import numpy as np
from PIL import Image, ImageOps

from e2e_vlp_jax import errors


def decode_image(source, name=None):
  """Decodes any photograph to uint8 [H, W, 3]: upright, RGB, 8 bit.

  Grey, CMYK, palette, alpha (dropped) and 16-bit images are converted, and
  the EXIF orientation is applied.

  Args:
    source: encoded bytes, or a path.
    name: name of the image in errors; the path by default.

  Raises:
    UserError: no such file, or it is truncated or not an image; names it.
  """
  with readable(name or (source if isinstance(source, (str, os.PathLike))
                         else 'image')):
    if isinstance(source, bytes):
      source = io.BytesIO(source)
    with Image.open(source) as image:
      return np.asarray(upright(image))


def upright(image):
  """A PIL image as RGB, 8 bit, its EXIF orientation applied."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):
    # 16 bits of grey: Pillow's own conversion would clip at 255.
    grey = np.asarray(image, np.float64) * (255 / 65535)
    image = Image.fromarray(np.uint8(np.clip(np.rint(grey), 0, 255)))
  return image.convert('RGB')


@contextlib.contextmanager
def readable(name):
  """Turns whatever Pillow raises on a file into a UserError that names it."""
  try:
    yield
  except (FileNotFoundError, IsADirectoryError) as e:
    raise errors.UserError(f'no image file {str(name)!r}') from e
  except Image.UnidentifiedImageError as e:
    raise errors.UserError(f'{str(name)!r} is not an image') from e
  except Exception as e:  # pylint: disable=broad-except
    # OSError where pixels are cut off, but struct.error, SyntaxError,
    # TypeError and others where a header is broken.
    raise errors.UserError(f'{str(name)!r} is not a readable image: {e}'
                           ) from e
