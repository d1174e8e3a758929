"""Finds images of official datasets in folders or zip files and checks them."""
import collections
import functools
import io
import multiprocessing.pool
import os
import threading
import zipfile

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data.datasets import file_names

# What Python can decompress.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA)

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
_QUARTERS = (5, 6, 7, 8)  # those that exchange height and width
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
      UserError: none of the folders exists, or a zip file cannot be read.
    """
    self._places, self._names = [], file_names.Names(())
    for folder in folders:
      path = os.path.join(source, folder)
      if os.path.isdir(path):
        self._places.append(_Folder(path))
      if os.path.isfile(path + '.zip'):
        self._places.append(_Zip(path + '.zip'))
    if not self._places:
      raise errors.UserError(
          f'no images in {source!r}: expected '
          + ' or '.join(f'{f}/ or {f}.zip' for f in folders))

  def has(self, name):
    """Whether a file has exactly this name."""
    return any(place.has(name) for place in self._places)

  def read(self, name):
    """(the bytes of a file, whether it was found under a similar name).

    Raises:
      UserError: the file is missing or cannot be read.
    """
    for similar, find in ((False, file_names.exact), (True, self._similar)):
      for place in self._places:
        path = find(place, name)
        if path is not None:
          try:
            return place.read(path), similar
          except Exception as e:  # pylint: disable=broad-except
            # zlib.error, EOFError, struct.error and others in a damaged zip.
            raise errors.UserError(f'{name} cannot be read: {e}') from e
    raise errors.UserError('no such image file')

  def _similar(self, place, name):
    return file_names.similar(place, name, self._names)

  def load_all(self, names, known=None):
    """Yields `Stored` or the UserError for each name, in order.

    Args:
      names: list of names.
      known: all names of the annotations, `names` by default: a file that two
        of them could mean is found by neither, unless it has exactly the name.
    """
    self._names = file_names.Names(names if known is None else known)
    return load_all(names, self.read)


class _Folder:
  """Images in a folder and the folders below it."""

  def __init__(self, path):
    self._path = path

  def has(self, name):
    try:
      return os.path.isfile(os.path.join(self._path, name))
    except ValueError:  # It holds a null character, or half of one.
      return False

  @functools.cached_property
  def tree(self):
    """All files, as a `file_names.Tree`; listed when a name is missing."""
    return file_names.Tree(
        os.path.relpath(os.path.join(folder, n), self._path)
        for folder, _, names in sorted(os.walk(self._path)) for n in names)

  def read(self, name):
    with open(os.path.join(self._path, name), 'rb') as f:
      return f.read()


class _Zip:
  """Images in a zip file."""

  def __init__(self, path):
    try:
      # pylint: disable-next=consider-using-with
      self._archive = zipfile.ZipFile(path)
      members = [i for i in self._archive.infolist() if not i.is_dir()]
    except Exception as e:  # pylint: disable=broad-except
      # BadZipFile, but also NotImplementedError, struct.error and others.
      raise errors.UserError(f'{path}: {e}') from e
    self._lock = threading.Lock()
    for i in members:
      why = ('it is encrypted' if i.flag_bits & 1 else
             '' if i.compress_type in _METHODS else
             f'compression method {i.compress_type}'
             + ' (Deflate64)' * (i.compress_type == 9))
      if why:
        raise errors.UserError(f'{path}: {i.filename!r} cannot be read: {why}; '
                               'unpack the file')
    self._paths = {_member_name(i): i for i in members}
    # The same without a top folder, unless two become one.
    inner = collections.Counter(n.partition('/')[2] for n in self._paths)
    self._members = {
        **{m: i for n, i in self._paths.items()
           if inner[m := n.partition('/')[2]] == 1}, **self._paths}

  def has(self, name):
    return name in self._members

  @functools.cached_property
  def tree(self):
    return file_names.Tree(self._paths)

  def read(self, name):
    with self._lock:
      return self._archive.read(self._members[name])


def _member_name(info):
  """The name of a zip's member; Python takes names without a flag for cp437.

  Most tools write UTF-8 in any case.
  """
  if info.flag_bits & 0x800:
    return info.filename
  try:
    return info.filename.encode('cp437').decode()
  except UnicodeError:
    return info.filename


def load_all(names, read):
  """Yields `Stored` or the UserError for each name, in order.

  Decodes on all cores, at most 64 images ahead.

  Args:
    names: list of names.
    read: function from a name to (encoded bytes, whether they were found under
      a similar name); may raise UserError. Called from several threads.
  """
  def load(name):
    try:
      data, similar = read(name)
      stored = storable(data, name)
    except errors.UserError as e:
      return e
    stored.renamed = similar
    return stored
  with multiprocessing.pool.ThreadPool() as pool:
    for k in range(0, len(names), 64):
      yield from pool.map(load, names[k:k + 64])


class Stored:
  """An image as it is stored: upright, RGB, 8 bit.

  Attributes:
    data: encoded bytes; the original ones unless they had to change.
    height, width: size of the upright picture.
    changed: why the image was encoded again, or ''.
    renamed: whether its file has not quite the name of the annotations.
  """
  renamed = False

  def __init__(self, data, size, orientation, changed):
    self.data, (self.width, self.height) = data, size
    self._orientation, self.changed = orientation, changed

  @property
  def size_in_file(self):
    """(height, width) of the pixels as the file stores them."""
    size = self.height, self.width
    return size[::-1] if self._orientation in _QUARTERS else size

  def frame(self, height, width, upright=False):
    """Where the pixels lie that the annotations of this image refer to.

    The annotations' height and width show which pixels they refer to: a box is
    turned with the picture unless that size is already upright. Where both
    sizes fit (a square, or no quarter turn), boxes are taken to refer to the
    pixels as stored, as in COCO's tools.

    Args:
      height, width: the image's size according to the annotations.
      upright: whether boxes refer to the upright picture in any case, as most
        labelling tools show it: no box is turned. A box at a quarter of the
        annotations' width is at a quarter of the upright picture's, even where
        that width is one of the stored pixels (as Label Studio writes it).

    Returns:
      A `Frame`, or None if the aspect ratios differ.
    """
    if _same_shape(self.size_in_file, (height, width)):
      return Frame(height, width, 1 if upright else self._orientation)
    if _same_shape((self.height, self.width), (height, width)):
      return Frame(height, width, drawn_upright=True)
    return None


class Frame:
  """The image that boxes refer to.

  Attributes:
    turns: whether it is turned to become the upright picture.
    drawn_upright: whether its size shows that it is the upright picture of a
      file whose pixels lie on their side.
  """

  def __init__(self, height, width, orientation=1, drawn_upright=False):
    self.drawn_upright = drawn_upright
    self._height, self._width = height, width
    self._turn = _TURNS.get(orientation, lambda x, y: (x, y))
    self.turns = orientation in _TURNS

  def clip(self, x0, y0, x1, y1):
    """The part of a box, in pixels, that lies in the image."""
    return (max(x0, 0), max(y0, 0), min(x1, self._width),
            min(y1, self._height))

  def place(self, x0, y0, x1, y1):
    """A box in pixels -> (x0, y0, x1, y1) in [0, 1] of the upright picture."""
    (xa, ya), (xb, yb) = (
        self._turn(x0 / self._width, y0 / self._height),
        self._turn(x1 / self._width, y1 / self._height))
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)


def storable(data, name):
  """Decodes an image and rewrites its bytes where needed; returns a `Stored`.

  Raises:
    UserError: the bytes are not a complete image.
  """
  with photographs.readable(name), photographs.opened(data) as image:
    image.load()
    orientation = image.getexif().get(_ORIENTATION, 1)
    changed = []
    if image.format not in ('JPEG', 'MPO', 'PNG'):
      changed.append(f'{image.format} format')
    if image.mode != 'RGB':
      changed.append(f'mode {image.mode}')
    elif image.format == 'PNG' and data[24] > 8:    # bit depth, in IHDR
      changed.append(f'{data[24]} bits')
    if photographs.transparent(image):
      changed.append('transparency, drawn on white')
    if getattr(image, 'is_animated', False) and image.format != 'MPO':
      changed.append('the first of several images')
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
