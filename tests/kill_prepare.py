"""Kills `prepare` at random moments and runs two at once; prints JSON.

  python -m tests.kill_prepare SOURCE FOLDER SEED

Run by tests/test_prepare_killed.py in a process of its own: every command is a
process that is forked here, after the imports, which take most of its time.
"""
import contextlib
import json
import os
import pathlib
import random
import signal
import sys
import time

from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import prepare
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data.datasets import image_files

TRIALS = 10


class Trials:
  """One `prepare pairs` command, run in many ways."""

  def __init__(self, source, folder):
    self._source, self._folder = source, folder

  def start(self, name, before=lambda: None):
    """Forks the command; its stderr goes to the file FOLDER/name.err."""
    if pid := os.fork():
      return pid
    code = 1
    try:
      log = open(self._folder / f'{name}.err', 'w', encoding='utf-8')  # pylint: disable=consider-using-with
      os.dup2(log.fileno(), 2)
      os.dup2(log.fileno(), 1)
      before()
      with errors.exit_on_user_error():
        prepare.main(['pairs', '--source', str(self._source), '--data_dir',
                      str(self._folder / name)])
      code = 0
    except SystemExit as e:
      code = e.code
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)

  def run(self, name, before=lambda: None):
    """Exit code of the command, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(
        os.waitpid(self.start(name, before), 0)[1])

  def digest(self, name):
    """What the records, their index and their report say, or None."""
    folder = records.dataset_folder(str(self._folder / name), 'pairs')
    try:
      with open(f'{folder}/{records.REPORT}', encoding='utf-8') as f:
        report = json.load(f)['splits']['train']
    except FileNotFoundError:
      return None
    split = records.open_split(str(self._folder / name), 'pairs', 'train')
    return [report['records_sha256'], len(split), report['texts'],
            sorted(p for p in os.listdir(f'{folder}/..'))]

  def error(self, name):
    text = (self._folder / f'{name}.err').read_text(encoding='utf-8')
    return [x for x in text.splitlines() if x.startswith('error:')]


def kill_at(module, name):
  """The process kills itself when it calls a function."""
  def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
  setattr(module, name, die)


def main():
  source, folder, seed = sys.argv[1:]
  trials = Trials(pathlib.Path(source), pathlib.Path(folder))
  rng = random.Random(int(seed))
  start = time.monotonic()
  first = trials.run('undisturbed')
  seconds = time.monotonic() - start
  found = {'code': first, 'seconds': seconds,
           'digest': trials.digest('undisturbed'), 'killed': []}
  for k in range(TRIALS):
    name, moment = f'killed{k}', rng.uniform(0, seconds)
    pid = trials.start(name)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found['killed'].append([round(moment / seconds, 3), code,
                            trials.run(name), trials.digest(name)])
  for module, name in ((prepare.np, 'savez'), (files, 'write_json'),
                       (files.os, 'replace'), (prepare.shutil, 'rmtree')):
    if name == 'rmtree':  # Is called if there is something to remove.
      trials.run('at_rmtree', lambda: kill_at(prepare.np, 'savez'))
    code = trials.run(f'at_{name}', lambda m=module, n=name: kill_at(m, n))
    found['killed'].append([name, code, trials.run(f'at_{name}'),
                            trials.digest(f'at_{name}')])
  found['two'] = two_at_once(trials)
  print(json.dumps(found))


def two_at_once(trials):
  """The first command is in the middle when the second one comes."""
  def slow():
    load = image_files.load_all
    def load_slowly(*args):
      for item in load(*args):
        time.sleep(.02)
        yield item
    image_files.load_all = load_slowly
  first = trials.start('two', slow)
  lock = pathlib.Path(trials._folder) / 'two' / 'pairs' / '.prepare.lock'  # pylint: disable=protected-access
  while not (lock.exists() and lock.read_text(encoding='utf-8')):
    time.sleep(.01)
  os.rename(trials._folder / 'two.err', trials._folder / 'first.err')  # pylint: disable=protected-access
  second = trials.run('two')
  said = trials.error('two')
  code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
  return {'first': code, 'pid': first, 'second': second, 'said': said,
          'digest': trials.digest('two'), 'third': trials.run('two')}


if __name__ == '__main__':
  main()
