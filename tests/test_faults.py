"""What goes wrong on machines for real: disks, records, numbers, signals."""
import json
import os
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import train
from e2e_vlp_jax.training import checkpoint
from tests import kill_and_resume as runs
from tests import small_run

LIGHT = 'tests/small_run.py:light'


def light_config(data_dir, **changes):
  config = small_run.get_config('light')
  config.update_from_flattened_dict({'data.dir': str(data_dir), **changes})
  return config


def saved_steps(workdir):
  return sorted(int(d) for d in os.listdir(workdir / 'checkpoints')
                if d.isdigit())


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_full_disk_ends_the_run_and_spares_what_is_saved(tiny_scenes,
                                                           tmp_path):
  """The kernel refuses the run's writes after its first checkpoint."""
  workdir = tmp_path / 'w'
  process, = runs.start(runs.Layout(1, 1), workdir, tiny_scenes,
                        {'total_steps': 5000, 'log_every_steps': 2},
                        config=LIGHT, output=subprocess.PIPE)
  runs.wait_for_step([process], workdir, runs.SAVE_EVERY)
  while not saved_steps(workdir):
    time.sleep(.05)
  # From here no file may grow beyond 30 kB.
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
  _, log = process.communicate(timeout=runs.PATIENCE)
  log = log.decode()
  said = [x for x in log.splitlines() if x.startswith('error:')]
  assert process.returncode == 2 and len(said) == 1, log[-2000:]
  print(said[0])
  assert 'File too large' in said[0] and str(workdir) in said[0]
  # What was saved is whole, and the run goes on from there.
  params, _, meta = checkpoint.load(str(workdir))
  assert params and meta['step'] in saved_steps(workdir)
  before = runs.last_step(workdir)
  process, = runs.start(runs.Layout(1, 1), workdir, tiny_scenes,
                        {'total_steps': 5000, 'checkpoint.every_steps': 1},
                        config=LIGHT)
  runs.wait_for_step([process], workdir, before + 2)
  process.terminate()
  assert process.wait(runs.PATIENCE) == 0
  assert saved_steps(workdir)[-1] > meta['step']


def test_sigterm_saves_and_leaves_with_0(tiny_scenes, tmp_path):
  workdir = tmp_path / 'w'
  process, = runs.start(runs.Layout(1, 1), workdir, tiny_scenes,
                        {'total_steps': 5000, 'checkpoint.every_steps': 0},
                        config=LIGHT)
  runs.wait_for_step([process], workdir, 3)
  process.send_signal(signal.SIGTERM)
  assert process.wait(runs.PATIENCE) == 0
  assert saved_steps(workdir) == [runs.last_step(workdir)]
  assert 'stopped at step' in (tmp_path / 'w.0.log').read_text()


@pytest.mark.parametrize('steps, every, evaluated', [
    # Of step 4 and of the end; and of the whole run also of step 2.
    (5, 2, 1 + 4 + 6),
    (2, 0, 1 + 2 + 2)])
def test_sigterm_in_an_evaluation(tiny_scenes, tmp_path, monkeypatch, steps,
                                  every, evaluated):
  """It is broken off after a batch; the run goes on to the same bits."""
  from e2e_vlp_jax.evaluation import itm
  batches = []

  def evaluate(predictor, variables, pipeline, *, max_examples=None,
               progress=None):
    """Two batches; the signal comes in the first one of step 2.

    With 2 steps in all that is the final evaluation.
    """
    del predictor, variables, pipeline, max_examples
    for done in (8, 16):
      batches.append(done)
      if interrupted and batches == [8]:
        signal.raise_signal(signal.SIGTERM)
      progress(done)
    return {'accuracy': 1.}
  monkeypatch.setattr(itm, 'evaluate', evaluate)
  config = light_config(tiny_scenes, total_steps=steps, eval_every_steps=every,
                        **{'checkpoint.every_steps': 0})
  config.evals = {'itm': dict(
      type='itm', source=dict(name='scenes', split='validation'),
      pp=config.data.pp_eval, max_examples=0, examples_during_training=16)}
  interrupted = True
  with pytest.raises(SystemExit) as e:
    train.train(config, str(tmp_path / 'w'))
  assert e.value.code == 0 and batches == [8]
  assert saved_steps(tmp_path / 'w') == [2]
  interrupted = False
  for name in ('w', 'whole'):
    train.train(config, str(tmp_path / name))
  ours, theirs = (runs.metrics(tmp_path / name) for name in ('w', 'whole'))
  assert ours == theirs and max(step for step, _ in ours) == steps
  found = json.loads((tmp_path / 'w' / 'eval.json').read_text())
  assert found['step'] == steps and found['eval/itm/accuracy'] == 1.
  assert len(batches) == evaluated


def test_damaged_records_are_skipped_counted_and_named(tiny_scenes, tmp_path,
                                                       caplog):
  data = tmp_path / 'data'
  shutil.copytree(tiny_scenes, data)
  shards = [p for p in data.rglob('*array_record*')
            if '-train' in p.name and p.is_file()]
  raw = bytearray(shards[0].read_bytes())
  middle = len(raw) // 2
  raw[middle:middle + 200] = bytes(200)
  shards[0].write_bytes(raw)
  config = light_config(data, total_steps=10)
  train.train(config, str(tmp_path / 'w'))
  bad = [x['perf/bad_records'] for x in lines(tmp_path / 'w/metrics.jsonl')
         if 'perf/bad_records' in x]
  assert bad[-1] > 0 and 'scenes/train record' in caplog.text
  config.data.max_bad_records = 0
  with pytest.raises(errors.UserError, match='unreadable records'):
    train.train(config, str(tmp_path / 'x'))


def test_nonfinite_updates_in_a_row_end_the_run(tiny_scenes, tmp_path):
  """An absurd learning rate: the first update ruins every later loss."""
  config = light_config(tiny_scenes, total_steps=30, max_bad_steps=3, **{
      'checkpoint.every_steps': 1, 'optim.learning_rate': 1e38,
      'optim.warmup_steps': 0, 'optim.clip_norm': 0.})
  with pytest.raises(errors.UserError, match='3 updates in a row'):
    train.train(config, str(tmp_path))
  found = lines(tmp_path / 'nonfinite.jsonl')
  assert [x['step'] for x in found] == list(
      range(found[0]['step'], found[0]['step'] + 3))
  for line in found:
    assert len(line['examples']) == config.batch_size
    assert line['examples'][0].startswith('scenes/train record ')
    assert 'loss' in line['not_finite'] or 'grad_norm' in line['not_finite']
  # Strict JSON: what is no number is null.
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert 'null' in text and 'NaN' not in text and 'Infinity' not in text
  assert np.all([np.isfinite(x).all() for x in (
      checkpoint.load(str(tmp_path))[0]['project']['kernel'],)])
  # A run that goes on counts on: it does not get three more.
  last = saved_steps(tmp_path)[-1]
  assert last >= found[-2]['step']
  with pytest.raises(errors.UserError, match='updates in a row'):
    train.train(config, str(tmp_path))
  assert lines(tmp_path / 'nonfinite.jsonl')[-1]['step'] == last + 1


def test_an_unfinished_checkpoint_is_no_checkpoint(tiny_scenes, tmp_path):
  config = light_config(tiny_scenes, total_steps=2, **{
      'checkpoint.every_steps': 1})
  train.train(config, str(tmp_path))
  whole = tmp_path / 'checkpoints'
  shutil.copytree(whole / '2', whole / '3.orbax-checkpoint-tmp')
  config.total_steps = 3
  train.train(config, str(tmp_path), allow_changes=True)
  assert saved_steps(tmp_path)[-1] == 3
  steps = [x['step'] for x in lines(tmp_path / 'metrics.jsonl')
           if 'train/loss' in x]
  assert steps == [1, 2, 3]


def test_saves_by_time_and_keeps_the_best(tiny_scenes, tmp_path):
  config = light_config(tiny_scenes, total_steps=8, **{
      'checkpoint.every_steps': 0,
      'checkpoint.every_minutes': 1e-9, 'checkpoint.keep': 1})
  train.train(config, str(tmp_path / 'timed'))
  assert saved_steps(tmp_path / 'timed') == [8]
  config.checkpoint.keep_every = 3
  train.train(config, str(tmp_path / 'spaced'))
  assert saved_steps(tmp_path / 'spaced') == [3, 6, 8]

  config = light_config(tiny_scenes, total_steps=8, eval_every_steps=2, **{
      'checkpoint.every_steps': 0,
      'checkpoint.keep': 1, 'checkpoint.best': 'eval/itm/accuracy'})
  source = dict(name='scenes', split='validation')
  config.evals = dict(itm=dict(
      type='itm', source=source, pp='decode|fit|boxes|text|itm(.5)',
      max_examples=16, examples_during_training=16))
  train.train(config, str(tmp_path / 'best'))
  scores = {x['step']: x['eval/itm/accuracy']
            for x in lines(tmp_path / 'best/metrics.jsonl')
            if 'eval/itm/accuracy' in x and x['step'] < 8}
  kept = saved_steps(tmp_path / 'best')
  assert kept[-1] == 8 and len(kept) == 2
  assert scores[kept[0]] == max(scores.values())

  config.checkpoint.best = 'eval/detection/AP'
  with pytest.raises(errors.UserError, match='checkpoint.best'):
    train.train(config, str(tmp_path / 'x'))


def test_another_dataset_or_seed_is_refused_unless_asked_for(
    tiny_scenes, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(runs.REPO)
  command = ['--config', LIGHT, f'--config.data.dir={tiny_scenes}',
             '--workdir', str(tmp_path), '--config.total_steps=1']
  train.main(command)
  with pytest.raises(SystemExit) as refused:
    train.main([*command, '--config.seed=1'])
  assert refused.value.code == 2
  assert 'seed is 0 there, 1 here' in capsys.readouterr().err
  train.main([*command, '--config.seed=1', '--allow-changes'])
  assert '--allow-changes: seed: 0 -> 1' in capsys.readouterr().out


def test_a_trace_is_taken_on_demand(tiny_scenes, tmp_path):
  config = light_config(tiny_scenes, total_steps=8, **{
      'profile.steps': 2})
  (tmp_path / 'profile_now').write_text('')
  train.train(config, str(tmp_path))
  assert not (tmp_path / 'profile_now').exists()
  assert list(tmp_path.rglob('*.xplane.pb'))
  last = lines(tmp_path / 'metrics.jsonl')[-1]
  shares = [v for k, v in last.items() if k.startswith('perf/time/')]
  assert {'perf/time/init', 'perf/time/compile', 'perf/time/step',
          'perf/time/data', 'perf/time/save'} <= set(last)
  assert abs(sum(shares) - 1) < 1e-6
  speed = [x for x in lines(tmp_path / 'metrics.jsonl')
           if 'perf/goodput' in x][-1]
  assert 0 < speed['perf/goodput'] <= 1 and speed['perf/tflops_per_s'] > 0
