"""The best checkpoint stays known and kept when a run is killed and resumed."""
import os
import pathlib
import signal
import subprocess
import sys

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import train
from e2e_vlp_jax.evaluation import during_training
from e2e_vlp_jax.training import checkpointer
from tests import small_run

REPO = pathlib.Path(__file__).resolve().parent.parent
METRIC = 'eval/itm/accuracy'
SCORES = {1: .2, 2: .9, 3: .5, 4: .6, 5: .8, 6: .1}


def config_of(data_dir, **changes):
  """A run that saves its newest step and the best of its evaluations."""
  config = small_run.get_config('light')
  config.update_from_flattened_dict({
      'data.dir': str(data_dir), 'total_steps': 6, 'eval_every_steps': 1,
      'checkpoint.every_steps': 1, 'checkpoint.keep': 1,
      'checkpoint.best': METRIC, **changes})
  source = dict(name='scenes', split='validation')
  config.evals = dict(itm=dict(
      type='itm', source=source, pp='decode|fit|boxes|text|itm(.5)',
      max_examples=8, examples_during_training=8))
  return config


def pretend_scores(run=SCORES):
  """Evaluations give these scores, {step: score}."""
  during_training.Evaluation.run = lambda self, state, *unused, **also: {
      METRIC: run[int(state.step)]}


def steps_of(workdir):
  return sorted(int(d) for d in os.listdir(workdir / 'checkpoints')
                if d.isdigit())


def killed_after(step, data_dir, workdir):
  """SIGKILL when `step` is on disk."""
  script = f'''
import time
from e2e_vlp_jax import train
from e2e_vlp_jax.training import checkpointer
from tests import test_best_checkpoint as here
save = checkpointer.Checkpointer.save
def slow(self, step, state, scores=None):
  save(self, step, state, scores)
  self.wait()
  if step == {step}: print('saved', flush=True); time.sleep(600)
checkpointer.Checkpointer.save = slow
here.pretend_scores()
train.train(here.config_of({str(data_dir)!r}), {str(workdir)!r})
'''
  process = subprocess.Popen([sys.executable, '-c', script], cwd=REPO,
                             stdout=subprocess.PIPE, text=True)
  assert any('saved' in line for line in process.stdout)
  process.send_signal(signal.SIGKILL)
  process.wait()


def test_a_killed_run_still_knows_its_best_step(tiny_scenes, tmp_path,
                                                monkeypatch):
  killed_after(3, tiny_scenes, tmp_path)
  assert steps_of(tmp_path) == [2, 3]
  monkeypatch.setattr(during_training.Evaluation, 'run', None)
  pretend_scores()
  train.train(config_of(tiny_scenes), str(tmp_path))
  # The steps 4 and 5 are worse than 2 and better than 3.
  assert steps_of(tmp_path) == [2, 6]
  held = checkpoint_files.meta(str(tmp_path / 'checkpoints' / '2'))
  assert held['scores'] == {METRIC: .9}
  config = config_of(tiny_scenes)
  with checkpointer.Checkpointer(str(tmp_path), {}, config.checkpoint) as one:
    assert one.best() == (2, .9)
  # Another metric: no step is scored by it, and none is mistaken for the best.
  config.checkpoint.best = 'eval/itm/other'
  with checkpointer.Checkpointer(str(tmp_path), {}, config.checkpoint) as one:
    assert one.best() is None
