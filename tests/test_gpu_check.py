"""The GPU check goes on when a part fails or hangs; its parts run on a CPU."""
import json

from tests import gpu_check


def test_a_part_that_hangs_is_reported_and_the_others_run(
    monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(gpu_check, '_LIMITS',
                      {'numbers_soho': .1, 'assignment': 300})
  out = tmp_path / 'report.json'
  assert gpu_check.main(['--parts', 'numbers_soho,assignment', '--json',
                         str(out)]) == 1
  report = json.loads(out.read_text())
  assert report['numbers_soho']['error'] == 'no answer within 0.1 s'
  assert report['assignment']['ok']
  assert report['assignment']['problems'] == 500
  assert report['assignment']['worst_relative_cost'] <= 1e-6
  table = capsys.readouterr().out
  assert '| numbers_soho | FAILED: **no answer within 0.1 s**' in table
  assert '| assignment | 500 problems' in table
