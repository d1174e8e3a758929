"""Finds files whose names in the annotations are not quite those on the disk.

Labelling tools write names percent-encoded, with backslashes, or with folders
in front that are gone; macOS writes accents as two characters where others
write one; a download may lie in folders below. A file is taken for the one that
is meant only if it is the only one that can be, and no other name of the
annotations can mean it.

A place (`image_files`) has `has(name)` and `tree`, a `Tree` of its files.
"""
import collections
import functools
import unicodedata
import urllib.parse


def exact(place, name):
  """The name, if `place` has exactly this file, else None."""
  return name if place.has(name) else None


def similar(place, name, names):
  """The path of the file in `place` that `name` must mean, or None.

  In this order: with / for backslashes, percent-decoded, both; then the file
  below the place whose path ends like the name, in any Unicode form and with
  small or capital letters.

  Args:
    place: see above.
    name: file name of the annotations, which `place` does not have.
    names: `Names`, all names of the annotations.
  """
  forms = list(dict.fromkeys((name.replace('\\', '/'),
                              urllib.parse.unquote(name),
                              urllib.parse.unquote(name).replace('\\', '/'))))
  for form in forms:
    if place.has(form) and names.alone(_parts(form)):
      return form
  for form in forms:
    path = place.tree.find(form, names)
    if path is not None:
      return path
  return None


class Names:
  """All names of the annotations, to see whether two could mean one file."""

  def __init__(self, names):
    self._names = names

  def alone(self, parts):
    """Whether only one name has these `_parts`, all of them."""
    return self._whole[tuple(parts)] == 1

  def alone_with_end(self, part):
    """Whether only one name has this last part."""
    return self._ends[part] == 1

  @functools.cached_property
  def _whole(self):
    return collections.Counter(tuple(_parts(urllib.parse.unquote(n)))
                               for n in set(self._names))

  @functools.cached_property
  def _ends(self):
    found = collections.Counter()
    for parts, count in self._whole.items():
      found[parts[-1:] and parts[-1]] += count
    return found


class Tree:
  """Paths of files by their last part."""

  def __init__(self, paths):
    self._paths = collections.defaultdict(dict)
    for path in paths:
      parts = _parts(path)
      if parts:
        self._paths[parts[-1]][path] = parts

  def find(self, name, names):
    """The only path whose end agrees best with `name`, or None.

    Where the folders of the name are not those of the path, no other name
    may end in the same way: camera1/0.jpg is not camera2/0.jpg.
    """
    parts = _parts(name)
    if not parts:
      return None
    found = {path: _agreement(parts, other)
             for path, other in self._paths.get(parts[-1], {}).items()}
    best = [p for p, n in found.items() if n == max(found.values())]
    if len(best) != 1:
      return None
    alone = (names.alone(parts) if found[best[0]] == len(parts) else
             names.alone_with_end(parts[-1]))
    return best[0] if alone else None


def _parts(path):
  """The parts of a path in a form that is equal for names that look equal."""
  plain = unicodedata.normalize('NFC', path).casefold().replace('\\', '/')
  return [p for p in plain.split('/') if p not in ('', '.', '..')]


def _agreement(a, b):
  """How many parts at the end of two paths agree."""
  count = 0
  for x, y in zip(reversed(a), reversed(b)):
    if x != y:
      break
    count += 1
  return count
