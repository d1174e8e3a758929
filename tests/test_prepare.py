"""`prepare`: official files to records, good ones and bad ones."""
import hashlib
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from e2e_vlp_jax import errors
from e2e_vlp_jax import prepare
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data.datasets.scenes import builder as scenes
from e2e_vlp_jax.data.label_space import LabelSpace

EARLIER = (pathlib.Path(__file__).parent / 'data'
           / 'scenes_of_5a6402d.tar.xz')
HEIGHT, WIDTH = 40, 60
# The picture's red patch, in pixels, and the same as a COCO box.
X0, Y0, X1, Y1 = 10, 4, 34, 18
PATCH = [X0, Y0, X1 - X0, Y1 - Y0]


def run(*argv):
  prepare.main([str(a) for a in argv])


def report(data_dir, name):
  path = records.dataset_folder(str(data_dir), name) + '/' + records.REPORT
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def picture():
  """Grey-blue with a red patch: uint8 [HEIGHT, WIDTH, 3]."""
  image = np.full((HEIGHT, WIDTH, 3), (60, 90, 120), np.uint8)
  image[Y0:Y1, X0:X1] = (220, 30, 30)
  return image


def encode(image, form='JPEG', **options):
  out = io.BytesIO()
  if form == 'JPEG':
    options = dict(quality=95, subsampling=0) | options
  image.save(out, form, **options)
  return out.getvalue()


def png16(image):
  """A 16-bit RGB PNG, which Pillow cannot write."""
  rows = b''.join(b'\0' + (row.astype('>u2') * 257).tobytes()
                  for row in image)
  chunk = lambda kind, data: (
      struct.pack('>I', len(data)) + kind + data
      + struct.pack('>I', zlib.crc32(kind + data)))
  head = struct.pack('>IIBBBBB', image.shape[1], image.shape[0], 16, 2, 0, 0,
                     0)
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head)
          + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


def sideways(orientation):
  """(JPEG bytes, stored PIL image) that is `picture()` once upright."""
  turn = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}[orientation]
  stored = Image.fromarray(picture()).transpose(turn)
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(stored, exif=exif), stored


class Coco:
  """A small dataset in the official layout, one image after another."""

  def __init__(self, source, folder='train2017'):
    self.source, self.folder = source, folder
    self.images, self.objects, self.captions = [], [], []

  def add(self, data, boxes=(PATCH,), captions=('a red patch',), name=None,
          size=(HEIGHT, WIDTH), **more):
    i = len(self.images) + 1
    self.images.append(dict(id=i, file_name=name or f'{i:012d}.jpg',
                            height=size[0], width=size[1], data=data))
    for b in boxes:
      self.objects.append(dict(dict(
          id=100 * i + len(self.objects), image_id=i, bbox=b, category_id=1,
          area=5., iscrowd=0), **more))
    for t in captions:
      self.captions.append(dict(id=len(self.captions), image_id=i, caption=t))
    return i

  def write(self, zipped=False):
    notes = self.source / 'annotations'
    notes.mkdir(parents=True, exist_ok=True)
    images = [{k: v for k, v in i.items() if k != 'data'}
              for i in self.images]
    for kind, found in (('instances', self.objects),
                        ('captions', self.captions)):
      (notes / f'{kind}_{self.folder}.json').write_text(json.dumps(dict(
          images=images, annotations=found,
          categories=[dict(id=1, name='kite'), dict(id=2, name='cup')])))
    files = {i['file_name']: i['data'] for i in self.images
             if i['data'] is not None}
    if zipped:
      with zipfile.ZipFile(self.source / f'{self.folder}.zip', 'w') as z:
        for name, data in files.items():
          z.writestr(f'{self.folder}/{name}', data)
    else:
      folder = self.source / self.folder
      folder.mkdir(exist_ok=True)
      for name, data in files.items():
        (folder / name).write_bytes(data)
    return self.source


@pytest.fixture(name='coco')
def _coco(tmp_path):
  return Coco(tmp_path / 'source')


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """A data folder with few scenes."""
  folder = tmp_path_factory.mktemp('drawn')
  run('scenes', '--data_dir', folder, '--num_train', 12, '--num_validation',
      3, '--num_test', 2, '--num_unseen', 2)
  return folder


def patch_is_in_box(record, bbox):
  """Whether the box holds all red pixels of the stored picture, tightly."""
  image = photographs.decode_image(record['image']).astype(int)
  assert image.shape == (record['height'], record['width'], 3)
  ys, xs = np.nonzero(image[..., 0] - image[..., 2] > 60)
  tight = np.array([ys.min() / image.shape[0], xs.min() / image.shape[1],
                    (ys.max() + 1) / image.shape[0],
                    (xs.max() + 1) / image.shape[1]])
  np.testing.assert_allclose(bbox, tight, atol=.02)
  return True


# Scenes, and what every dataset shares.


def test_scenes_are_read_back_as_they_were_made(drawn):
  split = records.open_split(str(drawn), 'scenes', 'train')
  assert len(split) == 12
  for i in range(len(split)):
    got, made = split.get(i), scenes.example(0, 'train', i)
    assert split.index['num_objects'][i] == len(made['objects'])
    assert split.index['num_texts'][i] == 5
    assert (split.index['height'][i], split.index['width'][i]) == (96, 96)
    assert got.keys() == made.keys()
    for key, value in made.items():
      if key == 'objects':
        for a, b in zip(got[key], value, strict=True):
          np.testing.assert_array_equal(a.pop('bbox'), b.pop('bbox'))
          assert a == b
      elif key in records.OPTIONAL:  # What the builder left out is there.
        plain = lambda x, k=key: {
            **records.OPTIONAL[k], **x, 'bbox': list(x.get('bbox', ())),
            'spans': list(x.get('spans', ()))}
        assert list(map(plain, got[key])) == list(map(plain, value))
      else:
        assert got[key] == value, key


@pytest.fixture
def earlier(tmp_path):
  """Three scenes as the code of 5a6402d prepared them."""
  with tarfile.open(EARLIER) as f:
    f.extractall(tmp_path, filter='data')
  return tmp_path


def test_a_folder_of_an_earlier_version_is_read(drawn, earlier):
  """Without the columns of today: no list is lost, and no record moved."""
  old, new = (records.open_split(str(d), 'scenes', 'train')
              for d in (earlier, drawn))
  for i in range(len(old)):
    assert base.canonical(old.get(i)) == base.canonical(new.get(i))
    assert old.get(i)['questions'][0]['id'] == -1
    assert old.get(i)['statements'][0]['second_record'] == -1
  digest = hashlib.sha256(b''.join(
      base.canonical(scenes.example(0, 'train', i)) for i in range(3)))
  assert report(earlier, 'scenes')['splits']['train']['records_sha256'] == (
      digest.hexdigest())


def test_tfds_reads_it_without_us(drawn):
  source = tfds.builder_from_directory(
      records.dataset_folder(str(drawn), 'scenes')).as_data_source('train')
  assert source[4]['image_id'] == b'train-000004'
  assert len(source[4]['objects']['bbox'][0]) == 4


def test_a_larger_split_begins_with_the_smaller(drawn, tmp_path):
  run('scenes', '--data_dir', tmp_path, '--num_train', 14, '--num_validation',
      0, '--num_test', 0, '--num_unseen', 0)
  few, many = (records.open_split(str(d), 'scenes', 'train')
               for d in (drawn, tmp_path))
  assert (len(few), len(many)) == (12, 14)
  assert [few.get(i)['image'] for i in range(12)] == [
      many.get(i)['image'] for i in range(12)]


def test_many_are_drawn_by_several_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(scenes, '_FEW', 10)
  run('scenes', '--data_dir', tmp_path, '--num_train', 12, '--num_validation',
      0, '--num_test', 0, '--num_unseen', 0)
  split = records.open_split(str(tmp_path), 'scenes', 'train')
  assert [split.get(i)['image'] for i in (0, 11)] == [
      scenes.example(0, 'train', i)['image'] for i in (0, 11)]


def test_second_run_writes_nothing(drawn, capsys):
  folder = records.dataset_folder(str(drawn), 'scenes')
  times = {f: os.stat(os.path.join(folder, f)).st_mtime_ns
           for f in os.listdir(folder)}
  run('scenes', '--data_dir', drawn, '--num_train', 12, '--num_validation', 3,
      '--num_test', 2, '--num_unseen', 2)
  assert 'prepared already' in capsys.readouterr().out
  assert times == {f: os.stat(os.path.join(folder, f)).st_mtime_ns
                   for f in os.listdir(folder)}
  with pytest.raises(errors.UserError, match='prepared with num_train=12'):
    run('scenes', '--data_dir', drawn, '--num_train', 13)


def test_interrupted_run_starts_again(tmp_path):
  argv = ['scenes', '--data_dir', tmp_path, '--num_train', 5,
          '--num_validation', 0, '--num_test', 0, '--num_unseen', 0]
  run(*argv)
  first = report(tmp_path, 'scenes')
  # As if it had been stopped after the shards, and before that once more.
  folder = tmp_path / 'scenes' / '1.0.0'
  (folder / records.REPORT).unlink()
  (folder / 'train.index.npz').unlink()
  stale = tmp_path / 'scenes' / 'incomplete.ABCDEF_1.0.0'
  stale.mkdir()
  with pytest.raises(errors.UserError, match='python -m e2e_vlp_jax.prepare'):
    records.open_split(str(tmp_path), 'scenes', 'train')
  run(*argv)
  assert not stale.exists()
  assert report(tmp_path, 'scenes')['splits'] == first['splits']
  assert len(records.open_split(str(tmp_path), 'scenes', 'train')) == 5


def test_failing_run_leaves_nothing_that_looks_done(tmp_path, coco,
                                                    monkeypatch):
  coco.add(encode(Image.fromarray(picture())))
  coco.write()
  argv = ['coco', '--source', coco.source, '--data_dir', tmp_path / 'out']
  def stop(*_):
    raise KeyboardInterrupt
  with monkeypatch.context() as m:
    m.setattr(image_files.ImageFiles, 'load_all', stop)
    with pytest.raises(KeyboardInterrupt):
      run(*argv)
  with pytest.raises(errors.UserError, match='no prepared dataset'):
    records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  run(*argv)
  assert len(records.open_split(str(tmp_path / 'out'), 'coco', 'train')) == 1


@pytest.mark.parametrize('argv, says', [
    (['cocoo', '--data_dir', 'x'], "did you mean 'coco'"),
    (['coco', '--data_dir', 'x'], 'needs --source'),
    (['scenes'], '--data_dir'),
    (['scenes', '--data_dir', 'x', '--num_trian', '3'], '--num_train'),
    (['scenes', '--data_dir', 'x', '--num_train', 'many'], 'many'),
    (['scenes', '--data_dir', 'x', '--num_train', '-1'], '-1'),
    (['scenes', '--data_dir', 'x', '--limit', '1'], '--limit'),
    (['coco', '--data_dir', 'x', '--source', '/nowhere'],
     '/nowhere/annotations'),
    (['scenes', '--data_dir', __file__], 'test_prepare.py')])
def test_wrong_arguments(argv, says, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError, match=says):
    run(*argv)


def test_exit_code_and_one_line(tmp_path):
  out = subprocess.run(
      [sys.executable, '-m', 'e2e_vlp_jax.prepare', 'sceens', '--data_dir',
       str(tmp_path)], capture_output=True, text=True, check=False)
  assert out.returncode == 2 and 'Traceback' not in out.stderr
  assert out.stderr.strip().splitlines()[-1].endswith(
      "did you mean 'scenes'?")


def test_opening_what_is_not_there(drawn):
  for args, says in (((str(drawn), 'scenes', 'trian'), "mean 'train'"),
                     ((str(drawn), 'coco', 'train'), 'it holds scenes'),
                     (('/nowhere', 'coco', 'train'), 'prepare coco')):
    with pytest.raises(errors.UserError, match=says):
      records.open_split(*args)


# COCO: real photographs.


@pytest.fixture(scope='module')
def real_coco(shared, tmp_path_factory):
  folder = tmp_path_factory.mktemp('coco')
  run('coco', '--source', shared / 'data/coco', '--data_dir', folder,
      '--limit', 6, '--captioned_only')
  return folder


def test_real_photographs(shared, real_coco):
  official = json.loads((shared / 'data/coco/annotations/instances_'
                         'train2017.json').read_text())
  captions = json.loads((shared / 'data/coco/annotations/captions_'
                         'train2017.json').read_text())['annotations']
  names = {c['id']: c['name'] for c in official['categories']}
  sizes = {i['id']: i for i in official['images']}
  split = records.open_split(str(real_coco), 'coco', 'train')
  space = LabelSpace.load('coco')
  assert len(split) == 6
  ids = [int(split.get(i)['image_id']) for i in range(6)]
  both = ({a['image_id'] for a in captions}
          & {a['image_id'] for a in official['annotations']})
  assert ids == sorted(both)[:6]
  for i in range(6):
    r = split.get(i)
    image = sizes[int(r['image_id'])]
    assert (r['height'], r['width']) == (image['height'], image['width'])
    assert r['image'] == (shared / 'data/coco/images/train2017'
                          / image['file_name']).read_bytes()
    assert not r['has_attributes'] and not r['scene_json']
    assert r['texts'] == [c['caption'].strip() for c in captions
                          if c['image_id'] == image['id']]
    theirs = {a['id']: a for a in official['annotations']
              if a['image_id'] == image['id']}
    assert theirs.keys() == {o['id'] for o in r['objects']}
    for o in r['objects']:
      a = theirs[o['id']]
      y0, x0, y1, x1 = o['bbox'] * np.array([r['height'], r['width']] * 2)
      np.testing.assert_allclose([x0, y0, x1 - x0, y1 - y0], a['bbox'],
                                 atol=.1)
      assert o['label'] == names[a['category_id']]
      assert o['is_crowd'] == bool(a['iscrowd'])
      assert o['attributes'] == []
      space.class_id(o['label'])
  found = report(real_coco, 'coco')
  assert found['splits']['train']['skipped'] == {}
  assert len(found['source_sha256']) == 4


# COCO: what files can be like.


def test_unusual_images_work(coco, tmp_path):
  image = Image.fromarray(picture())
  good = encode(image)
  cases = {
      'plain jpeg': good, 'plain png': encode(image, 'PNG'),
      'cmyk': encode(image.convert('CMYK')),
      'rgba': encode(image.convert('RGBA'), 'PNG'),
      'palette': encode(image.quantize(4), 'PNG'),
      'rgb 16 bit': png16(picture()), 'webp': encode(image, 'WEBP')}
  for data in cases.values():
    coco.add(data)
  for orientation in range(2, 9):
    data, stored = sideways(orientation)
    # Boxes of the upright picture ...
    if orientation > 4:
      coco.add(data)
    # ... and of the pixels as they lie in the file.
    red = np.asarray(stored)[..., 0] > 150
    ys, xs = np.nonzero(red)
    coco.add(data, boxes=[[int(xs.min()), int(ys.min()),
                           int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]],
             size=red.shape)
  coco.write()
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  assert len(split) == len(cases) + 11
  for i in range(len(split)):
    r = split.get(i)
    assert (r['height'], r['width']) == (HEIGHT, WIDTH)
    assert patch_is_in_box(r, r['objects'][0]['bbox']), i
    got = photographs.decode_image(r['image']).astype(int)
    # CMYK and WebP change colours a little.
    assert abs(got - picture()).mean() < 12
    stored = Image.open(io.BytesIO(r['image']))
    assert stored.mode == 'RGB' and not stored.getexif().get(0x0112)
  assert [split.get(i)['image'] for i in (0, 1)] == [
      cases['plain jpeg'], cases['plain png']]
  changed = report(tmp_path / 'out', 'coco')['splits']['train']['changed']
  assert sum(changed.values()) == len(split) - 2
  assert changed['image encoded again: 16 bits'] == 1


def test_grey_images_keep_their_brightness(coco, tmp_path):
  grey = picture()[..., 0]
  deep = Image.fromarray(grey.astype(np.uint16) * 257)
  assert deep.mode.startswith('I;16')
  for image, form in ((Image.fromarray(grey), 'JPEG'),
                      (Image.fromarray(grey), 'PNG'), (deep, 'PNG')):
    data = encode(image, form)
    assert abs(photographs.decode_image(data).astype(int)
               - grey[..., None]).max() < 12
    coco.add(data)
  coco.write()
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  for i in range(3):
    got = photographs.decode_image(split.get(i)['image'])
    assert abs(got.astype(int) - grey[..., None]).max() < 12


def test_resized_images_keep_their_boxes(coco, tmp_path):
  coco.add(encode(Image.fromarray(picture()).resize((2 * WIDTH, 2 * HEIGHT),
                                                    0)))
  coco.add(encode(Image.fromarray(picture()).resize((90, 90))))
  coco.write()
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  assert patch_is_in_box(split.get(0), split.get(0)['objects'][0]['bbox'])
  assert split.get(0)['objects'][0]['area'] == 20
  # Of another shape: nobody can tell where the box lies.
  assert split.get(1)['objects'] == []
  (reason,) = report(tmp_path / 'out', 'coco')['splits']['train']['skipped']
  assert '60x40' in reason and '90x90' in reason


def test_broken_images_are_skipped_and_named(coco, tmp_path, capsys):
  good = encode(Image.fromarray(picture()))
  coco.add(good)
  noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3))
  whole = encode(Image.fromarray(noise.astype(np.uint8)))
  coco.add(whole[:len(whole) // 2], name='cut.jpg')
  coco.add(b'not a picture', name='text.jpg')
  coco.add(None, name='gone.jpg')
  coco.add(b'', name='empty.jpg')
  coco.add(encode(Image.fromarray(picture()), 'PNG')[:90], name='cut.png')
  coco.add(good)
  coco.write()
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out',
      '--allow_losses')
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  assert [split.get(i)['image_id'] for i in range(len(split))] == ['1', '7']
  skipped = report(tmp_path / 'out', 'coco')['splits']['train']['skipped']
  named = {n: reason for reason, s in skipped.items() for n in s['names']}
  assert named.keys() == {'cut.jpg', 'text.jpg', 'gone.jpg', 'empty.jpg',
                          'cut.png'}
  assert 'truncated' in named['cut.jpg']
  assert named['text.jpg'] == named['empty.jpg'] == 'image: it is not an image'
  assert 'no such image file' in named['gone.jpg']
  out = capsys.readouterr().out
  assert 'gone.jpg' in out and 'no such image file' in out


def test_bad_boxes_and_captions(coco, tmp_path):
  data = encode(Image.fromarray(picture()))
  coco.add(data, boxes=[
      PATCH, [-10, -10, 20, 20], [50, 30, 100, 100], [100, 100, 5, 5],
      [5, 5, 0, 8], [5, 5, 8, -2], [float('nan'), 1, 2, 3],
      [1, 2, 3, float('inf')], [1, 2, 3], None])
  coco.add(data, boxes=[], captions=[])
  coco.add(data, boxes=[], captions=['', '  ', 'a  patch\n'])
  coco.add(data, category_id=77)
  coco.add(data, iscrowd=1)
  coco.objects.append(dict(coco.objects[0], image_id=999))
  coco.write()
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  boxes = [o['bbox'] for o in split.get(0)['objects']]
  np.testing.assert_allclose(boxes, [
      [Y0 / HEIGHT, X0 / WIDTH, Y1 / HEIGHT, X1 / WIDTH],
      [0, 0, 10 / HEIGHT, 10 / WIDTH],
      [30 / HEIGHT, 50 / WIDTH, 1, 1]], rtol=1e-6)
  assert [(len(split.get(i)['objects']), split.get(i)['texts'])
          for i in (1, 2, 3, 4)] == [(0, []), (0, ['a patch']),
                                     (0, ['a red patch']),
                                     (1, ['a red patch'])]
  assert split.get(4)['objects'][0]['is_crowd']
  r = report(tmp_path / 'out', 'coco')['splits']['train']
  assert {k: v['count'] for k, v in r['skipped'].items()} == {
      'box: outside the image': 1, 'box: no area': 2,
      'box: not four finite numbers': 4, 'box: category 77 is not listed': 1,
      'empty caption': 2, 'annotations of an image that is not listed': 1}
  assert r['changed'] == {'box clipped to the image': 2}
  assert (r['images'], r['texts'], r['boxes']) == (5, 4, 4)


def test_captioned_only_and_limit_count_what_is_kept(coco, tmp_path):
  data = encode(Image.fromarray(picture()))
  coco.add(data, captions=[])
  coco.add(data, boxes=[])
  coco.add(b'broken')
  coco.add(data, boxes=[[0, 0, 0, 0]])
  coco.add(data, captions=[' '])
  kept = [str(coco.add(data)) for _ in range(4)]
  coco.write()
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out',
      '--captioned_only', '--limit', 3)
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  assert [split.get(i)['image_id'] for i in range(len(split))] == kept[:3]


def test_images_in_a_zip(coco, tmp_path):
  data = encode(Image.fromarray(picture()))
  for _ in range(3):
    coco.add(data)
  coco.write(zipped=True)
  run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')
  split = records.open_split(str(tmp_path / 'out'), 'coco', 'train')
  assert [split.get(i)['image'] for i in range(3)] == [data] * 3


def test_source_inside_the_data_folder_is_left_alone(tmp_path):
  coco = Coco(tmp_path / 'coco')
  coco.add(encode(Image.fromarray(picture())))
  coco.write()
  for _ in range(2):
    run('coco', '--source', coco.source, '--data_dir', tmp_path)
  assert (coco.source / 'train2017' / '000000000001.jpg').exists()
  assert len(records.open_split(str(tmp_path), 'coco', 'train')) == 1


def test_nothing_usable_is_an_error(coco, tmp_path):
  argv = ['coco', '--source', coco.source, '--data_dir', tmp_path / 'out']
  coco.add(None)
  coco.add(b'broken')
  coco.write()
  with pytest.raises(errors.UserError, match='none of 2 images can be used'):
    run(*argv)
  with pytest.raises(errors.UserError, match='no image to keep'):
    coco.captions.clear()
    coco.write()
    run(*argv, '--captioned_only')
  (coco.source / 'annotations' / 'captions_train2017.json').unlink()
  with pytest.raises(errors.UserError, match='captions_train2017.json'):
    run(*argv)


@pytest.mark.parametrize('content, says', [
    ('{"images": [', 'not readable JSON'), ('[]', "no list 'images'"),
    ('{"images": []}', "no list 'annotations'"),
    ('{"images": [{"id": 1}], "annotations": []}', "has no 'file_name'"),
    ('{"images": [{"id": 1, "file_name": "a", "height": 0, "width": 2}], '
     '"annotations": []}', 'height is 0')])
def test_malformed_annotations(coco, tmp_path, content, says):
  coco.add(encode(Image.fromarray(picture())))
  coco.write()
  (coco.source / 'annotations/instances_train2017.json').write_text(content)
  with pytest.raises(errors.UserError, match=says) as e:
    run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')
  assert 'instances_train2017.json' in str(e.value)


def test_missing_image_folder(coco, tmp_path):
  coco.add(None)
  coco.write()
  (coco.source / 'train2017').rmdir()
  with pytest.raises(errors.UserError, match='train2017.zip'):
    run('coco', '--source', coco.source, '--data_dir', tmp_path / 'out')


def test_decode_errors_name_the_file(tmp_path):
  bad = tmp_path / 'bad.jpg'
  bad.write_text('hello')
  for path, says in ((bad, 'not an image'), (tmp_path, 'no image file'),
                     (tmp_path / 'none.jpg', 'no image file')):
    with pytest.raises(errors.UserError, match=says) as e:
      photographs.decode_image(path)
    assert path.name in str(e.value)
  data, _ = sideways(6)
  (tmp_path / 'turned.jpg').write_bytes(data)
  got = photographs.decode_image(str(tmp_path / 'turned.jpg'))
  assert got.dtype == np.uint8 and got.shape == (HEIGHT, WIDTH, 3)
  assert abs(got.astype(int) - picture()).mean() < 3


# NLVR v1.


@pytest.fixture(scope='module')
def real_nlvr(shared, tmp_path_factory):
  folder = tmp_path_factory.mktemp('nlvr')
  run('nlvr1', '--source', shared / 'data/nlvr', '--data_dir', folder,
      '--limit', 60)
  return folder


def test_nlvr_sentences_and_boxes(shared, real_nlvr):
  space = LabelSpace.load('joint')
  for name in ('dev', 'test'):
    split = records.open_split(str(real_nlvr), 'nlvr1', name)
    rows = [json.loads(line) for line in (
        shared / f'data/nlvr/{name}/{name}.json').read_text().splitlines()]
    derived = json.loads((shared / f'data/nlvr/{name}/objects_{name}_coco_'
                          'style.json').read_text())
    boxes = [sorted(a['bbox'] for a in derived['annotations']
                    if a['image_id'] == i['id'])
             for i in sorted(derived['images'], key=lambda i: i['id'])]
    assert len(split) == 60
    for i in range(60):
      r, row = split.get(i), rows[i]
      assert r['image_id'] == f'{name}-{row["identifier"]}-0'
      assert (r['height'], r['width']) == (100, 400)
      true = row['label'] == 'true'
      sentence = ' '.join(row['sentence'].split())
      assert r['texts'] == ([sentence] if true else [])
      (s,) = r['statements']
      assert (s['label'], s['second_image']) == (true, b'')
      assert s['statement'] == sentence
      got = []
      image = photographs.decode_image(r['image'])
      for o in r['objects']:
        space.class_id(o['label'])
        for a in o['attributes']:
          space.attribute_id(a)
        y0, x0, y1, x1 = np.rint(o['bbox'] * [100, 400, 100, 400]).astype(int)
        got.append([x0, y0, x1 - x0, y1 - y0])
        r_, g, b = image[(y0 + y1) // 2, (x0 + x1) // 2].astype(int)
        seen = ('black' if max(r_, g, b) < 60 else
                'blue' if b > r_ + 60 else 'yellow')
        assert o['attributes'] == [seen, {10: 'small', 20: 'medium',
                                          30: 'large'}[x1 - x0]]
      assert sorted(got) in boxes
  assert report(real_nlvr, 'nlvr1')['splits']['dev']['images'] == 60


def test_nlvr_bad_lines(shared, tmp_path):
  with pytest.raises(errors.UserError, match='dev/dev.json'):
    run('nlvr1', '--source', tmp_path, '--data_dir', tmp_path / 'out')
  line = (shared / 'data/nlvr/dev/dev.json').read_text().splitlines()[0]
  (tmp_path / 'dev' / 'images').mkdir(parents=True)
  for bad in ('{', '{}', line.replace('"label":"true"', '"label":"maybe"'),
              line.replace('Yellow', 'Mauve'), '[]'):
    (tmp_path / 'dev' / 'dev.json').write_text(f'{line}\n{bad}\n')
    with pytest.raises(errors.UserError, match='dev.json:2'):
      run('nlvr1', '--source', tmp_path, '--data_dir', tmp_path / 'out')


# Label spaces.


def test_label_spaces():
  for name in ('scenes', 'coco', 'joint'):
    space = LabelSpace.load(name)
    assert LabelSpace.from_dict(json.loads(json.dumps(
        space.to_dict()))) == space
    for ids, names in ((space.class_id, space.classes),
                       (space.attribute_id, space.attributes)):
      assert [ids(n) for n in names] == list(range(len(names)))
  joint, coco = LabelSpace.load('joint'), LabelSpace.load('coco')
  assert joint.classes[:80] == coco.classes and len(coco.classes) == 80
  assert joint.class_id('television') == joint.class_id('tv')
  scenes_ = LabelSpace.load('scenes')
  assert set(scenes_.classes) <= set(joint.classes)
  assert set(scenes_.attributes) <= set(joint.attributes)
  with pytest.raises(errors.UserError, match="mean 'circle'"):
    scenes_.class_id('cirle')
  with pytest.raises(errors.UserError, match="mean 'yellow'"):
    scenes_.attribute_id('yelow')
  with pytest.raises(errors.UserError, match="mean 'scenes'"):
    LabelSpace.load('sceness')


def test_joint_space_has_every_visual_genome_name(shared):
  joint = LabelSpace.load('joint')
  folder = shared / 'data/vocab/visual_genome_1600-400-20'
  for file, ids in (('objects_vocab.txt', joint.class_id),
                    ('attributes_vocab.txt', joint.attribute_id)):
    lines = (folder / file).read_text().splitlines()
    assert len(lines) in (1600, 400)
    for line in lines:
      for name in line.split(','):
        ids(name.strip())
