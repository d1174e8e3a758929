"""Finds images of official datasets in folders or zip files and checks them."""
import io
import multiprocessing.pool
import os
import threading
import zipfile

from PIL import Image

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import photographs

# EXIF orientation -> function that maps a point (x, y) of the stored pixels to
# the upright picture, both in [0, 1].
_TURNS = {
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x)}
_ORIENTATION = 0x0112


class ImageFiles:
  """Reads images by name from the first folder or zip file that has them."""

  def __init__(self, source, folders):
    """Looks for `folders` under `source`, as folders and as zip files.

    Args:
      source: a folder.
      folders: e.g. ['train2017', 'images/train2017']. The files of a zip may
        be in one top-level folder.

    Raises:
      UserError: none of the folders exists.
    """
    self._places = []
    for folder in folders:
      path = os.path.join(source, folder)
      if os.path.isdir(path):
        self._places.append((path, None, None))
      if os.path.isfile(path + '.zip'):
        try:
          archive = zipfile.ZipFile(path + '.zip')
        except (zipfile.BadZipFile, OSError) as e:
          raise errors.UserError(f'{path}.zip: {e}') from e
        members = archive.namelist()
        self._places.append((path, archive, {
            **{m.partition('/')[2]: m for m in members},
            **{m: m for m in members}}))
    if not self._places:
      raise errors.UserError(
          f'no images in {source!r}: expected '
          + ' or '.join(f'{f}/ or {f}.zip' for f in folders))
    self._lock = threading.Lock()

  def read(self, name):
    """The bytes of a file.

    Raises:
      UserError: the file is missing or cannot be read.
    """
    for path, archive, members in self._places:
      try:
        if archive is None:
          full = os.path.join(path, name)
          if os.path.isfile(full):
            with open(full, 'rb') as f:
              return f.read()
        elif name in members:
          with self._lock:
            return archive.read(members[name])
      except (OSError, zipfile.BadZipFile) as e:
        raise errors.UserError(f'{name} cannot be read: {e}') from e
    raise errors.UserError('no such image file')

  def load_all(self, names):
    """Yields `Stored` or the UserError for each name, in order."""
    return load_all(names, self.read)


def load_all(names, read):
  """Yields `Stored` or the UserError for each name, in order.

  Decodes on all cores, at most 64 images ahead.

  Args:
    names: list of names.
    read: function from a name to encoded bytes; may raise UserError. Called
      from several threads.
  """
  def load(name):
    try:
      return storable(read(name), name)
    except errors.UserError as e:
      return e
  with multiprocessing.pool.ThreadPool() as pool:
    for k in range(0, len(names), 64):
      yield from pool.map(load, names[k:k + 64])


class Stored:
  """An image as it is stored: upright, RGB, 8 bit.

  Attributes:
    data: encoded bytes; the original ones unless they had to change.
    height, width: size of the upright picture.
    changed: why the image was encoded again, or ''.
  """

  def __init__(self, data, size, orientation, changed):
    self.data, (self.width, self.height) = data, size
    self._orientation, self.changed = orientation, changed

  def box(self, x0, y0, x1, y1, height, width):
    """Maps a box of the annotations to the upright picture.

    The annotations' height and width show which pixels they refer to: a box is
    turned with the picture unless that size is already upright. Where both
    sizes fit (a square, or no quarter turn), boxes are taken to refer to the
    pixels as stored, as in COCO's tools.

    Args:
      x0, y0, x1, y1: pixels of an image of this height and width.
      height, width: the image's size according to the annotations.

    Returns:
      (x0, y0, x1, y1) in [0, 1], or None if the aspect ratios differ.
    """
    turn = _TURNS.get(self._orientation, lambda x, y: (x, y))
    quarter = self._orientation in (5, 6, 7, 8)
    stored = ((self.height, self.width) if quarter else
              (self.width, self.height))
    if not _same_shape(stored, (width, height)):
      if not _same_shape((self.width, self.height), (width, height)):
        return None
      turn = lambda x, y: (x, y)
    (xa, ya), (xb, yb) = (turn(x0 / width, y0 / height),
                          turn(x1 / width, y1 / height))
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def storable(data, name):
  """Decodes an image and rewrites its bytes where needed; returns a `Stored`.

  Raises:
    UserError: the bytes are not a complete image.
  """
  with photographs.readable(name):
    image = Image.open(io.BytesIO(data))
    image.load()
    orientation = image.getexif().get(_ORIENTATION, 1)
    changed = []
    if image.format not in ('JPEG', 'MPO', 'PNG'):
      changed.append(f'{image.format} format')
    if image.mode != 'RGB':
      changed.append(f'mode {image.mode}')
    elif image.format == 'PNG' and data[24] > 8:    # bit depth, in IHDR
      changed.append(f'{data[24]} bits')
    if orientation in _TURNS:
      changed.append(f'EXIF orientation {orientation}')
    if not changed:
      return Stored(data, image.size, 1, '')
    upright, out = photographs.upright(image), io.BytesIO()
    if image.format in ('JPEG', 'MPO'):
      upright.save(out, 'JPEG', quality=95, subsampling=0)
    else:
      upright.save(out, 'PNG')
    return Stored(out.getvalue(), upright.size, orientation,
                  ', '.join(changed))


def _same_shape(a, b):
  """Whether two sizes have the same aspect ratio, up to rounding."""
  return abs(a[0] * b[1] - a[1] * b[0]) <= max(*a, *b)
