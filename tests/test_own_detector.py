"""From an export of a labelling tool and published weights to a detector."""
import json
import re

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax import cli
from e2e_vlp_jax import convert
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import class_counts
from e2e_vlp_jax.data import pipeline
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import during_training
from tests import own_classes
from tests import test_convert
from tests import test_own


def test_own_data_has_its_recipe():
  """EMA, the best step by AP; other data keeps what it had."""
  of = lambda data: cli.load_config(
      f'configs/finetune.py:detect,system=e2e_vlp,data={data}')
  for data in ('mine', 'coco+mine'):
    config = of(data)
    assert config.ema_decay == .99 and config.total_steps == 2000
    assert config.checkpoint.best == 'eval/detection/AP'
    assert config.early_stop.metric == 'eval/detection/AP'
  assert of('coco').ema_decay == 0 and of('coco').total_steps == 20_000


def test_a_model_that_grounds_is_asked_for_its_classes():
  """FIBER's fine stage, whose classes are words of a caption."""
  config = cli.load_config(
      'configs/finetune.py:detect,system=fiber_fine,data=mine')
  assert dict(config.objectives) == {'grounding': 1.}
  assert config.checkpoint.best == 'eval/class_prompts/AP'
  assert config.data.labels == 'prepared'
  assert config.data.pp_train.endswith('|grounding(negatives=-1)')
  assert (config.batch_size, config.optim.learning_rate) == (4, 1e-4)
  assert evaluate.select(config, ['detect']) == []
  assert set(config.evals) == {'class_prompts'}
  # A config without evaluators gets the one that fits what it was trained for.
  for system, kind, added in (
      ('fiber_fine', 'class_prompts', 'grounding(negatives=-1)'),
      ('e2e_vlp', 'detection', 'boxes')):
    config = cli.load_config(f'configs/{system}.py:tiny')
    config.evals = {}
    assert evaluate.select(config, ['detect']) == ['detect']
    assert set(config.evals) == {kind}
    assert config.evals[kind].pp.endswith(f'|{added}')


def test_a_class_without_a_box_in_training_is_named(tmp_path):
  content = test_own.coco(4)
  content['categories'].insert(1, dict(id=3, name='ufo'))
  content['annotations'][1]['iscrowd'] = 1
  content['annotations'][3]['iscrowd'] = 1   # All kites are crowds.
  test_own.put(tmp_path / 's' / 'a.json', content)
  test_own.put_pictures(tmp_path / 's', 4)
  test_own.own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0)
  config = cli.load_config(
      'configs/finetune.py:detect,system=e2e_vlp,data=mine')
  config.data.dir = str(tmp_path / 'd')
  labels = vocabularies_lib.Vocabularies.load(config.data).labels
  assert class_counts.counts(config.data, labels) == {
      'cup': 2, 'ufo': 0, 'kite': 0}
  assert class_counts.without_boxes(config.data, labels) == (
      '2 of 3 classes have no box in training and will not be found: ufo, '
      'kite')
  # A joint label space is meant to have more names than the data.
  config.data.labels = 'joint'
  assert class_counts.without_boxes(config.data, labels) == ''
  # A folder that was prepared before the classes were counted.
  path = tmp_path / 'd' / 'mine' / '1.0.0' / records.REPORT
  report = json.loads(path.read_text())
  del report['splits']['train']['classes']
  path.write_text(json.dumps(report))
  assert class_counts.counts(config.data, labels) is None


def test_labels_are_shown_before_the_first_step(tmp_path, capsys):
  """Drawn, and a class without a box named; nothing without boxes."""
  content = test_own.coco(4)
  content['categories'].append(dict(id=8, name='ufo'))
  test_own.put(tmp_path / 's' / 'a.json', content)
  test_own.put_pictures(tmp_path / 's', 4)
  test_own.own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0)
  config = cli.load_config(
      'configs/finetune.py:detect,system=e2e_vlp,data=mine')
  config.data.dir = str(tmp_path / 'd')
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  data = pipeline.Pipeline(
      config.data, vocabularies=vocabularies, sources=config.data.train,
      pp=config.data.pp_train, seed=0, batch_size=4, train=True)
  shows = object.__new__(during_training.Evaluation)
  vars(shows).update(_config=config, _workdir=str(tmp_path),
                     _labels=vocabularies.labels, _tokenizer=None)
  capsys.readouterr()
  shows.show_labels(data)
  said = capsys.readouterr().out
  assert '1 of 3 classes have no box in training' in said and 'ufo' in said
  assert len(list((tmp_path / 'labels').glob('*.png'))) == 4
  assert 'Labels of the first batch' in (tmp_path / 'report.html').read_text()
  config.data.pp_train = 'decode|fit'
  shows.show_labels(None)  # No batch is made.
  assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('write', [own_classes.as_coco, own_classes.as_yolo])
def test_five_classes_from_detr_weights(write, shared, tmp_path, capsys):
  """The documented commands: prepare, convert, train, evaluate.

  The weights are random ones with the names of the published file.
  """
  (tmp_path / 's').mkdir()
  write(shared, tmp_path / 's')
  prepare.main(['own', '--name', 'five', '--source', str(tmp_path / 's'),
                '--data_dir', str(tmp_path / 'd'), '--validation_share', '.3'])
  file = test_convert.save(
      tmp_path / 'detr.safetensors', test_convert.published(
          'hf_detr', test_convert.load_config('detr')))
  convert.main(['--format', 'hf_detr', '--input', file,
                *test_convert.config_args('detr'), '--output',
                str(tmp_path / 'detr')])
  capsys.readouterr()
  train.main([
      '--config', 'configs/finetune.py:detect,'
      f'from={tmp_path / "detr"},data=five',
      '--workdir', str(tmp_path / 'w'), f'--config.data.dir={tmp_path / "d"}',
      '--config.total_steps=20', '--config.eval_every_steps=10',
      '--config.optim.warmup_steps=2', '--config.batch_size=8',
      '--config.eval_batch_size=8', '--config.tensorboard=false',
      '--config.samples.count=4'])
  said = capsys.readouterr().out
  # The head is a new one; all else came from the file.
  loaded = json.loads((tmp_path / 'w' / 'init_from.json').read_text())
  assert loaded['other_shape'] and all(
      'classes' in name for name in loaded['other_shape'])
  assert not [n for n in loaded['missing'] if 'attributes' not in n]
  assert 'labels of the first batch are drawn in' in said
  meta = checkpoint_files.meta(str(tmp_path / 'w'))
  assert meta['labels']['classes'] == list(own_classes.CATEGORIES)
  assert meta['step'] == 20
  page = (tmp_path / 'w' / 'report.html').read_text()
  for title in ('Average precision of each class', 'What is taken for what',
                'The worst images', 'Labels of the first batch'):
    assert title in page, title
  # The same page for any split.
  evaluate.main(['--checkpoint', str(tmp_path / 'w'), '--workdir',
                 str(tmp_path / 'e'), '--tasks', 'detect', '--split', 'train',
                 '--limit', '16'])
  page = (tmp_path / 'e' / 'report.html').read_text()
  assert 'five/train record' in page and 'What is taken for what' in page
  assert re.search(r'five/validation record', page) is None
  for picture in (tmp_path / 'w' / 'labels').glob('*.png'):
    assert np.asarray(Image.open(picture)).std() > 10
