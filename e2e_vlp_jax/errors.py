"""Errors of which a person gets one readable line, and their exit codes."""
import contextlib
import difflib
import errno
import sys

EXIT_MISTAKE = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h; launchers start the run again
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of disks and file servers that may work again the next time.
_PASSES = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN,
           errno.EREMOTEIO, errno.EHOSTUNREACH, errno.EHOSTDOWN,
           errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNREFUSED)


class UserError(Exception):
  """A request of the user that cannot be carried out.

  The message is one line that names the key or file, the value found, the
  value expected and the nearest valid choice. Entry points print it and exit
  with code 2 (`exit_on_user_error`); library callers catch it.
  """


class TryAgain(Exception):
  """What nobody has to mend: the same command may work when started again.

  A time-out, say, or an error of a disk or file server. The message is one
  line; entry points end with exit code 75.
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
def exit_on_user_error(leave=sys.exit):
  """Turns a `UserError` raised inside into one line on stderr and exit 2.

  A full disk is reported as a user error too. A `TryAgain`, or an error of a
  disk or file server that may pass, becomes a line and exit code 75.

  Args:
    leave: ends the process with the exit code that it is given.
  """
  try:
    yield
    return
  except UserError as e:
    said, code = e, EXIT_MISTAKE
  except TryAgain as e:
    said, code = e, EXIT_TRY_AGAIN
  except OSError as e:
    if e.errno not in _NO_ROOM + _PASSES:
      raise
    said, code = ((f'{e.filename or "a file"}: cannot be written: '
                   f'{e.strerror}', EXIT_MISTAKE) if e.errno in _NO_ROOM else
                  (f'{e.filename or "a file"}: {e.strerror}', EXIT_TRY_AGAIN))
  print(f'error: {" ".join(str(said).split())}'
        + ('; start the same command again' if code == EXIT_TRY_AGAIN else ''),
        file=sys.stderr)
  leave(code)
