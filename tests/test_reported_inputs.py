"""Inputs from public reports of other projects, each with its right answer.

They lie in the shared reference data, cases/NN_name, with their sources.
"""
import json
import zipfile

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import prepare
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data import records

RED = [30, 20, 70, 50]  # x0 y0 x1 y1 of the red rectangle in every picture


@pytest.fixture
def case(shared, tmp_path, capsys):
  """Prepares an input: (records of train, report of train, what was printed).

  Raises what `prepare` raises.
  """
  def run(path, *argv, name='coco'):
    source = shared / 'cases' / path
    assert source.is_dir(), source
    data = tmp_path / 'data'
    prepare.main([*([name] if name != 'web' else ['pairs', '--name', 'web']),
                  '--source', str(source), '--data_dir', str(data), *argv])
    split = records.open_split(str(data), name, 'train')
    with open(f'{records.dataset_folder(str(data), name)}/{records.REPORT}',
              encoding='utf-8') as f:
      report = json.load(f)['splits']['train']
    return ([split.get(i) for i in range(len(split))], report,
            ''.join(capsys.readouterr()))
  return run


def pixels(record):
  """The boxes of a record as x0 y0 x1 y1 in pixels."""
  h, w = record['height'], record['width']
  return [[round(float(v), 1) for v in np.array(o['bbox'])[[1, 0, 3, 2]]
           * [w, h, w, h]] for o in record['objects']]


def reasons(report):
  return {k: v['count'] for k, v in report['skipped'].items()}


def is_right(record, label='person'):
  """One box around the red rectangle."""
  image = photographs.decode_image(record['image']).astype(int)
  red = image[..., 0] - image[..., 2] > 100
  ys, xs = np.nonzero(red)
  tight = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
  assert np.abs(np.array(tight) - RED).max() <= 1
  assert [o['label'] for o in record['objects']] == [label]
  np.testing.assert_allclose(pixels(record), [RED], atol=.1)
  return True


def test_a_category_id_as_text(case):
  (record,), report, _ = case('01_category_id_text/input')
  assert is_right(record, 'car') and not report['skipped']


def test_flags_as_text(case):
  (record,), report, said = case('02_iscrowd_text/input')
  assert [o['is_crowd'] for o in record['objects']] == [False] * 5 + [True] * 2
  assert report['crowds'] == 2 and '7 boxes, of which 2 crowds' in said


def test_ids_that_repeat(case):
  with pytest.raises(errors.UserError, match=(
      "same id 1, but differ: file_name 'a.png' and 'b.png'")):
    case('03_duplicate_ids/input_a')


@pytest.mark.parametrize('which, wrong', [('nan', 2), ('text', 1)])
def test_areas_that_are_no_numbers(case, which, wrong):
  (record,), report, _ = case(f'04_area/input_{which}')
  areas = [o['area'] for o in record['objects']]
  assert areas == [1200.] * len(areas)
  assert report['changed'] == {"area replaced by the box's": wrong}


def test_half_an_emoji_in_a_text(case):
  found, report, _ = case('06_half_an_emoji/input_caption')
  assert [r['texts'] for r in found] == [['nice dog \ufffd'], ['fine']]
  assert sum(report['changed'].values()) == 1


def test_half_an_emoji_in_a_category(case):
  (record,), report, _ = case('06_half_an_emoji/input_category')
  assert is_right(record, 'car\ufffd') and sum(report['changed'].values()) == 1


def test_half_an_emoji_in_a_file_name(case):
  (record,), report, said = case('06_half_an_emoji/input_file_name')
  assert is_right(record)
  assert reasons(report)['image: no such image file'] == 1
  assert '\\ud83d' in said  # What was printed can be printed.


@pytest.mark.parametrize('which, left', [
    ('jsonl', 2), ('jsonl_name', 1), ('tar', 2)])
def test_half_an_emoji_in_pairs(case, which, left):
  found, report, _ = case(f'06_half_an_emoji/pairs_{which}', name='web')
  assert len(found) == left
  assert all(t.encode() for r in found for t in r['texts'])
  assert sum(report['changed'].values()) + sum(reasons(report).values()) == 1


def test_captions_of_shards_that_are_no_text(case):
  found, report, _ = case('07_shard_caption/input_nan', name='web')
  assert found and all(r['texts'] for r in found)
  assert reasons(report)['image: no text'] >= 1


def test_captions_of_shards_that_are_lists(case):
  found, report, _ = case('07_shard_caption/input_list', name='web')
  assert max(len(r['texts']) for r in found) > 1 and not report['skipped']


def test_a_damaged_member_of_a_zip(case):
  (record,), report, said = case('08_zip/input_damaged')
  assert is_right(record) and 'warning' not in said
  (reason,) = report['skipped']
  assert reason.startswith('image: it cannot be read: ')


def test_encrypted_and_deflate64(case, shared, tmp_path):
  with pytest.raises(errors.UserError, match=(
      'train2017.zip.*encrypted; unpack the file')):
    case('08_zip/input_encrypted')
  # Python cannot write Deflate64: the number of the method is changed.
  source = tmp_path / 'source'
  notes = source / 'annotations'
  notes.mkdir(parents=True)
  official = shared / 'cases/08_zip/input_encrypted/annotations'
  for path in official.iterdir():
    (notes / path.name).write_bytes(path.read_bytes())
  archive = source / 'train2017.zip'
  with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as z:
    z.writestr('train2017/a.png', b'0' * 99)
  data = bytearray(archive.read_bytes())
  data[data.index(b'PK\1\2') + 10] = 9
  archive.write_bytes(data)
  with pytest.raises(errors.UserError, match=(
      r'train2017.zip.*compression method 9 \(Deflate64\); unpack')):
    prepare.main(['coco', '--source', str(source), '--data_dir',
                  str(tmp_path / 'x')])


def test_a_quotation_mark_that_is_not_closed(case):
  with pytest.raises(errors.UserError, match='row that begins in line 3 '):
    case('09_csv/input_quote', name='web')


def test_values_of_images(case):
  (record,), report, said = case('12_image_values/input',
                                 '--allow_losses')
  assert is_right(record)
  image = photographs.decode_image(record['image'])
  outside = np.ones(image.shape[:2], bool)
  outside[20:50, 30:70] = False
  assert (image[outside] == 255).all()  # None of the hidden noise.
  assert 'image encoded again: mode RGBA, transparency, drawn on white' in (
      report['changed'])
  named = {n: r for r, s in report['skipped'].items() for n in s['names']}
  assert named.keys() == {'tfloat01.tif', 'tfloat16.tif', 'ti32.tif'}
  assert 'floats' in named['tfloat01.tif']
  assert '32-bit integers' in named['ti32.tif']
  assert 'warning: coco train: only 1 of 4 images can be used' in said


def test_nothing_but_crowds(case):
  found, report, said = case('14_all_crowd/input')
  assert len(found) == report['boxes'] == report['crowds'] == 4
  assert 'warning: coco train: all 4 boxes are crowds' in said


@pytest.mark.parametrize('which, count', [('backslash', 3), ('unicode', 4)])
def test_names_of_files(case, which, count):
  found, report, _ = case(f'16_names_of_files/input_{which}')
  assert len(found) == count and all(map(is_right, found))
  assert report['changed'] == {'image found under a similar name': 2}


def test_boxes_without_captions(case):
  (record,), report, said = case('17_no_captions/input_only_boxes')
  assert is_right(record) and record['texts'] == []
  assert report['skipped']['annotations: no such file']['names'] == [
      'captions_train2017.json']
  assert 'captions_train2017.json' in said


def test_captions_without_boxes(case):
  (record,), _, _ = case('17_no_captions/input_only_captions')
  assert record['objects'] == [] and record['texts'] == ['a red thing']


@pytest.mark.parametrize('which', ['label_studio', 'upside_down'])
def test_boxes_of_upright_pictures(case, which, tmp_path):
  (record,), report, said = case(f'18_exif_conventions/input_{which}')
  assert report['turned'] == 1 and 'turned 1: boxes' in said
  assert pixels(record) != [RED]  # They are turned with the picture ...
  (tmp_path / 'data').rename(tmp_path / 'other')
  (record,), report, said = case(f'18_exif_conventions/input_{which}',
                                 '--upright')
  assert is_right(record) and report['turned'] == 0  # ... unless asked not to.


def test_other_images_show_how_boxes_were_drawn(tmp_path, capsys):
  """Of a picture on its side the size tells; of one upside down it does not."""
  notes = tmp_path / 'annotations'
  notes.mkdir()
  (tmp_path / 'train2017').mkdir()
  for k, orientation in enumerate((6, 3)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (20, 30) if k == 0 else (30, 20)).save(
        tmp_path / 'train2017' / f'{k}.jpg', exif=exif)
  (notes / 'instances_train2017.json').write_text(json.dumps(dict(
      images=[dict(id=k, file_name=f'{k}.jpg', width=30, height=20)
              for k in range(2)],
      annotations=[dict(id=k, image_id=k, category_id=1, bbox=[1, 2, 3, 4])
                   for k in range(2)], categories=[dict(id=1, name='dog')])))
  prepare.main(['coco', '--source', str(tmp_path), '--data_dir',
                str(tmp_path / 'data')])
  assert ('turned 1: boxes turned with their pictures (EXIF); if they were '
          'drawn on upright pictures, as 1 others were, use --upright') in (
              capsys.readouterr().out)
