"""Errors that a user can fix: one readable line and exit code 2."""
import contextlib
import difflib
import errno
import sys

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
  """A request of the user that cannot be carried out.

  The message is one line that names the key or file, the value found, the
  value expected and the nearest valid choice. Entry points print it and exit
  with code 2 (`exit_on_user_error`); library callers catch it.
  """


def nearest(word, choices):
  """Suggests valid choices for an unknown `word`, to end an error message.

  Returns:
    "; did you mean 'x'?" if one of `choices` is close to `word`. Otherwise
    '; valid choices: x, y', or '' if there are more than 12 choices.
  """
  choices = [str(c) for c in choices]
  close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
  if close:
    return f'; did you mean {close[0]!r}?'
  if len(choices) <= 12:
    return f'; valid choices: {", ".join(choices)}'
  return ''


@contextlib.contextmanager
def exit_on_user_error():
  """Turns a `UserError` raised inside into one line on stderr and exit 2.

  A full disk is reported as a user error too.
  """
  try:
    yield
  except (UserError, OSError) as e:
    if isinstance(e, OSError):
      if e.errno not in _NO_ROOM:
        raise
      e = f'{e.filename or "a file"}: cannot be written: {e.strerror}'
    message = ' '.join(str(e).split())
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
