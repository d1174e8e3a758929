"""predict: one file in, the promised JSON and a picture out."""
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import predict
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.training import checkpointer
from e2e_vlp_jax.training import workdir as workdir_lib
from e2e_vlp_jax.training import train_step

REPO = pathlib.Path(__file__).resolve().parent.parent


def save(folder, size='tiny', requests=None, **model):
  """A checkpoint of an untrained small model."""
  config = config_lib.get_config(size)
  config.dtype = 'float32'
  config.model.update(dict(width=32, heads=4, ffn=48, num_queries=5,
                           encoder_layers=1, decoder_layers=1))
  config.model.backbone = dict(name='patch_cnn', stem=8, width=16, blocks=1)
  config.model.update(model)
  config.data.buckets = ((96, 72), (72, 96), (84, 84))
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  sizes = vocabularies.sizes
  net = models.build(config, **sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=1, **sizes)
  shapes = dict(jax.eval_shape(
      lambda: net.init(jax.random.key(0), batch, requests or net.views)))
  # Compiling `init` would take longer than all the rest.
  rng = np.random.default_rng(0)
  values = jax.tree.map(
      lambda x: rng.normal(0, .2, x.shape).astype(x.dtype), shapes)
  state = train_step.TrainState(
      step=np.int32(7), params=values.pop('params'), model_state=values,
      opt_state=(), ema_params=None, rng=jax.random.key(0),
      bad_steps=np.int32(0))
  saver = checkpointer.Checkpointer(
      str(folder), {'config': workdir_lib.to_dict(config), **vocabularies.to_dict()},
      config.checkpoint)
  saver.save(7, state)
  saver.wait()
  return str(folder)


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
  with pytest.raises(SystemExit) as e:
    predict.main(list(argv))
  assert e.value.code == 2
  message = capsys.readouterr().err
  assert message.count('\n') == 1 and message.startswith('error: '), message
  return message


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
  for thing in found['objects']:
    assert set(thing) == {'label', 'score', 'box', 'attributes'}
    x0, y0, x1, y1 = thing['box']
    assert 0 <= x0 <= x1 <= 160 and 0 <= y0 <= y1 <= 120
    assert 0 <= thing['score'] <= 1
    assert {'label', 'score'} == set(thing['attributes'][0])
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


def test_a_single_text_may_be_a_string(loaded, photo):
  found = loaded[0].predict(loaded[1], photo, 'match', 'a ring')
  assert [m['text'] for m in found['match']] == ['a ring']


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

  detect = lambda source: predictor.predict(variables, source, 'detect',
                                            threshold=0)
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
  assert 'no vqa head' in fails(capsys, *common, '--task', 'answer',
                                '--text', 'what?')
  assert 'no grounding head' in fails(capsys, *common, '--task', 'ground')
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


def test_a_model_without_text_has_only_detection(tmp_path, photo):
  folder = save(tmp_path, 'detr')
  predictor, variables = predictor_lib.Predictor.from_checkpoint(folder)
  assert predictor.predict(variables, photo, 'detect')['objects'] is not None
  for task in ('caption', 'match'):
    with pytest.raises(errors.UserError, match='its tasks: detect'):
      predictor.predict(variables, photo, task, 'a dog')


def test_a_head_that_was_never_trained_is_named(tmp_path, photo):
  folder = save(tmp_path, requests={'image_only': ('detection',)})
  predictor, variables = predictor_lib.Predictor.from_checkpoint(folder)
  with pytest.raises(errors.UserError, match='itm head'):
    predictor.predict(variables, photo, 'match', 'a dog')


def test_predict_needs_no_tensorflow(trained, photo, tmp_path):
  code = ('import sys; sys.modules["tensorflow"] = None\n'
          'from e2e_vlp_jax import predict; predict.main()')
  subprocess.run(
      [sys.executable, '-c', code, '--checkpoint', trained, '--task', 'detect',
       '--image', photo, '--picture', str(tmp_path / 'o.jpg')],
      check=True, cwd=REPO, capture_output=True)
