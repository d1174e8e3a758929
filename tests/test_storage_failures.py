"""Whose turn it is when a disk, file server or bucket fails: exit 2 or 75."""
import errno
import os

import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.storage import failures
from tests import small_run


def of_errno(number):
  return OSError(number, os.strerror(number))


class HttpError(Exception):
  """As gcsfs raises it."""

  def __init__(self, code, text):
    super().__init__(text)
    self.code = code


MISTAKES = [
    (of_errno(errno.ENOSPC), 'No space left'),
    (of_errno(errno.EACCES), 'Permission denied'),
    (of_errno(errno.EROFS), 'Read-only'),
    (of_errno(errno.EDQUOT), 'quota'),
    (ValueError('PERMISSION_DENIED: Error writing "x" [http_response_code='
                '"403"]'), 'Permission denied'),
    (OSError('Forbidden: https://storage.googleapis.com/b/o\nx does not have '
             'storage.objects.create access'), 'Permission denied'),
    (ValueError(f'OUT_OF_RANGE: Error writing "{"x" * 300}": Failed to write '
                "25289 bytes: File too large [os_error_code='27']"),
     'File too large'),
    (HttpError(401, 'Invalid'), 'auth application-default login'),
    (HttpError(403, 'no'), 'Permission denied'),
    (Exception('Reauthentication is needed. Please run `gcloud auth`'),
     'they have expired'),
    (OSError('The specified bucket does not exist.'), 'no such bucket')]
PASSING = [
    of_errno(errno.EIO), of_errno(errno.ETIMEDOUT), of_errno(errno.ENOTCONN),
    ValueError('UNAVAILABLE: Error reading, HTTP response code: 503'),
    ValueError('DEADLINE_EXCEEDED: Barrier timed out. Id: save.4'),
    ConnectionResetError(errno.ECONNRESET, 'reset'), HttpError(503, 'busy')]


@pytest.mark.parametrize('error, says', MISTAKES, ids=str)
def test_a_person_has_to_act(error, says):
  found = failures.of(error, 'cannot save in /w', '; mend it')
  assert isinstance(found, errors.UserError)
  assert str(found).startswith('cannot save in /w: ')
  assert says in str(found) and str(found).endswith('; mend it')


@pytest.mark.parametrize('error', PASSING, ids=str)
def test_it_may_pass(error):
  assert isinstance(failures.of(error, 'cannot save'), errors.TryAgain)


def test_other_errors_are_not_touched():
  """A step's number is no code of HTTP."""
  for error in (ValueError('checkpoint 403: shapes differ'), KeyError('503')):
    assert failures.of(error, 'cannot save') is None


@pytest.mark.parametrize('error, code, line', [
    (errors.UserError('a'), 2, 'error: a\n'),
    (errors.TryAgain('a'), 75, 'error: a; start the same command again\n'),
    (OSError(errno.EIO, 'Input/output error', '/mnt/x'), 75,
     'error: /mnt/x: Input/output error; start the same command again\n'),
    (OSError(errno.ENOSPC, 'No space left on device', '/x'), 2,
     'error: /x: cannot be written: No space left on device\n')], ids=str)
def test_exit_codes(error, code, line, capsys):
  with pytest.raises(SystemExit) as e, errors.exit_on_user_error():
    raise error
  assert e.value.code == code and capsys.readouterr().err == line
  with pytest.raises(FileNotFoundError), errors.exit_on_user_error():
    open('no/such/file', encoding='utf-8')


def test_a_disk_that_fails_ends_a_run_with_75(tiny_scenes, tmp_path, capsys,
                                              monkeypatch):
  """While a checkpoint is saved, in the background."""
  from orbax.checkpoint._src.path import async_path

  from e2e_vlp_jax import train

  async def fail(*unused):
    raise of_errno(errno.EIO)
  monkeypatch.setattr(async_path, 'rename', fail)
  with pytest.raises(SystemExit) as e:
    train.main(['--config', small_run.__file__ + ':light', '--workdir',
                str(tmp_path / 'w'), f'--config.data.dir={tiny_scenes}'])
  assert e.value.code == 75
  said = [x for x in capsys.readouterr().err.splitlines()
          if x.startswith('error: ')]
  assert len(said) == 1 and 'Input/output error' in said[0]
