"""The one door for values of annotations: each is read by its type.

Annotation files come from many tools. A number may be written as text, a flag
as "0", a caption may be NaN, and half of an emoji may end a text. Every
function takes a value as json gave it and says what it means, or raises
`Wrong`. A builder ends with that error where an entry cannot do without the
value (the id of an image), and otherwise leaves the entry out and counts it
under `Wrong.reason` (the box of an object).

| | is read | is wrong |
|---|---|---|
| number | 3, 3.5, '3.5' | true, '', '3,5', NaN, infinity, None, lists |
| integer | 3, 3.0, '3' | 3.5, and what is no number |
| identity | a whole number; other text, such as 'a7' | '', and the rest |
| flag | true, 0, 1, '0', 'false', 'No' | 2, 'maybe', '', None |
| text | any text; half a character becomes U+FFFD | numbers, None, lists |
| texts | a text, or those in a list | no text at all |
| box | four numbers | fewer or more, and what is no list |

An absent value is for the caller to decide on: None is wrong for all of them.
"""
import json
import math
import re

from e2e_vlp_jax import errors

HALF = 'text with half a character, which became U+FFFD'
NO_TEXT = 'list of texts with an item that is no text, left out'
# Plain decimal numbers: not 'nan', '1_000' or digits of other scripts, which
# Python's float() reads too.
_NUMBER = re.compile(r'\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*', re.ASCII)
_WHOLE = re.compile(r'\s*[+-]?\d{1,30}\s*', re.ASCII)
_FLAGS = {'0': False, 'false': False, 'no': False,
          '1': True, 'true': True, 'yes': True}
INT64 = 1 << 63


class Wrong(errors.UserError):
  """A value that is not of the type of its field.

  Attributes:
    reason: the field and what was expected, without the value: equal for all
      values that are wrong in the same way, so that they can be counted.
    found: the value, short enough to be printed.
  """

  def __init__(self, value, where, expected):
    self.found = show(value)
    self.reason = f'{where.rpartition(".")[2]} is not {expected}'
    super().__init__(f'{where} is {self.found}; expected {expected}')


def field(read, entry, key, where, *args):
  """`read` of a key of an object that must have it; see `number`.

  Args:
    read: a function of this module.
    entry: dict.
    key: its key.
    where: the file and entry, such as 'f.json: images[3]'.
    *args: of `read`, after `where`.
  """
  if key not in entry:
    raise errors.UserError(f'{where} has no {key!r}')
  return read(entry[key], f'{where}.{key}', *args)


def show(value):
  """The value for a message: on one line, printable, and not long."""
  # Not the whole of a list of millions.
  text = repr(value[:99] if isinstance(value, (str, bytes, list)) else value)
  return text if len(text) <= 60 else text[:57] + '...'


def number(value, where, expected='a number'):
  """A finite float.

  Args:
    value: as json gave it.
    where: the file, entry and key, such as 'f.json: annotations[3].area'.
    expected: what a message says that it should be.

  Raises:
    Wrong: it is no number.
  """
  found = math.nan
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    try:
      found = float(value)
    except OverflowError:
      pass
  elif isinstance(value, str) and _NUMBER.fullmatch(value):
    found = float(value)
  if not math.isfinite(found):
    raise Wrong(value, where, expected)
  return found


def positive(value, where):
  """A finite float above 0; see `number`."""
  found = number(value, where, 'a positive number')
  if found <= 0:
    raise Wrong(value, where, 'a positive number')
  return found


def integer(value, where, least=-INT64):
  """A whole number of 64 bits, `least` or more; see `number`."""
  expected = ('a positive whole number' if least == 1 else
              'a whole number' if least < 0 else
              f'a whole number, {least} or more')
  if isinstance(value, str) and _WHOLE.fullmatch(value):
    found = int(value)
  elif isinstance(value, int) and not isinstance(value, bool):
    found = value
  else:
    found = number(value, where, expected)
    if found != int(found):
      raise Wrong(value, where, expected)
    found = int(found)
  if not max(least, -INT64) <= found < INT64:
    raise Wrong(value, where, expected)
  return found


def identity(value, where):
  """An id: a whole number, or any other text; see `number`."""
  if isinstance(value, str) and not _WHOLE.fullmatch(value):
    if value.strip():
      return text(value, where)
    raise Wrong(value, where, 'a whole number or text')
  return integer(value, where)


def flag(value, where):
  """True or False; see `number`."""
  if isinstance(value, str):
    found = _FLAGS.get(value.strip().lower())
  else:  # 0, 1, 0.0, 1.0, False, True
    found = {0: False, 1: True}.get(value) if isinstance(
        value, (bool, int, float)) else None
  if found is None:
    raise Wrong(value, where, 'true or false')
  return found


def text(value, where, note=None):
  """A str that UTF-8 can hold; see `number`.

  Args:
    value, where: see `number`.
    note: function that is told if the text had to be changed, in words for a
      report (`HALF`).
  """
  if not isinstance(value, str):
    raise Wrong(value, where, 'text')
  if value.isascii():
    return value
  whole = value.encode('utf-16-le', 'surrogatepass').decode('utf-16-le',
                                                            'replace')
  if whole != value and note:
    note(HALF)
  return whole


def texts(value, where, note=None):
  """A text or a list with texts, as a list; see `text`.

  `note` is told of every item that is no text (`NO_TEXT`).
  """
  if not isinstance(value, list):
    return [text(value, where, note)]
  found = [text(v, where, note) for v in value if isinstance(v, str)]
  if not found:
    raise Wrong(value, where, 'text')
  for _ in range((len(value) - len(found)) if note else 0):
    note(NO_TEXT)
  return found


def box(value, where):
  """Four finite numbers, as a tuple of floats; see `number`."""
  expected = 'four finite numbers'
  if not isinstance(value, (list, tuple)) or len(value) != 4:
    raise Wrong(value, where, expected)
  try:
    return tuple(number(v, where) for v in value)
  except Wrong as e:
    raise Wrong(value, where, expected) from e


def load_json(path, hook=None):
  """The content of a JSON file in UTF-8, with or without a byte-order mark.

  Args:
    path: of the file.
    hook: json's `object_hook`.

  Raises:
    UserError: no such file, or it is not readable JSON.
  """
  try:
    with open(path, encoding='utf-8-sig') as f:
      return json.load(f, object_hook=hook)
  except FileNotFoundError as e:
    raise errors.UserError(f'no annotation file {path}') from e
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f'{path} is not readable JSON: {e}') from e


def objects(value, where):
  """A list of JSON objects.

  Raises:
    UserError: it is something else; names its first item that is no object.
  """
  if not isinstance(value, list):
    raise Wrong(value, where, 'a list')
  for k, item in enumerate(value):
    if not isinstance(item, dict):
      raise Wrong(item, f'{where}[{k}]', 'an object')
  return value


def unique(entries, key, where, read):
  """{id: entry} of a list of objects whose ids must be unique.

  Entries that are equal in all keys are taken as one.

  Args:
    entries: list of dicts.
    key: their key, such as 'id'.
    where: the file and its list, such as 'f.json: images'.
    read: function (value, where) that reads the id, such as `integer`.

  Raises:
    UserError: an id cannot be read, or two different entries have it.
  """
  found, places = {}, {}
  for k, entry in enumerate(entries):
    i = field(read, entry, key, f'{where}[{k}]')
    if i not in found:
      found[i], places[i] = entry, k
    elif found[i] != entry:
      raise errors.UserError(
          f'{where}[{places[i]}] and [{k}] have the same {key} {i!r}, but '
          f'differ: {_difference(found[i], entry)}; expected each {key} once')
  return found


def _difference(a, b):
  """'file_name 'a.png' and 'b.png'': where two objects differ first."""
  # A name says more than a number.
  keys = sorted(a.keys() | b.keys(), key=lambda k: ('name' not in k, k))
  key = next(k for k in keys if a.get(k) != b.get(k) or (k in a) != (k in b))
  return f'{key} {show(a.get(key))} and {show(b.get(key))}'
