"""Reads JSON files that are one long list, one item at a time.

Visual Genome's files take gigabytes as Python objects; their items are small.
"""
import codecs
import json
import mmap
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import values

_OPEN, _CLOSE = re.compile(rb'\s*\[\s*'), re.compile(rb'\s*\]')
_COMMA = re.compile(rb'\s*,\s*')
_GUESS = 1 << 16  # bytes to read for an item at first; more if it is longer


class JsonList:
  """Items by id; keeps only their offsets in the file in memory.

  Attributes:
    path: path of the file.
  """

  def __init__(self, path, ids, key=None):
    """Reads the file once to find and check its items.

    Args:
      path: path of a JSON file, a list of objects.
      ids: keys; the first of them that an item has is its id, a number.
      key: key of a list of objects that every item must have, or None.

    Raises:
      UserError: no such file, or it does not contain such a list.
    """
    self.path, self._places = path, {}
    for number, (start, end, item) in enumerate(_items(path)):
      where = f'{path}: item {number}'
      found = [item[k] for k in ids if k in item] if isinstance(
          item, dict) else []
      try:
        i = values.integer(found[0], ids[0])
      except (IndexError, values.Wrong) as e:
        raise errors.UserError(f'{where} has no number {ids[0]!r}; is this an '
                               'official file?') from e
      if key and not (isinstance(item.get(key), list) and all(
          isinstance(x, dict) for x in item[key])):
        raise errors.UserError(f'{where} has no list {key!r} of objects; is '
                               'this an official file?')
      # Items that are equal may stand there twice.
      if i in self._places and self.get(i) != self._read(i, start, end):
        raise errors.UserError(
            f'{path}: item {number} is another item of {ids[0]} {i}, which '
            'must be unique')
      self._places.setdefault(i, (start, end))

  def ids(self):
    """Ids of the items in the order of the file."""
    return self._places.keys()

  def get(self, i, default=None):
    """Item i, or `default`."""
    if i not in self._places:
      return default
    return self._read(i, *self._places[i])

  def _read(self, i, start, end):
    with open(self.path, 'rb') as f:
      f.seek(start)
      try:
        return json.loads(f.read(end - start).decode())
      except (ValueError, RecursionError) as e:
        raise errors.UserError(
            f'{self.path}: item of id {i} cannot be read: {e}') from e


def _items(path):
  """Yields (start, end, item) of the list in a file; offsets in bytes."""
  bad = lambda at, why: errors.UserError(
      f'{path} is not a readable JSON list: byte {at}: {why}')
  try:
    with open(path, 'rb') as f, mmap.mmap(
        f.fileno(), 0, access=mmap.ACCESS_READ) as data:
      mark = _OPEN.match(data, 3 * (data[:3] == codecs.BOM_UTF8))
      if not mark:
        raise bad(0, 'no [')
      closed = _CLOSE.match(data, mark.end())
      while not closed:
        at, size = mark.end(), _GUESS
        while True:
          try:
            # latin-1 has one byte per character, so that `length` is in bytes.
            item, length = json.JSONDecoder().raw_decode(
                data[at:at + size].decode('latin-1'))
            break
          except ValueError as e:
            if at + size >= len(data):
              raise bad(at, e) from e
            size *= 4
        yield at, at + length, item
        mark = _COMMA.match(data, at + length)
        if not mark:
          closed = _CLOSE.match(data, at + length)
          if not closed:
            raise bad(at + length, 'expected , or ]')
      if data[closed.end():].strip():
        raise bad(closed.end(), 'more after the ]')
  except FileNotFoundError as e:
    raise errors.UserError(f'no annotation file {path}') from e
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f'{path} is not readable: {e}') from e
