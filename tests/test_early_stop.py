"""Runs that end before their last step, and runs that go on beyond it."""
import json
import shutil

import ml_collections
import numpy as np
import pytest

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import train
from e2e_vlp_jax.evaluation import during_training
from e2e_vlp_jax.evaluation import evaluators
from e2e_vlp_jax.training import early_stop
from e2e_vlp_jax.training import extension
from e2e_vlp_jax.training import workdir as workdir_lib
from tests import test_best_checkpoint as best

METRIC = best.METRIC


def stop_of(patience, metric=METRIC):
  return early_stop.EarlyStop(ml_collections.ConfigDict(
      dict(metric=metric, patience=patience)))


def test_patience_is_counted_in_evaluations():
  stop = stop_of(2)
  reached = []
  for step, score in enumerate([.1, .3, .3, float('nan'), .9]):
    stop.look(10 * step, {METRIC: score})
    reached.append(stop.reached)
  # An equal score is no better one; a better one begins anew.
  assert reached == [False, False, False, True, False]
  stop = stop_of(2)
  for step, score in enumerate([.1, .3, .2]):
    stop.look(10 * step, {METRIC: score})
  again = stop_of(2)
  again.restore(json.loads(json.dumps(stop.to_dict())))
  assert not again.reached
  again.look(30, {METRIC: .25})
  assert again.reached
  assert again.why() == (
      f'early_stop: {METRIC} has not improved for 2 evaluations (patience 2); '
      'best: 0.3000 at step 10')
  other = stop_of(1, 'eval/mlm/accuracy')
  other.restore(stop.to_dict())  # It has seen nothing of this metric.
  assert not other.reached
  off = stop_of(0)
  off.look(1, {})
  assert not off.reached and off.to_dict() == {}
  for wrong in (dict(patience=-1), dict(patience=2, metric='')):
    with pytest.raises(errors.UserError, match='early_stop: patience'):
      stop_of(**wrong)


def config_of(data_dir, **changes):
  return best.config_of(data_dir, **{
      'early_stop.metric': METRIC, 'early_stop.patience': 2,
      'total_steps': 9, 'checkpoint.every_steps': 0, **changes})


def scores_of_evaluations(monkeypatch, scores):
  """The itm evaluator gives these numbers, one after the other."""
  given = iter(scores)
  monkeypatch.setattr(evaluators.Evaluators, 'run', lambda self, *a, **k: (
      {METRIC: next(given)}, {}))


def test_a_run_stops_early_and_says_why(tiny_scenes, tmp_path, monkeypatch,
                                        capsys):
  """In two parts: the first is killed after the second evaluation."""
  scores_of_evaluations(monkeypatch, [.5, .4])
  run = during_training.Evaluation.run

  def killed(self, state, monitor, final, stop=None):
    if int(state.step) == 3:
      raise KeyboardInterrupt
    return run(self, state, monitor, final, stop)
  monkeypatch.setattr(during_training.Evaluation, 'run', killed)
  config = config_of(tiny_scenes)
  with pytest.raises(KeyboardInterrupt):
    train.train(config, str(tmp_path))
  assert not workdir_lib.finished(str(tmp_path), config)

  monkeypatch.setattr(during_training.Evaluation, 'run', run)
  scores_of_evaluations(monkeypatch, [.3, .7])
  capsys.readouterr()
  final = train.train(config, str(tmp_path))
  # One more evaluation sufficed; then came the final one.
  assert final == {METRIC: .7}
  said = capsys.readouterr()
  said = said.out + said.err
  assert (f'step 3: early_stop: {METRIC} has not improved for 2 evaluations '
          '(patience 2); best: 0.5000 at step 1') in said
  assert f'best {METRIC} during training: 0.5000 at step 1, ' in said
  meta = checkpoint_files.meta(str(tmp_path))
  assert meta['step'] == 3 and meta['early_stop']['waited'] == 2
  assert best.steps_of(tmp_path) == [1, 3]
  assert workdir_lib.finished(str(tmp_path), config)
  # Again: nothing but the final evaluation; with more patience it goes on.
  scores_of_evaluations(monkeypatch, [.7])
  train.train(config, str(tmp_path))
  assert best.steps_of(tmp_path) == [1, 3]
  config.early_stop.patience = 3
  assert not workdir_lib.finished(str(tmp_path), config)
  scores_of_evaluations(monkeypatch, [.4, .7])
  train.train(config, str(tmp_path))
  assert best.steps_of(tmp_path) == [1, 4]


@pytest.mark.parametrize('key', ['early_stop.metric', 'checkpoint.best'])
@pytest.mark.parametrize('metric, says', [
    ('eval/detection/AP', r'expected .* during training \(itm\)'),
    ('eval/itm/acuracy', "no metric 'acuracy' of the evaluator 'itm'; did you "
     "mean 'accuracy'"),
    ('accuracy', "expected 'eval/<name>/<metric>'")])
def test_a_metric_that_no_evaluator_gives(tiny_scenes, tmp_path, key, metric,
                                          says):
  """Refused before the first step."""
  config = config_of(tiny_scenes, **{key: metric})
  with pytest.raises(errors.UserError, match=f'{key}: {metric!r}.*{says}'):
    train.train(config, str(tmp_path))
  assert not (tmp_path / 'metrics.jsonl').exists()


def test_no_evaluations_to_wait_for(tiny_scenes, tmp_path):
  config = config_of(tiny_scenes, eval_every_steps=0)
  with pytest.raises(errors.UserError, match='eval_every_steps is 0'):
    train.train(config, str(tmp_path))


def test_every_task_has_the_metric_and_is_off():
  for task in ('detect', 'answer', 'match', 'caption'):
    config = cli.load_config(f'configs/finetune.py:{task},system=e2e_vlp')
    assert config.early_stop.metric == config.checkpoint.best != ''
    assert config.early_stop.patience == 0


# --- Longer runs --------------------------------------------------------------
def test_a_finished_run_is_extended(tiny_scenes, tmp_path, monkeypatch,
                                    capsys):
  """Its learning rate is that of a run planned with the new length."""
  config = config_of(tiny_scenes, **{
      'early_stop.patience': 0, 'total_steps': 2, 'optim.warmup_steps': 0,
      'checkpoint.best': '', 'eval_every_steps': 0})
  scores_of_evaluations(monkeypatch, [.5] * 3)
  train.train(config, str(tmp_path / 'w'))
  shutil.copytree(tmp_path / 'w', tmp_path / 'short')
  capsys.readouterr()
  config.total_steps = 4
  train.train(config, str(tmp_path / 'w'))
  said = capsys.readouterr().out
  rates = {row['step']: row['train/learning_rate'] for row in map(
      json.loads, open(tmp_path / 'w' / 'metrics.jsonl'))
           if 'train/learning_rate' in row}
  assert sorted(rates) == [1, 2, 3, 4]
  peak, final = config.optim.learning_rate, config.optim.final_fraction
  want = lambda step, total: peak * (final + (1 - final) * .5 * (
      1 + np.cos(np.pi * step / total)))
  assert rates[2] == pytest.approx(want(1, 2))
  assert rates[3] == pytest.approx(want(2, 4))
  assert ("total_steps: 2 -> 4: the run goes on; the schedule 'cosine' is "
          'stretched to step 4, as if planned so from the start: learning rate '
          f'{want(2, 4):.3g} after step 2, {want(1, 2):.3g} was the last one '
          'before') in said
  # Not shorter, and nothing else may change with it.
  config.total_steps = 3
  with pytest.raises(errors.UserError, match='total_steps is 4 there, 3 here'):
    train.train(config, str(tmp_path / 'w'))
  config.total_steps, config.seed = 5, 7
  with pytest.raises(errors.UserError, match='seed is 0 there, 7 here'):
    train.train(config, str(tmp_path / 'w'))


def test_what_other_schedules_do_in_a_longer_run():
  config = best.config_of('')
  config.total_steps = 400
  config.optim = dict(schedule='step', learning_rate=1., warmup_steps=0,
                      decay_steps=(50,), decay_factor=.1)
  assert ("'step' does not depend on it: learning rate 0.1 after step 100, 0.1 "
          'was') in extension.describe(config, 100)
  config.warm_start.steps = 100
  assert extension.describe(config, 100).endswith('after its warm start')
