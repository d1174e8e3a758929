"""`prepare own`: what labelling tools write, and training on it."""
import io
import json
import os
import random

import numpy as np
from PIL import Image
import pytest
import yaml

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import evaluate
from e2e_vlp_jax import prepare
from e2e_vlp_jax import train
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import checkpoint

HEIGHT, WIDTH = 80, 120
BOX = [30, 20, 40, 30]       # x, y, w, h of the picture's red patch
ROW = '.416667 .4375 .333333 .375'  # the same, as YOLO has it


def own(source, data_dir, *argv, name='mine'):
  prepare.main(['own', '--name', name, '--source', str(source), '--data_dir',
                str(data_dir), *map(str, argv)])


def read(data_dir, split='train', name='mine'):
  found = records.open_split(str(data_dir), name, split)
  return [found.get(i) for i in range(len(found))]


def report(data_dir, name='mine'):
  folder = records.dataset_folder(str(data_dir), name)
  with open(os.path.join(folder, records.REPORT), encoding='utf-8') as f:
    return json.load(f)


def classes(data_dir, name='mine'):
  return records.label_space(str(data_dir), name).classes


def picture(orientation=None):
  """Grey, with a red patch at BOX: bytes of a PNG."""
  image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
  x, y, w, h = BOX
  image[y:y + h, x:x + w] = (220, 30, 30)
  out, more = io.BytesIO(), {}
  image = Image.fromarray(image)
  if orientation:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, more = image.transpose(Image.Transpose.ROTATE_180), {'exif': exif}
  image.save(out, 'PNG', **more)
  return out.getvalue()


def put(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    path.write_text(content if isinstance(content, str)
                    else json.dumps(content))


def coco(count=3, categories=((0, 'cup'), (7, 'kite')), **more):
  """The content of a JSON file: one box an image, of its classes in turn."""
  return dict(dict(
      images=[dict(id=i, file_name=f'{i}.png', width=WIDTH, height=HEIGHT)
              for i in range(count)],
      annotations=[dict(id=i, image_id=i, bbox=BOX, category_id=categories[
          i % len(categories)][0]) for i in range(count)],
      categories=[dict(id=i, name=n) for i, n in categories]), **more)


def put_pictures(folder, count=3):
  for i in range(count):
    put(folder / f'{i}.png', picture())


def assert_patch(record, label):
  box, = record['objects']
  assert box['label'] == label and not box['is_crowd']
  y0, x0, y1, x1 = box['bbox'] * [HEIGHT, WIDTH, HEIGHT, WIDTH]
  np.testing.assert_allclose([x0, y0, x1 - x0, y1 - y0], BOX, atol=1e-3)
  np.testing.assert_allclose(box['area'], BOX[2] * BOX[3], rtol=1e-4)


# --- Real photographs, rewritten as labelling tools do -----------------------
@pytest.fixture(scope='module')
def photographs(shared):
  """(content of the official file, folder of its images)."""
  folder = shared / 'data' / 'coco'
  with open(folder / 'annotations' / 'instances_val2017.json') as f:
    return json.load(f), folder / 'images' / 'val2017'


def truth(content):
  """{file name: [(label, box in [0, 1], crowd)]}, computed on its own."""
  names = {c['id']: c['name'] for c in content['categories']}
  images = {i['id']: i for i in content['images']}
  found = {i['file_name']: [] for i in content['images']}
  for a in content['annotations']:
    i = images[a['image_id']]
    x, y, w, h = a['bbox']
    size = np.array([i['width'], i['height']] * 2)
    box = np.clip(np.array([x, y, x + w, y + h]) / size, 0, 1)
    found[i['file_name']].append(
        (names[a['category_id']], box, bool(a['iscrowd'])))
  return found


def assert_same_objects(record, want, atol):
  assert [o['label'] for o in record['objects']] == [w[0] for w in want]
  assert [o['is_crowd'] for o in record['objects']] == [w[2] for w in want]
  np.testing.assert_allclose(
      [o['bbox'][[1, 0, 3, 2]] for o in record['objects']] or [[0] * 4],
      [w[1] for w in want] or [[0] * 4], atol=atol, rtol=0)


def test_photographs_as_coco(photographs, tmp_path):
  """Ids from 0, shuffled; subfolders; a third annotated at half size."""
  content, folder = photographs
  rng = random.Random(0)
  shuffled = lambda items: rng.sample(items, len(items))
  categories = [dict(id=k, name=c['name']) for k, c in enumerate(
      shuffled(content['categories']))]
  numbers = {c['name']: c['id'] for c in categories}
  names = {c['id']: c['name'] for c in content['categories']}
  images, place, scale = [], {}, {}
  for k, i in enumerate(shuffled(content['images'])):
    half = k % 3 == 0
    width, height = (i[s] // 2 if half else i[s] for s in ('width', 'height'))
    scale[i['id']] = width / i['width'], height / i['height']
    place[i['id']] = k
    images.append(dict(id=k, width=width, height=height,
                       file_name=f'batch_{k % 2}/{i["file_name"]}'))
    put(tmp_path / 'images' / images[-1]['file_name'],
        (folder / i['file_name']).read_bytes())
  annotations = []
  for k, a in enumerate(content['annotations']):  # Their order stays.
    sx, sy = scale[a['image_id']]
    x, y, w, h = a['bbox']
    new = dict(id=k, image_id=place[a['image_id']],
               bbox=[x * sx, y * sy, w * sx, h * sy],
               category_id=numbers[names[a['category_id']]])
    if k % 2 or a['iscrowd']:
      new.update(iscrowd=a['iscrowd'], area=a['area'] * sx * sy)
    annotations.append(new)
  put(tmp_path / 'annotations' / 'instances_default.json', dict(
      images=shuffled(images), annotations=annotations,
      categories=categories))
  own(tmp_path, tmp_path / 'd', '--validation_share', .25)
  found = read(tmp_path / 'd') + read(tmp_path / 'd', 'validation')
  names_of = {str(i['id']): os.path.basename(i['file_name']) for i in images}
  want = truth(content)
  assert sorted(names_of[r['image_id']] for r in found) == sorted(want)
  assert len(read(tmp_path / 'd', 'validation')) == round(len(images) / 4)
  for record in found:
    assert_same_objects(record, want[names_of[record['image_id']]], 2e-7)
  areas = {a['id']: a['area'] for a in content['annotations']}
  for record in found:
    for o in record['objects']:
      if o['id'] % 2:
        np.testing.assert_allclose(
            o['area'], areas[content['annotations'][o['id']]['id']], rtol=1e-2)
  assert classes(tmp_path / 'd') == [c['name'] for c in categories]
  assert not any(s['skipped'] for s in report(tmp_path / 'd')[
      'splits'].values())


@pytest.mark.parametrize('tool', ['ultralytics', 'roboflow', 'darknet'])
def test_photographs_as_yolo(photographs, tmp_path, tool):
  """Six decimals, as the tools write them."""
  content, folder = photographs
  names = [c['name'] for c in content['categories']]
  number = {c['id']: k for k, c in enumerate(content['categories'])}
  images = {i['id']: i for i in content['images']}
  rows = {i: [] for i in images}
  for a in content['annotations']:
    i, (x, y, w, h) = images[a['image_id']], a['bbox']
    rows[i['id']].append(' '.join([str(number[a['category_id']])] + [
        f'{v:.6f}' for v in ((x + w / 2) / i['width'],
                             (y + h / 2) / i['height'], w / i['width'],
                             h / i['height'])]))
  pictures, labels = {
      'ultralytics': ('images/train2017', 'labels/train2017'),
      'roboflow': ('train/images', 'train/labels'),
      'darknet': ('obj_train_data',) * 2}[tool]
  for i, image in images.items():
    name = image['file_name']
    put(tmp_path / pictures / name, (folder / name).read_bytes())
    if rows[i] or i % 2:  # Without objects: an empty file, or none.
      put(tmp_path / labels / name.replace('.jpg', '.txt'),
          '\n'.join(rows[i]))
  if tool == 'darknet':
    put(tmp_path / 'obj.names', '\n'.join(names) + '\n')
  else:
    put(tmp_path / 'data.yaml', yaml.safe_dump(
        {'train': '../train/images', 'val': '../valid/images',
         'nc': len(names), 'names': names} if tool == 'roboflow' else
        {'path': '/home/me/datasets/coco', 'train': 'images/train2017',
         'names': dict(enumerate(names))}))
  own(tmp_path, tmp_path / 'd', '--validation_share', 0)
  want = {k: [(*w[:2], False) for w in v] for k, v in truth(content).items()}
  found = read(tmp_path / 'd')
  assert len(found) == len(images)
  for record in found:
    assert_same_objects(
        record, want[os.path.basename(record['image_id']) + '.jpg'], 1.1e-6)
  assert classes(tmp_path / 'd') == names
  assert not report(tmp_path / 'd')['splits']['train']['skipped']


# --- Layouts -----------------------------------------------------------------
def roboflow(source):
  content = coco()
  content['categories'].insert(0, dict(id=99, name='kite',
                                       supercategory='none'))
  for split in ('train', 'valid', 'test'):
    put(source / split / '_annotations.coco.json', content)
    put_pictures(source / split)


def cvat(source):
  put(source / 'annotations' / 'instances_default.json', coco())
  put(source / 'annotations' / 'person_keypoints_default.json', coco())
  put_pictures(source / 'images' / 'default')


def label_studio(source):
  content = coco()
  for i in content['images']:
    i['file_name'] = f'images/{i["file_name"]}'
  put(source / 'result.json', content)
  put_pictures(source / 'images')


def above(source):
  put(source / 'labels_train.json', coco())
  put(source / 'labels_val.json', coco())
  put_pictures(source / 'images' / 'train')
  put_pictures(source / 'val')


def label_studio_yolo(source):
  put(source / 'classes.txt', 'cup\nkite\n')
  put(source / 'notes.json', {'categories': [], 'info': {}})
  put_pictures(source / 'images')
  for i in range(3):
    put(source / 'labels' / f'{i}.txt', f'{i % 2} {ROW}\n')


def ultralytics(source):
  put(source / 'data.yaml', 'train: images/train\nval: images/val\n'
      'names:\n  0: cup\n  1: kite\n')
  for split in ('train', 'val'):
    put_pictures(source / 'images' / split)
    for i in range(3):
      put(source / 'labels' / split / f'{i}.txt', f'{i % 2} {ROW}\n')


@pytest.mark.parametrize('write, splits', [
    (roboflow, {'train': 3, 'validation': 3, 'test': 3}),
    (cvat, {'train': 2, 'validation': 1}),
    (label_studio, {'train': 2, 'validation': 1}),
    (above, {'train': 3, 'validation': 3}),
    (label_studio_yolo, {'train': 2, 'validation': 1}),
    (ultralytics, {'train': 3, 'validation': 3})])
def test_layouts(write, splits, tmp_path):
  write(tmp_path / 's')
  own(tmp_path / 's', tmp_path / 'd', '--validation_share', .3)
  held = report(tmp_path / 'd')['splits']
  assert {s: r['images'] for s, r in held.items()} == splits
  for split in splits:
    for record in read(tmp_path / 'd', split):
      number = int(record['image_id'].rpartition('/')[2])
      assert_patch(record, ['cup', 'kite'][number % 2])
  assert classes(tmp_path / 'd') == ['cup', 'kite']
  assert not any(r['skipped'] for r in held.values())


def test_captions_with_and_without_boxes(tmp_path):
  captions = coco(categories=((1, 'x'),))
  captions['annotations'] = [dict(id=k, image_id=k, caption=f' Cup {k} ')
                             for k in range(3)]
  del captions['categories']
  put_pictures(tmp_path / 's' / 'train')
  put(tmp_path / 's' / 'annotations' / 'captions_train.json', captions)
  own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0)
  assert [r['texts'] for r in read(tmp_path / 'd')] == [
      ['Cup 0'], ['Cup 1'], ['Cup 2']]
  assert classes(tmp_path / 'd') == []
  put(tmp_path / 's' / 'annotations' / 'instances_train.json', coco())
  own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0, name='both')
  first = read(tmp_path / 'd', name='both')[0]
  assert_patch(first, 'cup')
  assert first['texts'] == ['Cup 0']
  assert records.prepared(str(tmp_path / 'd')) == ['both', 'mine']


def test_yolo_rows_of_all_kinds(tmp_path):
  """Polygons, scores, upright pictures; what cannot be read is counted."""
  put(tmp_path / 's' / 'data.yaml', 'names: [cup, 7]')
  put_pictures(tmp_path / 's' / 'images', 2)
  put(tmp_path / 's' / 'images' / 'turned.png', picture(orientation=3))
  put(tmp_path / 's' / 'labels' / '0.txt',
      '1 .25 .25 .583333 .25 .583333 .625 .25 .625\n')
  put(tmp_path / 's' / 'labels' / '1.txt', '\n'.join([
      f'0 {ROW} .9', 'cup .5 .5 .1 .1', '0 .5 .5 .1', f'0 {ROW} nan',
      '0 60 40 40 30', '0 .5 .5 0 .1', '']))
  put(tmp_path / 's' / 'labels' / 'turned.txt', f'0 {ROW}\n')
  put(tmp_path / 's' / 'labels' / 'alone.txt', f'0 {ROW}\n')
  own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0)
  for record, label in zip(read(tmp_path / 'd'), ['7', 'cup', 'cup'],
                           strict=True):
    assert_patch(record, label)
  held = report(tmp_path / 'd')['splits']['train']
  skipped = {k: v['names'] for k, v in held['skipped'].items()}
  assert skipped == {
      'label row: not numbers': ['labels/1.txt:2', 'labels/1.txt:4'],
      'label row: not `class cx cy w h` or a polygon': ['labels/1.txt:3'],
      'label row: not fractions of the image': ['labels/1.txt:5'],
      'box: no area': ['labels/1.txt:6'],
      'label file without an image': ['labels/alone.txt']}
  assert held['changed']['polygon: its bounding box taken'] == 1


def test_images_of_no_split_are_not_lost_in_silence(tmp_path, capsys):
  """A folder `train` may be the class of that name."""
  put(tmp_path / 's' / 'data.yaml', 'names: [bus, train]')
  put_pictures(tmp_path / 's' / 'images' / 'train', 2)
  put_pictures(tmp_path / 's' / 'images' / 'bus', 3)
  put(tmp_path / 's' / 'labels' / 'train' / '0.txt', f'1 {ROW}')
  where = tmp_path / 's', tmp_path / 'd', '--validation_share', 0
  with pytest.raises(errors.UserError, match='only 2 of 5 images .*3 times: '
                     "image: not in a folder of a split's name"):
    own(*where)
  assert not records.is_prepared(str(tmp_path / 'd'), 'mine')
  own(*where, '--allow_losses')
  assert len(read(tmp_path / 'd')) == 2
  said = capsys.readouterr()
  assert "skipped 3: image: not in a folder of a split's name" in said.out
  assert 'only 2 of 5 images' in said.err


def test_held_out_images_depend_on_the_seed(tmp_path):
  label_studio(tmp_path / 's')
  put(tmp_path / 's' / 'result.json', coco(40))
  put_pictures(tmp_path / 's', 40)
  for name, *argv in (('a',), ('b', '--seed', 1), ('c',)):
    own(tmp_path / 's', tmp_path / 'd', '--validation_share', .2, *argv,
        name=name)
  held = {n: [r['image_id'] for r in read(tmp_path / 'd', 'validation', n)]
          for n in 'abc'}
  assert len(held['a']) == 8 and held['a'] == held['c'] != held['b']
  assert not set(held['a']) & {
      r['image_id'] for r in read(tmp_path / 'd', name='a')}


# --- Bad input ---------------------------------------------------------------
def edit(**changes):
  def write(source):
    label_studio(source)
    content = json.loads((source / 'result.json').read_text())
    for key, change in changes.items():
      change(content[key])
    put(source / 'result.json', content)
  return write


def yolo(names='names: [cup, kite]', rows=f'0 {ROW}'):
  def write(source):
    put(source / 'data.yaml', names)
    put_pictures(source / 'images', 3)
    put(source / 'labels' / '1.txt', f'0 {ROW}\n{rows}\n')
  return write


def two_of_one_split(source):
  put_pictures(source)
  put(source / 'a.json', coco())
  put(source / 'b.json', coco())


def coco_and_yolo(source):
  yolo()(source)
  label_studio(source)


def labelme(source):
  put_pictures(source)
  for i in range(30):
    put(source / f'{i}.json', {'shapes': [], 'imagePath': f'{i}.png'})


def pascal_voc(source):
  put(source / 'Annotations' / '0.xml', '<annotation/>')


BAD = [
    (lambda s: s.mkdir(), [], r'looked for a COCO JSON .*data.yaml'),
    (labelme, [], r'0.json is a file of labelme .*labelme2coco'),
    (pascal_voc, [], r'0.xml seems to be Pascal VOC'),
    (lambda s: put(s / 'a.json', '{"images": ['), [], 'a.json is not readable'),
    (coco_and_yolo, [], r'result.json, .*data.yaml; choose with --annotations'),
    (two_of_one_split, [], r'a.json and .*b.json both have boxes'),
    (cvat, ['--annotations', 'instances.json'], 'no file .*instances.json'),
    (yolo(), ['--annotations', 'labels'], 'no file'),
    (cvat, ['--validation_share', '1.5'], 'validation_share: 1.5'),
    (edit(categories=lambda c: c.append(dict(id=7, name='cat'))), [],
     "have the same id 7, but differ: name 'kite' and 'cat'"),
    (edit(categories=lambda c: c.append(dict(id=8, name='kite'))), [],
     "two categories, with ids 7 and 8, have the same name 'kite'"),
    (edit(categories=lambda c: c[0].update(name=' ')), [], 'name is empty'),
    (edit(images=lambda i: i[1].update(id=0)), [], 'have the same id 0'),
    (edit(images=lambda i: i[1].update(file_name=3)), [], 'file_name is 3'),
    (edit(images=lambda i: [x.update(file_name='no.png') for x in i]), [],
     'none of'),
    (edit(images=list.clear), [], 'no images'),
    (yolo(rows=f'2 {ROW}'), [],
     r'labels/1.txt:2: class 2; expected one of the 2 classes, 0 to 1'),
    (yolo(rows=f'-1 {ROW}'), [], r'labels/1.txt:2: class -1'),
    (yolo(rows=f'0.5 {ROW}'), [], r'labels/1.txt:2: class 0.5'),
    (yolo('names: [cup, cup]'), [], "0 and 1, have the same name 'cup'"),
    (yolo('names: [yes, kite]'), [], r'names\[0\] is True, .* quotes'),
    (yolo('names: {0: cup, 2: kite}'), [], 'none with id 1'),
    (yolo('names: {a: cup}'), [], 'not the number of a class'),
    (yolo('names:'), [], 'names is None'),
    (yolo('nc: 2'), [], 'data.yaml has no `names`'),
    (yolo('names: [cup'), [], 'data.yaml is not readable YAML'),
    (lambda s: put(s / 'data.yaml', 'names: [cup]'), [], 'no images beside'),
]


@pytest.mark.parametrize('write, argv, says', BAD)
def test_bad_input_is_one_line(write, argv, says, tmp_path):
  write(tmp_path / 's')
  with pytest.raises(errors.UserError, match=says) as e:
    own(tmp_path / 's', tmp_path / 'd', *argv)
  assert '\n' not in str(e.value)
  assert not records.is_prepared(str(tmp_path / 'd'), 'mine')


def test_an_earlier_dataset_is_told_from_another(tmp_path):
  label_studio(tmp_path / 's')
  own(tmp_path / 's', tmp_path / 'd')
  own(tmp_path / 's', tmp_path / 'd')   # Again: nothing to do.
  with pytest.raises(errors.UserError, match='was prepared with seed=0'):
    own(tmp_path / 's', tmp_path / 'd', '--seed', 1)
  with pytest.raises(errors.UserError, match="'coco'.* name of another"):
    own(tmp_path / 's', tmp_path / 'd', name='coco')


# --- Training on it ----------------------------------------------------------
@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Three datasets: `mine` has boxes, `more` other classes, `said` captions."""
  path = tmp_path_factory.mktemp('own')
  label_studio(path / 'mine')
  put(path / 'mine' / 'result.json', coco(8))
  put_pictures(path / 'mine', 8)
  own(path / 'mine', path / 'd')
  put(path / 'more' / 'a.json', coco(4, ((3, 'kite'), (1, 'person'))))
  put_pictures(path / 'more', 4)
  own(path / 'more', path / 'd', name='more')
  said = coco(4)
  said['annotations'] = [dict(id=k, image_id=k, caption=f'a red cup {k}')
                         for k in range(4)]
  put(path / 'said' / 'a.json', said)
  put_pictures(path / 'said', 4)
  own(path / 'said', path / 'd', name='said')
  return path / 'd'


def load(spec, data_dir, **values):
  config = cli.load_config(f'configs/{spec}')
  config.data.dir = str(data_dir)
  config.update_from_flattened_dict(values)
  return config


@pytest.mark.parametrize('system', ['e2e_vlp', 'soho', 'fiber'])
def test_label_spaces_of_mixtures(system, folder):
  """Those of the datasets, in their order; a shipped one comes first."""
  of = lambda data: vocabularies_lib.Vocabularies.load(load(
      f'{system}.py:tiny,data={data}', folder).data).labels.classes
  assert of('mine') == ['cup', 'kite']
  assert of('more+mine') == ['kite', 'person', 'cup']
  joint = label_space.LabelSpace.load('joint').classes
  assert of('said') == ['cup', 'kite']  # Listed, though without boxes.
  for first in ('scenes', 'coco'):
    config = load(f'{system}.py:tiny,data={first}+mine', folder)
    assert config.data.labels == 'joint+prepared'
  # Known names alone: as before.
  assert load(f'{system}.py:tiny,data=coco+sbu', folder).data.labels == 'joint'
  config.data.train = config.data.train[1:]
  names = vocabularies_lib.Vocabularies.load(config.data).labels.classes
  assert names == joint + [n for n in ('cup', 'kite') if n not in joint]


def test_what_is_not_prepared(folder):
  with pytest.raises(errors.UserError, match=(
      "no prepared dataset 'mien' .*holds mine, more, said.* 'mine'")):
    vocabularies_lib.Vocabularies.load(
        load('e2e_vlp.py:tiny,data=mien', folder).data)


SMALL = {
    'model.width': 32, 'model.ffn': 48, 'model.encoder_layers': 1,
    'model.decoder_layers': 1, 'model.backbone.stem': 8,
    'model.backbone.width': 16, 'model.backbone.blocks': 1, 'batch_size': 8,
    'eval_batch_size': 8, 'total_steps': 2, 'log_every_steps': 1,
    'samples.count': 2, 'tensorboard': False, 'data.max_boxes': 4,
    'model.num_queries': 4}


def test_own_boxes_train_a_detector(folder, tmp_path):
  """From nothing, and from that with the classes of another dataset."""
  spec = 'finetune.py:detect,system=e2e_vlp,size=tiny,data=mine,side=96'
  config = load(spec, folder, **SMALL)
  scores = train.train(config, str(tmp_path / 'w'))
  assert np.isfinite(scores['eval/detection/AP50'])
  assert len(list((tmp_path / 'w' / 'samples').glob('*.png'))) == 1
  *_, meta = checkpoint.load(str(tmp_path / 'w'))
  assert meta['labels']['classes'] == ['cup', 'kite']
  again = evaluate.evaluate(None, str(tmp_path / 'w'), str(tmp_path / 'e'))
  assert again == pytest.approx(scores, nan_ok=True)
  config = load(f'finetune.py:detect,from={tmp_path / "w"},data=more+mine',
                folder, **{k: SMALL[k] for k in (
                    'batch_size', 'total_steps', 'samples.count')})
  assert config.data.labels == 'prepared'
  train.train(config, str(tmp_path / 'w2'))
  *_, meta = checkpoint.load(str(tmp_path / 'w2'))
  assert meta['labels']['classes'] == ['kite', 'person', 'cup']
  loaded = json.loads((tmp_path / 'w2' / 'init_from.json').read_text())
  assert loaded['loaded'] and all(
      'classes' in name for name in loaded['other_shape'])


def test_any_name_can_be_fine_tuned():
  """The default names of own datasets and of pairs, and the mixtures."""
  of = lambda arg: cli.load_config(f'configs/finetune.py:{arg}')
  for task, name in (('detect', 'own'), ('caption', 'pairs'),
                     ('caption', 'sbu'), ('detect', 'coco+mine')):
    config = of(f'{task},system=e2e_vlp,data={name}')
    assert [s['name'] for s in config.data.train] == name.split('+')
    source, = (e.source.to_dict() for e in config.evals.values())
    assert source == dict(name=name.split('+')[0], split='validation')
  assert config.data.labels == 'joint+prepared'
  with pytest.raises(errors.UserError, match="'vqav2' is not a dataset of"):
    of('detect,system=e2e_vlp,data=vqav2')


@pytest.mark.slow
@pytest.mark.parametrize('data, measured', [
    ('mine', {'detection'}), ('said', {'captioning', 'itm', 'mlm'})])
def test_what_a_dataset_lacks_is_masked(folder, tmp_path, data, measured):
  """Pre-training on boxes alone and on captions alone."""
  config = load(f'e2e_vlp.py:tiny,data={data},side=96', folder, **SMALL,
                **{'warm_start.steps': 0})
  scores = train.train(config, str(tmp_path / 'w'))
  assert {name.split('/')[1] for name in scores} == measured
  assert all(map(np.isfinite, scores.values()))


# --- The page ----------------------------------------------------------------
def test_the_page_shows_boxes_where_they_are(tmp_path, capsys):
  """The patch has its box's colour around it; a wrong box lies elsewhere."""
  label_studio(tmp_path / 's')
  wrong = coco(2)
  x, y, w, h = BOX
  wrong['annotations'][1]['bbox'] = [x + w, y, WIDTH, h]   # Sticks out.
  put(tmp_path / 's' / 'result.json', wrong)
  put_pictures(tmp_path / 's', 2)
  own(tmp_path / 's', tmp_path / 'd', '--validation_share', 0, '--show', 2)
  path = tmp_path / 'd' / 'mine' / '1.0.0' / 'records.png'
  assert str(path) in capsys.readouterr().out
  page = np.asarray(Image.open(path).convert('RGB')).astype(int)
  colour = lambda text: np.array([int(text[k:k + 2], 16) for k in (1, 3, 5)])
  at = lambda value: np.argwhere(np.abs(page - value).max(-1) < 12)
  red = at(np.array([220, 30, 30]))
  boxes = at(colour(base.COLOURS[0]))
  # The first cell: columns below 508. 480 / 120 pixels a pixel.
  patch, frame = (p[p[:, 1] < 508] for p in (red, boxes))
  frame = frame[frame[:, 0] < patch[:, 0].max() + 6]  # Not the legend.
  np.testing.assert_allclose(np.ptp(patch, 0), [30 * 4, 40 * 4], atol=8)
  frame = frame[frame[:, 0] > patch[:, 0].min() - 6]
  np.testing.assert_allclose(frame.min(0), patch.min(0), atol=8)
  np.testing.assert_allclose(frame.max(0), patch.max(0), atol=8)
  assert len(at(colour('#ffa13d'))) > 50  # The box beyond the image.
  with open(path.parent / records.CHANGES) as f:
    event, = json.load(f)['train']['1']
  assert event['what'] == 'box clipped' and event['name'] == '1.png#1'
  np.testing.assert_allclose(event['box'], [70 / 120, .25, 190 / 120, .625],
                             atol=1e-4)


def test_the_page_of_a_prepared_dataset(folder, tiny_scenes, tmp_path, capsys):
  """By its name alone, wherever it shall be written."""
  for data_dir, name in ((folder, 'said'), (tiny_scenes, 'scenes')):
    path = tmp_path / 'deep' / f'{name}.png'
    prepare.main([name, '--data_dir', str(data_dir), '--show', '5',
                  '--show_to', str(path)])
    assert Image.open(path).width == 3 * 508
    assert 'prepared already' not in capsys.readouterr().out
  for argv, says in ((['sadi', '--show', '3'], "'said'"),
                     (['said', '--show', '-1'], "'said'|--show"),
                     (['own', '--name', 'said', '--show', 'x'], 'x'),
                     (['said', '--show', '2', '--show_to', str(tmp_path)],
                      'cannot be written')):
    with pytest.raises(errors.UserError, match=says):
      prepare.main([*argv, '--data_dir', str(folder)])
