"""`prepare` that is killed, or run twice at once: the same records."""
import io
import json
import random
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from tests import conftest
from tests import kill_prepare


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What tests/kill_prepare.py prints."""
  folder = tmp_path_factory.mktemp('killed')
  source = folder / 'source'
  source.mkdir()
  rng = np.random.default_rng(0)
  rows = []
  for i in range(200):
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).save(
        out, 'JPEG')
    (source / f'{i}.jpg').write_bytes(out.getvalue())
    rows.append(json.dumps(dict(image=f'{i}.jpg', text=f'image {i}')))
  (source / 't.jsonl').write_text('\n'.join(rows))
  seed = random.randrange(1 << 30)
  print('seed', seed)
  done = subprocess.run(
      [sys.executable, '-m', 'tests.kill_prepare', str(source), str(folder),
       str(seed)], capture_output=True, text=True, timeout=600, check=False,
      cwd=conftest.REPO)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_the_command_after_a_kill_gives_the_same_records(found):
  assert found['code'] == 0 and found['digest'][1:3] == [200, 200]
  assert found['digest'][3] == ['1.0.0']  # Neither lock nor leftovers.
  print(found['seconds'], [k[:2] for k in found['killed']])
  killed = [k for k in found['killed'] if k[1] == -signal.SIGKILL]
  assert len(killed) >= kill_prepare.TRIALS // 2 + 4
  for moment, _, code, digest in found['killed']:
    assert (code, digest) == (0, found['digest']), moment


def test_two_at_once(found):
  two = found['two']
  assert two['second'] == 2 and len(two['said']) == 1
  assert f'pairs is in use by process {two["pid"]} on' in two['said'][0]
  assert two['first'] == two['third'] == 0
  assert two['digest'] == found['digest']
