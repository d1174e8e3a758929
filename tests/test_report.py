"""report.html: one page from whatever a workdir holds."""
import html.parser
import importlib
import json
import re

import numpy as np
from PIL import Image
import pytest

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import report
from e2e_vlp_jax.training import old_names
from e2e_vlp_jax.training import workdir as workdir_lib


class Page(html.parser.HTMLParser):
  """What a browser would load and show."""

  def __init__(self, text):
    super().__init__()
    self.sources, self.text = [], ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    del tag
    self.sources += [v for k, v in attrs if k in ('src', 'href')]

  def handle_data(self, data):
    self.text += data + '\n'


def write(workdir):
  return Page(open(report.write_report(str(workdir)), encoding='utf-8').read())


@pytest.fixture
def workdir(tmp_path):
  config = config_lib.get_config('tiny')
  (tmp_path / 'config.json').write_text(json.dumps(workdir_lib.to_dict(config)))
  with open(tmp_path / 'metrics.jsonl', 'w') as f:
    for step in range(10, 1010, 10):
      f.write(json.dumps({'step': step, 'train/loss': 5 / step,
                          'train/mlm': 1 / step, 'train/skipped': 0.,
                          'perf/images_per_s': 123.4}) + '\n')
      if step % 500 == 0:
        f.write(json.dumps({'step': step, 'eval/detection/AP50': step / 2000,
                            'eval/detection_unseen/AP50': step / 4000,
                            'eval/captioning/CIDEr': 1.25}) + '\n')
  (tmp_path / 'samples').mkdir()
  Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(
      tmp_path / 'samples' / 'sample_00.png')
  Image.fromarray(np.random.default_rng(0).integers(
      0, 256, (400, 400, 3), np.uint8)).save(
          tmp_path / 'samples' / 'sample_01.png')
  return tmp_path


def test_a_whole_run(workdir):
  page = write(workdir)
  # Nothing is loaded from elsewhere.
  assert page.sources and all(s.startswith('data:') for s in page.sources)
  text = (workdir / 'report.html').read_text()
  assert not re.search(r'(src|href|url\()\s*=?\s*["\']?(https?:)?//', text)
  kinds = [s.partition(';')[0] for s in page.sources]
  assert kinds.count('data:image/png') == 1  # the large picture is a JPEG
  assert kinds.count('data:image/jpeg') == 1
  # loss, mlm, images_per_s; AP50 and CIDEr; 'skipped' was always 0.
  assert kinds.count('data:image/svg+xml') == 5
  for shown in ('0.500', '0.250', '1.250', 'unseen', '1,000 of 4,000',
                'scenes/train', 'detection/AP50', '123'):
    assert shown in page.text, shown
  assert 'skipped' not in page.text


def test_missing_and_broken_files(tmp_path):
  assert 'Nothing is written yet' in write(tmp_path).text
  (tmp_path / 'config.json').write_text('{"model": {"name"')
  (tmp_path / 'metrics.jsonl').write_text(
      '{"step": 5, "train/loss": NaN, "train/mlm": 1.5}\n'
      '{"step": 9, "train/mlm": 1.0, "eval/itm/accuracy": 0.875}\n'
      'not json\n[1]\n{"step": 11, "train/m')
  page = write(tmp_path)
  assert '0.875' in page.text and 'mlm' in page.text
  assert 'loss' not in page.text


def test_a_resumed_step_counts_once(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
      '{"step": 5, "eval/itm/accuracy": 0.25}\n'
      '{"step": 5, "eval/itm/accuracy": 0.75}\n')
  page = write(tmp_path)
  assert '0.750' in page.text and '0.250' not in page.text


def test_a_later_evaluate_replaces_the_runs_own_figures(workdir):
  (workdir / 'eval.json').write_text(json.dumps(
      {'step': 1000, 'checkpoint': 'x', 'eval/detection/AP50': .6125}))
  assert '0.613' in write(workdir).text or '0.612' in write(workdir).text
  (workdir / 'eval.json').write_text(json.dumps(
      {'step': 20, 'checkpoint': 'x', 'eval/detection/AP50': .111}))
  assert '0.111' not in write(workdir).text


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(errors.UserError, match='cannot be written'):
    report.write_report(str(tmp_path / 'file' / 'absent'))


@pytest.mark.parametrize('spec, model, sources', [
    ('e2e_vlp:tiny', 'e2e_vlp: patch_cnn, 2 encoder and 2 decoder layers, '
     'width 128', 'scenes/train'),
    ('e2e_vlp:r101,data=published', 'e2e_vlp: resnet-101, 12 encoder and 6 '
     'decoder layers, width 256', 'coco/train x by_rows, visual_genome/train '
     'x by_rows'),
    ('soho:r18,data=published', 'soho: resnet-18, 2048 visual codes, 3 '
     'encoder layers, width 768', 'coco/train x by_texts, '
     'visual_genome/train x by_texts'),
    ('fiber:base', 'fiber: Swin 2-2-18-2 of width 128, RoBERTa of 12 layers, '
     '6 of them fused, width 768', 'coco/train')])
def test_facts_of_every_system_and_of_mixtures(spec, model, sources, tmp_path):
  system, _, argument = spec.partition(':')
  config = importlib.import_module(f'configs.{system}').get_config(argument)
  stored = old_names.modernise(workdir_lib.to_dict(config))
  (tmp_path / 'config.json').write_text(json.dumps(stored))
  text = write(tmp_path).text
  assert model in text and sources in text and 'None' not in text.split(
      'Config')[0]


def test_a_model_that_does_not_describe_itself(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(
      {'model': {'name': 'fourth', 'width': 64}}))
  assert 'fourth, width 64' in write(tmp_path).text


def test_headlines_are_those_of_the_evaluators(tmp_path):
  """Whatever the evaluators of a config are called."""
  (tmp_path / 'config.json').write_text(json.dumps({'evals': {
      'on_coco': {'type': 'detection', 'source': {'split': 'validation'}},
      'itm': {'type': 'itm'}, 'itm_unseen': {'type': 'itm'}}}))
  (tmp_path / 'eval.json').write_text(json.dumps(
      {'step': 5, 'eval/on_coco/AP50': .25, 'eval/on_coco/APs': .125,
       'eval/itm/accuracy': .5, 'eval/itm_unseen/accuracy': .75}))
  tiles = write(tmp_path).text.split('Run')[0].split('Evaluation')[0]
  assert 'on_coco: AP50' in tiles and 'ITM accuracy' in tiles
  assert '0.750' not in tiles and 'APs' not in tiles
