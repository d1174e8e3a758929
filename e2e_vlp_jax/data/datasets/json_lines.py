"""Reads files of JSON lines: one object on each line."""
import json

from e2e_vlp_jax import errors


def load(path, read, key, kind):
  """The rows of a file, each checked.

  Rows that are equal count once.

  Args:
    path: of the file.
    read: function that makes a dict of a line's object; may raise ValueError,
      KeyError, TypeError, AttributeError or UserError.
    key: key of such a dict by which rows differ.
    kind: what a row is, for messages: 'an NLVR example'.

  Raises:
    UserError: a line that is none, two different rows with the same key, or no
      row at all.
  """
  rows, n = {}, 0
  try:
    with open(path, encoding='utf-8-sig') as f:
      for line in f:
        n += 1
        if line.strip():
          row = read(json.loads(line))
          if rows.setdefault(row[key], row) != row:
            raise ValueError(f'another example has the same {key} '
                             f'{row[key]!r}')
  except (OSError, ValueError, KeyError, TypeError, AttributeError,
          RecursionError, errors.UserError) as e:
    raise errors.UserError(
        f'{path}:{n}: not {kind}: {type(e).__name__} {e}') from e
  if not rows:
    raise errors.UserError(f'{path} is empty')
  return list(rows.values())
