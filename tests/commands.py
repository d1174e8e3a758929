"""Calls commands in this process."""
import pytest


def refused(main, *argv, capsys):
  """The one line with which a command's `main` refuses its arguments."""
  with pytest.raises(SystemExit) as e:
    main(list(argv))
  assert e.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1, said
  return said.strip()
