"""Calls commands in this process."""
import pytest


def refused(main, *argv, capsys):
  """The one line with which a command's `main` refuses its arguments."""
  with pytest.raises(SystemExit) as e:
    main(list(argv))
  assert e.value.code == 2
  line = capsys.readouterr().err.strip()
  assert '\n' not in line
  return line
