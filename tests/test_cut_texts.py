"""Texts of which a model reads only the beginning are said, by every task."""
import json

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import predict
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.tasks import base
from tests import small_model

SHORT = 'a red circle'
LONG = 'a red circle above a blue square and a green ring below a star'
HEAD = dict(kind='classifier', state='pooled', views=('joint',),
            outputs='answers')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  config = small_model.get_config()
  config.data.buckets = ((84, 84),)
  config.model.heads = {'answer': HEAD}
  config.data.answers = 'scenes'
  return small_model.save(tmp_path_factory.mktemp('run'), config)


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
  path = tmp_path_factory.mktemp('photo') / 'a.png'
  Image.new('RGB', (84, 84)).save(path)
  return str(path)


def test_what_is_read_is_what_the_model_gets(trained):
  predictor, _ = predictor_lib.Predictor.from_checkpoint(trained)
  length = predictor.config.data.max_text
  cut = inputs.cut_texts(predictor, [SHORT, LONG, LONG])
  assert list(cut) == [LONG]
  found = cut[LONG]
  assert found.max_text == length == 10 and found.tokens == 16
  assert found.read == 'a red circle above a blue square and'
  ids, mask = inputs.tokenize(predictor, [LONG], 1)
  assert predictor.tokenizer.decode(ids[0][mask[0]]) == found.read
  # The longest text that is read whole.
  fits = found.read
  assert len(predictor.tokenizer.encode(fits)) == length
  assert not inputs.cut_texts(predictor, [fits])
  assert inputs.cut_texts(predictor, [fits + ' star'])


@pytest.mark.parametrize('task,key', [('match', 'match'),
                                      ('answer', 'answers')])
def test_json_and_stderr_say_it(trained, photo, capsys, task, key):
  command = ['--checkpoint', trained, '--task', task, '--image', photo,
             '--image', photo]
  predict.main([*command, '--text', SHORT, '--text', LONG])
  out, err = capsys.readouterr()
  for found in json.loads(out):
    assert found[key]
    assert found['cut_texts'] == [{
        'text': LONG, 'tokens': 16, 'max_text': 10,
        'read': 'a red circle above a blue square and'}]
  said = [x for x in err.splitlines() if x.startswith('warning: ')]
  assert said == [
      f'warning: --text {LONG[:60] + "..."!r}: 16 tokens, of which this model '
      "reads 10 (data.max_text), to 'a red circle above a blue square and'"]
  predict.main([*command, '--text', SHORT])
  out, err = capsys.readouterr()
  assert not any('cut_texts' in found for found in json.loads(out))
  assert 'warning: --text' not in err


def test_results_of_python_say_it_image_by_image(trained):
  predictor, variables = predictor_lib.Predictor.from_checkpoint(trained)
  images = [np.zeros((84, 84, 3), np.uint8)] * 3
  results = predictor.predict(variables, images, 'match',
                              [[LONG], [SHORT], [SHORT, LONG]])
  assert [[c.text for c in r.cut_texts] for r in results] == [
      [LONG], [], [LONG]]


def test_every_task_with_texts_can_say_it():
  """The field is of all results; none of a task's own hides it."""
  with_texts = [n for n in base.names() if base.load(n).takes_text]
  assert {'match', 'answer', 'embed'} <= set(with_texts)
  for name in with_texts:
    module = __import__(f'e2e_vlp_jax.tasks.{name}', fromlist=['Result'])
    assert 'cut_texts' in module.Result.__dataclass_fields__


@pytest.mark.parametrize('text,says', [
    ('half an emoji \ud83d', r"not UTF-8: '\ud83d' at 14; expected whole"),
    ('\udcff of a shell', r"not UTF-8: '\udcff' at 0; expected whole")])
def test_what_is_no_text_is_refused(trained, photo, capsys, text, says):
  with pytest.raises(SystemExit) as e:
    predict.main(['--checkpoint', trained, '--task', 'match', '--image', photo,
                  '--text', text])
  assert e.value.code == 2
  err = capsys.readouterr().err
  assert err.count('\n') == 1 and says in err


def test_what_is_no_string_is_refused():
  with pytest.raises(errors.UserError, match='nan is a float; expected'):
    base.load('match').check_texts([['a', float('nan')]], 1)
