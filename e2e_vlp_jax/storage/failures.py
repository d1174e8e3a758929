"""Failures of disks, file servers and buckets, and who has to act.

Orbax, tensorstore and gcsfs raise many classes; what they say decides. Needs
neither jax nor TensorFlow.
"""
import errno
import re

from e2e_vlp_jax import errors

_MISTAKES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM,
             errno.EROFS)
# What a person has to mend, in the words of the operating system and of
# Google's libraries, and how we say it; the first that fits counts.
_MEND = (
    ('No space left on device', 'No space left on device'),
    ('File too large', 'File too large'),
    ('Disk quota exceeded', 'Disk quota exceeded'),
    ('Read-only file system', 'Read-only file system'),
    ('credential|UNAUTHENTICATED|Unauthorized|reauth|invalid_grant|Anonymous '
     'caller|code:? 401', 'no credentials, or they have expired: gcloud auth '
     'application-default login'),
    ('Project was not passed', 'no project: export GOOGLE_CLOUD_PROJECT=NAME'),
    ('bucket does not exist|bucket_not_found|NoSuchBucket|specified bucket',
     'no such bucket'),
    ('PERMISSION_DENIED|Permission denied|Forbidden|code:? 403',
     'Permission denied'),
)
# What may pass by itself.
_PASSES = ('Input/output error|Stale file handle|not connected|timed out'
           '|timeout|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED'
           '|Connection|Cannot connect|Temporary failure'
           '|code:? (408|429|5..)')
_LONGEST = 200  # characters of another library's message


def of(error, what, after=''):
  """`error` as the exception that says who has to act; None if it is another.

  Args:
    error: an exception of any class.
    what: beginning of the message: what could not be done, and where.
    after: end of the message, for a person who has to act.

  Returns:
    `errors.UserError`; `errors.TryAgain` if it may work the next time; or None
    if `error` does not look like a failure of storage.
  """
  text = ' '.join(str(error).split())  # Long, with the cause at its end.
  if isinstance(getattr(error, 'code', None), int):  # of HTTP, from gcsfs
    text += f' (code {error.code})'
  number = error.errno if isinstance(error, OSError) else None
  if number in _MISTAKES:
    return errors.UserError(f'{what}: {error.strerror}{after}')
  for pattern, ours in _MEND:
    if re.search(pattern, text, re.IGNORECASE):
      return errors.UserError(f'{what}: {ours}{after}')
  if isinstance(error, OSError) or re.search(_PASSES, text):
    return errors.TryAgain(f'{what}: {said(error)}')
  return None


def said(error):
  """What an error says, in one line that is not too long."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= _LONGEST else text[:_LONGEST] + '...'
