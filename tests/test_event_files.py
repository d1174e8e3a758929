"""TensorBoard's files: closed every few minutes, and joined again."""
import time

from PIL import Image
from tensorboard.backend.event_processing import directory_watcher
from tensorboard.backend.event_processing import event_file_loader

from e2e_vlp_jax.training import event_files
from e2e_vlp_jax.training import monitor as monitor_lib


def steps(folder, names=None):
  """The steps that a reader of `folder` finds.

  Sorted: files of the same second are numbered, and read in the order of their
  names, '10' before '9'.
  """
  watcher = directory_watcher.DirectoryWatcher(
      str(folder), event_file_loader.EventFileLoader,
      lambda path: names is None or path.rpartition('/')[2] in names)
  return sorted(e.step for e in watcher.Load() if e.HasField('summary'))


def test_closed_files_show_what_was_written_minutes_ago(tmp_path, monkeypatch):
  clock = [0.]
  monkeypatch.setattr(time, 'monotonic', lambda: clock[0])
  files = []
  with monitor_lib.Monitor(str(tmp_path), 9) as monitor:
    for step in range(1, 7):
      clock[0] += event_files.SECONDS_OF_A_FILE / 2 + 1
      monitor.write(step, {'train/loss': 1. / step})
      found = {p.name for p in tmp_path.glob('events*')}
      files += sorted(found - set(files))
    assert len(files) == 3
    # All but the file that is open: a mounted bucket shows these.
    assert steps(tmp_path, files[:-1]) == [1, 2, 3, 4]
    monitor.evaluated(7, {}, {'sample': Image.new('RGB', (4, 4))})
  assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
