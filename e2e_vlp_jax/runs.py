"""Several runs of `train`, one after the other: for sweep and compare."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.training import workdir as workdir_lib

TRAIN = ('python', '-m', 'e2e_vlp_jax.train')


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: what a table calls it.
    workdir: path of its folder, which may be in a bucket.
    spec: 'path.py:ARG' of its config.
    texts: (key, text) pairs that override values of the config.
    overrides: {key: value} of them that belong to this run alone.
  """
  name: str
  workdir: str
  spec: str
  texts: Sequence[tuple[str, str]] = ()
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def arguments(self):
    """Arguments of the command train."""
    return ['--config', self.spec, '--workdir', self.workdir,
            *(f'--config.{key}={text}' for key, text in self.texts)]

  def finished(self):
    """Whether its folder contains the finished run."""
    try:
      config = cli.load_config(self.spec, self.texts)
    except errors.UserError:  # It starts from a run that is not there yet.
      return False
    return workdir_lib.finished(self.workdir, config)

  def metrics(self):
    """(last step, {name: latest value}) of its eval/ metrics and its loss."""
    step, found = 0, {}
    try:
      text = paths.read_text(os.path.join(self.workdir, 'metrics.jsonl'))
      for line in filter(None, map(_read, text.splitlines())):
        step = max(step, line.get('step', 0))
        found.update({k: v for k, v in line.items() if v is not None
                      and (k.startswith('eval/') or k == 'train/loss')})
    except (FileNotFoundError, NotADirectoryError):
      pass
    return step, found


def _read(line):
  try:
    return json.loads(line)
  except ValueError:  # half written
    return None


def text_of(value):
  """A value in the form that the command line accepts."""
  if isinstance(value, bool):
    return str(value).lower()
  return value if isinstance(value, str) else repr(value)


def run_here(runs, after):
  """Trains the runs one after the other; returns the exit code.

  Finished runs are skipped, interrupted ones resumed. If a run fails, the
  others still run.

  Args:
    runs: [Run].
    after: called after each run with the run and the seconds that it took.
  """
  failed, stopped, children = {}, [], []

  def stop(signum, frame):
    # Ctrl-C also reaches the training, which saves before it ends. SIGTERM
    # does not, so we forward it.
    del frame
    stopped.append(signum)
    if signum == signal.SIGTERM and children:
      children[-1].terminate()
  before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
  for number, run in enumerate(runs, 1):
    here = f'[{number}/{len(runs)}] {run.name}'
    if run.finished():
      print(f'{here}: already finished', flush=True)
      continue
    print(f'{here}: {run.workdir}', flush=True)
    start = time.monotonic()
    children.append(subprocess.Popen([sys.executable, *TRAIN[1:],
                                      *run.arguments]))
    code = children[-1].wait()
    after(run, time.monotonic() - start)
    if stopped:
      print(f'{here}: stopped; run the same command to continue', flush=True)
      break
    if code or not run.finished():
      failed[run.name] = f'exit code {code}' if code else 'ended too early'
      print(f'{here}: failed ({failed[run.name]})', flush=True)
  for signum, handler in before.items():
    signal.signal(signum, handler)
  for name, why in failed.items():
    print(f'failed: {name} ({why})', file=sys.stderr)
  return 128 + stopped[0] if stopped else 1 if failed else 0
