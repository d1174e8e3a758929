"""predict: one file in, the promised JSON and a picture out."""
import gzip
import importlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import predict
from e2e_vlp_jax import tasks
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.tasks import match
from tests import commands
from tests import small_model

REPO = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = pathlib.Path(__file__).parent / 'data' / 'tasks.json.gz'


def save(folder, size='tiny', requests=None, **model):
  config = small_model.get_config(size, **model)
  config.data.buckets = ((96, 72), (72, 96), (84, 84))
  return small_model.save(folder, config, requests)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  return save(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def loaded(trained):
  return predictor_lib.Predictor.from_checkpoint(trained)


@pytest.fixture(scope='module')
def photo(tmp_path_factory):
  """A landscape JPEG of smooth noise."""
  path = tmp_path_factory.mktemp('photo') / 'photo.jpg'
  pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
  Image.fromarray(pixels).resize((160, 120)).save(path, quality=95)
  return str(path)


def fails(capsys, *argv):
  """Runs predict, which must end with one line; returns that line."""
  return commands.refused(predict.main, *argv, capsys=capsys)


def test_detect_writes_json_and_picture(trained, photo, tmp_path, capsys):
  out, picture = tmp_path / 'o.json', tmp_path / 'o.png'
  predict.main(['--checkpoint', trained, '--task', 'detect', '--image', photo,
                '--json', str(out), '--picture', str(picture),
                '--threshold', '0'])
  assert not capsys.readouterr().out
  found = json.loads(out.read_text())
  assert set(found) == {'task', 'image', 'objects'}
  assert found['task'] == 'detect'
  assert found['image'] == {'height': 120, 'width': 160}
  assert len(found['objects']) == 5  # every query, nothing suppressed
  for one in found['objects']:
    assert set(one) == {'label', 'score', 'box', 'attributes'}
    x0, y0, x1, y1 = one['box']
    assert 0 <= x0 <= x1 <= 160 and 0 <= y0 <= y1 <= 120
    assert 0 <= one['score'] <= 1
    assert {'label', 'score'} == set(one['attributes'][0])
  assert Image.open(picture).width >= 384


def test_caption_and_match_print_json(trained, photo, capsys):
  # A step's own folder does as well as the run's.
  step = os.path.join(trained, 'checkpoints', '7')
  predict.main(['--checkpoint', step, '--task', 'caption', '--image', photo,
                '--beams', '2'])
  found = json.loads(capsys.readouterr().out)
  assert set(found) == {'task', 'image', 'caption'}
  assert isinstance(found['caption']['text'], str)
  assert 0 <= found['caption']['score'] <= 1

  predict.main(['--checkpoint', step, '--task', 'match', '--image', photo,
                '--text', 'a red circle', '--text', 'a blue ring'])
  found = json.loads(capsys.readouterr().out)
  assert [m['text'] for m in found['match']] == ['a red circle',
                                                 'a blue ring']
  assert all(0 <= m['score'] <= 1 for m in found['match'])


def test_several_images_give_a_list_and_a_picture_each(trained, photo,
                                                       tmp_path, capsys):
  tall = tmp_path / 'tall.png'
  Image.open(photo).rotate(90, expand=True).save(tall)
  predict.main(['--checkpoint', trained, '--task', 'match', '--text', 'a ring',
                '--image', photo, '--image', str(tall), '--image', photo,
                '--picture', str(tmp_path / 'o.png')])
  found = json.loads(capsys.readouterr().out)
  assert [(f['image']['height'], f['image']['width']) for f in found] == [
      (120, 160), (160, 120), (120, 160)]
  assert found[0]['match'] == found[2]['match'] != found[1]['match']
  assert sorted(p.name for p in tmp_path.glob('o*')) == [
      'o_0.png', 'o_1.png', 'o_2.png']


def test_images_of_a_shape_run_together_and_compile_once(loaded, monkeypatch):
  """Twenty images of two shapes, each with its own texts."""
  predictor, variables = loaded
  rng = np.random.default_rng(2)
  images = [rng.integers(0, 256, (60, 80, 3) if i % 3 else (80, 60, 3),
                         np.uint8) for i in range(20)]
  texts = [['a ring', 'a red star'][:1 + i % 2] for i in range(20)]
  shapes, run = [], predictor.run
  monkeypatch.setattr(predictor, 'run', lambda v, batch, *a, **k: (
      shapes.append(batch['image'].shape), run(v, batch, *a, **k))[1])
  found = predictor.predict(variables, images, 'match', texts)
  assert len(set(shapes)) == 2 and len(shapes) == 3
  assert [[m.text for m in f.match] for f in found] == texts
  for i in (0, 7, 19):
    alone, = predictor.predict(variables, images[i:i + 1], 'match', texts[i])
    assert [m.score for m in alone.match] == pytest.approx(
        [m.score for m in found[i].match], abs=1e-5)
  # Another object of the same task runs the same program.
  monkeypatch.setattr(predictor, 'task', base.load)
  monkeypatch.setattr(match.Task, 'compute',
                      lambda *args, **kwargs: pytest.fail('traced again'))
  predictor.predict(variables, images[:1], 'match', texts[0])


def test_what_predict_takes(loaded, photo):
  predictor, variables = loaded
  assert predictor.predict(variables, [], 'detect') == []
  assert predictor.task_names() == ['caption', 'detect', 'match', 'retrieve']
  ask = lambda *args, **options: predictor.predict(variables, *args, **options)
  for part, args, options in (
      ('expected a list of images', (photo, 'detect'), {}),
      ('--beams: task .* no such option', ([photo], 'detect'), dict(beams=2)),
      ('takes no text', ([photo], 'detect', ['a ring']), {}),
      ('2 lists for 1 images', ([photo], 'match', [['a'], ['b']]), {}),
      ("did you mean 'match'", ([photo], 'matsch', ['a']), {}),
      ('no itc head.*tasks: caption', ([photo], 'embed'), {})):
    with pytest.raises(errors.UserError, match=part):
      ask(*args, **options)


def close(a, b):
  """Whether two JSON values are equal, floats to 1e-4."""
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
  if isinstance(a, list):
    return len(a) == len(b) and all(map(close, a, b))
  return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else a == b


@pytest.mark.parametrize('system', ['e2e_vlp', 'fiber'])
def test_results_are_those_of_the_first_edition(system):
  """Of random models, for two images; written by the code of 5a6402d."""
  with gzip.open(GOLDEN, 'rt') as f:
    golden = json.load(f)
  predictor, variables = small_model.build(golden_config(system))
  photos = golden_photos()
  for task, found in golden['results'][system].items():
    options = {'detect': dict(threshold=0.)}.get(task, {})
    texts = golden['texts'] if base.load(task).takes_text else None
    for one, want in zip(predictor.predict(variables, photos, task, texts,
                                           **options), found):
      assert close(one.to_json(), want), task


def golden_config(system):
  config = importlib.import_module(f'configs.{system}').get_config('tiny')
  config.dtype = 'float32'
  config.data.buckets = ((96, 72), (72, 96), (84, 84))
  if system == 'e2e_vlp':
    config.model.update(dict(width=32, ffn=48, encoder_layers=1,
                             num_queries=5, decoder_layers=1))
    config.model.backbone = dict(name='patch_cnn', stem=8, width=16, blocks=1)
  else:
    config.data.buckets = ((96, 96),)
  return config


def golden_photos():
  rng = np.random.default_rng(1)
  return [np.asarray(Image.fromarray(rng.integers(
      0, 256, (12, 16, 3), np.uint8)).resize(size)) for size in (
          (160, 120), (120, 160), (101, 100), (170, 120))][::3]


def test_every_kind_of_image_works_and_is_upright(loaded, tmp_path):
  predictor, variables = loaded
  pixels = np.asarray(Image.fromarray(np.random.default_rng(1).integers(
      0, 256, (6, 8, 3), np.uint8)).resize((80, 60)))
  image = Image.fromarray(pixels)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
  image.save(tmp_path / 'turned.png', exif=exif)
  image.convert('L').save(tmp_path / 'grey.jpg')
  image.convert('CMYK').save(tmp_path / 'cmyk.jpg')
  Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(
      tmp_path / 'deep.png')

  detect = lambda source: predictor.predict(
      variables, [source], 'detect', threshold=0)[0].to_json()
  turned = detect(str(tmp_path / 'turned.png'))
  assert turned['image'] == {'height': 80, 'width': 60}
  assert turned == detect(np.rot90(pixels, -1))
  for name in ('grey.jpg', 'cmyk.jpg', 'deep.png'):
    assert detect(str(tmp_path / name))['image'] == {'height': 60,
                                                     'width': 80}
  assert detect((tmp_path / 'grey.jpg').read_bytes()) == detect(
      str(tmp_path / 'grey.jpg'))


def test_mistakes_end_with_one_line(trained, photo, tmp_path, capsys):
  common = ['--checkpoint', trained, '--image', photo]
  assert 'text' in fails(capsys, *common, '--task', 'match')
  assert 'text' in fails(capsys, *common, '--task', 'match', '--text', ' ')
  assert "'detect'" in fails(capsys, *common, '--task', 'detec')
  assert 'caption, detect, embed' in fails(capsys, *common, '--task', 'xyz')
  assert 'no itc head' in fails(capsys, *common, '--task', 'embed')
  assert 'takes no text' in fails(capsys, *common, '--task', 'detect',
                                  '--text', 'a ring')
  assert '--threshold' in fails(capsys, *common, '--task', 'detect',
                                '--threshold', '3')
  assert 'cannot be written' in fails(
      capsys, *common, '--task', 'detect', '--json',
      str(tmp_path / 'nowhere' / 'o.json'))
  assert '.png' in fails(capsys, *common, '--task', 'detect', '--picture',
                         str(tmp_path / 'o.xyz'))
  assert 'none found' in fails(capsys, '--checkpoint', str(tmp_path),
                               '--image', photo, '--task', 'detect')
  text = tmp_path / 'text.jpg'
  text.write_text('not a photograph')
  for image in (text, tmp_path / 'absent.jpg'):
    assert image.name in fails(capsys, '--checkpoint', trained, '--image',
                               str(image), '--task', 'detect')
  cut = tmp_path / 'cut.jpg'
  cut.write_bytes(pathlib.Path(photo).read_bytes()[:800])
  assert 'cut.jpg' in fails(capsys, '--checkpoint', trained, '--image',
                            str(cut), '--task', 'detect')


@pytest.mark.parametrize('body, lacking', [
    ('', 'requests {view: (head, ...)}, outputs, result'),
    ("requests = {'joint': ('itm',)}\n  outputs = result = print\n"
     '  needs_text = True', 'sample_texts (or in_samples = False)')])
def test_an_incomplete_task_is_named(tmp_path, monkeypatch, loaded, body,
                                     lacking):
  """Before it is run, and before a training that would draw samples of it."""
  (tmp_path / 'half.py').write_text(
      'from e2e_vlp_jax.tasks import base\n'
      f'class Task(base.Task):\n  summary = "x"\n  {body}\n')
  monkeypatch.setattr(tasks, '__path__', [*tasks.__path__, str(tmp_path)])
  monkeypatch.delitem(sys.modules, 'e2e_vlp_jax.tasks.half', raising=False)
  predictor, _ = loaded
  predictor = predictor_lib.Predictor(predictor.model, predictor.config,
                                      predictor.vocabularies)
  for ask in (lambda: base.load('half'), predictor.task_names):
    with pytest.raises(errors.UserError) as e:
      ask()
    assert str(e.value) == f'tasks/half.py: class Task lacks {lacking}'


def test_a_model_without_text_has_only_detection(tmp_path, photo):
  folder = save(tmp_path, 'detr')
  predictor, variables = predictor_lib.Predictor.from_checkpoint(folder)
  assert predictor.predict(variables, [photo], 'detect')[0].width == 160
  for task in ('caption', 'match'):
    with pytest.raises(errors.UserError, match='its tasks: detect'):
      predictor.predict(variables, [photo], task, ['a dog'])


def test_a_head_that_was_never_trained_is_named(tmp_path, photo):
  folder = save(tmp_path, requests={'image_only': ('detection',)})
  predictor, variables = predictor_lib.Predictor.from_checkpoint(folder)
  with pytest.raises(errors.UserError, match='itm head'):
    predictor.predict(variables, [photo], 'match', ['a dog'])


def test_predict_needs_no_tensorflow(trained, photo, tmp_path):
  code = ('import sys; sys.modules["tensorflow"] = None\n'
          'from e2e_vlp_jax import predict; predict.main()')
  subprocess.run(
      [sys.executable, '-c', code, '--checkpoint', trained, '--task', 'detect',
       '--image', photo, '--picture', str(tmp_path / 'o.jpg')],
      check=True, cwd=REPO, capture_output=True)
