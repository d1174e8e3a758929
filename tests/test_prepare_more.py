"""`prepare` of the corpora of published mixtures: Visual Genome, web pairs."""
import io
import json
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import prepare
from e2e_vlp_jax.data.datasets import json_list
from e2e_vlp_jax.data import pipeline
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import tokenizer
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.data.label_space import LabelSpace

REPO = pathlib.Path(__file__).resolve().parent.parent
HEIGHT, WIDTH = 30, 40


def run(*argv):
  prepare.main([str(a) for a in argv])


def read(data_dir, name, split='train'):
  found = records.open_split(str(data_dir), name, split)
  return [found.get(i) for i in range(len(found))]


def report(data_dir, name, split='train'):
  path = records.dataset_folder(str(data_dir), name) + '/' + records.REPORT
  with open(path, encoding='utf-8') as f:
    return json.load(f)['splits'][split]


def counts(found):
  return {k: v['count'] for k, v in found['skipped'].items()}


def jpeg(grey=100):
  out = io.BytesIO()
  Image.fromarray(np.full((HEIGHT, WIDTH, 3), grey, np.uint8)).save(out,
                                                                    'JPEG')
  return out.getvalue()


# Visual Genome: the real sample.


@pytest.fixture(scope='module')
def sample(shared, tmp_path_factory):
  """(source, data folder) of four real photographs."""
  source = shared / 'data/visual_genome_micro'
  folder = tmp_path_factory.mktemp('vg')
  run('visual_genome', '--source', source, '--data_dir', folder)
  return source, folder


def test_real_objects_and_phrases(sample):
  source, folder = sample
  space = LabelSpace.load('joint')
  found = read(folder, 'visual_genome')
  assert [r['image_id'] for r in found] == ['1', '2', '4', '5']
  official = json.loads((source / 'objects.json').read_text())
  regions = json.loads((source / 'region_graphs.json').read_text())
  total = 0
  for r, annotated, region in zip(found, official, regions, strict=True):
    assert r['image'] == (source / f'VG_100K/{r["image_id"]}.jpg').read_bytes()
    theirs = {o['object_id']: o for o in annotated['objects']}
    size = np.array([r['height'], r['width']] * 2)
    total += len(r['objects'])
    for o in r['objects']:
      t = theirs[o['id']]
      space.class_id(o['label'])
      assert (t['names'][0].endswith(o['label'])
              or space.class_aliases[t['names'][0]] == o['label'])
      np.testing.assert_allclose(
          o['bbox'] * size, np.minimum([t['y'], t['x'], t['y'] + t['h'],
                                        t['x'] + t['w']], size), atol=1e-3)
    # Every wording once among the texts; every box among the phrases.
    wordings = [' '.join(p['phrase'].split()) for p in region['regions']]
    assert r['texts'] == list(dict.fromkeys(wordings))
    assert [p['text'] for p in r['phrases']] == wordings
    box = r['phrases'][0]['bbox'] * size
    first = region['regions'][0]
    np.testing.assert_allclose(box[:2], [first['y'], first['x']], atol=1e-3)
  done = report(folder, 'visual_genome')
  assert (total, done['texts'], done['boxes']) == (98, 974, 98)
  (unknown,) = done['skipped'].values()
  # None is lost: 110 objects, and the report names the others.
  assert unknown['count'] == 110 - 98 and "'color' 3x" in unknown['names']


def test_real_attributes(sample, tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(sample[0], source)
  source.chmod(0o755)
  (source / 'attributes_image1_excerpt.json').rename(
      source / 'attributes.json')
  run('visual_genome', '--source', source, '--data_dir', tmp_path / 'out',
      '--num_validation', 1)
  found = read(tmp_path / 'out', 'visual_genome')
  assert len(found) == 3
  assert [r['image_id'] for r in read(tmp_path / 'out', 'visual_genome',
                                      'validation')] == ['5']
  assert all(r['has_attributes'] for r in found)
  attributes = {o['id']: o['attributes'] for o in found[0]['objects']}
  assert attributes[1058498] == ['green', 'tall']      # the clock
  assert attributes[1058534] == []                     # the sidewalk
  # Here and in the object that 'sneakers' were merged into: grey -> gray.
  assert ['gray'] in attributes.values()


# Visual Genome: what files can be like.


class Genome:
  """A small dataset in the official layout."""

  def __init__(self, source):
    self.source = source
    self.files = {n: [] for n in ('image_data', 'objects', 'attributes',
                                  'region_descriptions')}

  def add(self, i, objects=(), regions=(), attributes=(), coco=None,
          data=None):
    self.files['image_data'].append(dict(
        image_id=i, width=WIDTH, height=HEIGHT, coco_id=coco,
        url=f'https://example.org/VG_100K_2/{i}.jpg'))
    self.files['objects'].append(dict(image_id=i, objects=[
        dict(dict(object_id=10 * int(i) + k, x=5, y=6, w=20, h=12), **o)
        for k, o in enumerate(objects)]))
    self.files['attributes'].append(dict(image_id=i, attributes=[
        dict(object_id=k, attributes=a) for k, a in attributes]))
    self.files['region_descriptions'].append(dict(id=i, regions=[
        dict(dict(region_id=k, x=1, y=2, width=10, height=8), **r)
        for k, r in enumerate(regions)]))
    folder = self.source / 'VG_100K_2'
    folder.mkdir(parents=True, exist_ok=True)
    if data is not False:
      (folder / f'{i}.jpg').write_bytes(data or jpeg())

  def write(self, *without):
    for name, content in self.files.items():
      if name not in without:
        (self.source / f'{name}.json').write_text(json.dumps(content))
    return self.source


@pytest.fixture(name='genome')
def _genome(tmp_path):
  return Genome(tmp_path / 'source')


def test_names_as_bottom_up_attention_cleans_them(genome, tmp_path):
  genome.add(7, [dict(names=['White  Shirt.']), dict(names=['Television']),
                 dict(names=['zzyzx']), dict(names=['tall zzyzx']),
                 dict(names=[]), dict(names=['dog'], merged_object_ids=[99])],
             attributes=[(70, ['Red and grey', 'black and white', 'odd one']),
                         (99, ['brown', 'brown.']), (5, ['green'])])
  run('visual_genome', '--source', genome.write(), '--data_dir', tmp_path)
  (r,) = read(tmp_path, 'visual_genome')
  assert [(o['label'], o['attributes']) for o in r['objects']] == [
      ('shirt', ['white', 'red', 'gray', 'black and white']), ('tv', []),
      ('dog', ['brown'])]
  found = report(tmp_path, 'visual_genome')
  assert counts(found) == {'object outside of the label space': 2,
                           'attribute outside of the label space': 1,
                           'box: no name': 1}
  assert found['skipped']['object outside of the label space']['names'] == [
      "'zzyzx' 2x"]
  assert sum(found['changed'].values()) == 1    # attributes of object 5


def test_bad_boxes_phrases_and_images(genome, tmp_path):
  good = dict(names=['dog'])
  genome.add(1, [good, dict(good, w=0), dict(good, x=200), dict(good, y=None),
                 dict(good, x=30, w=500)],
             [dict(phrase='a dog '), dict(phrase='a dog'), dict(phrase=' '),
              dict(phrase=None), dict(phrase='far away', x=300),
              dict(phrase='flat', height=0), dict(phrase='wide', width=400)])
  genome.add(2, [good], data=jpeg()[:300])
  genome.add(3, [good], data=False)
  genome.add(4)
  genome.write()
  run('visual_genome', '--source', genome.source, '--data_dir', tmp_path)
  a, b = read(tmp_path, 'visual_genome')
  assert [o['bbox'].tolist() for o in a['objects']] == [
      np.float32([6 / 30, 5 / 40, 18 / 30, 25 / 40]).tolist(),
      np.float32([6 / 30, 30 / 40, 18 / 30, 1]).tolist()]
  assert a['texts'] == ['a dog', 'far away', 'flat', 'wide']
  assert [p['text'] for p in a['phrases']] == ['a dog', 'a dog', 'wide']
  assert (b['image_id'], b['texts'], b['objects']) == ('4', [], [])
  found = counts(report(tmp_path, 'visual_genome'))
  assert {k: v for k, v in found.items() if 'image:' not in k} == {
      'box: no area': 1, 'box: outside the image': 1,
      'box: not four finite numbers': 1, 'phrase: empty': 2,
      'phrase: outside the image': 1, 'phrase: no area': 1}
  assert sum(v for k, v in found.items() if 'image: ' in k) == 2
  assert report(tmp_path, 'visual_genome')['changed'] == {
      'box clipped to the image': 1, 'phrase clipped to the image': 1}


def test_values_of_other_types(genome, tmp_path):
  """As exporters write them; what cannot be read joins nothing."""
  genome.add('7', [
      dict(names='dog', object_id='70', x='5', w=20.),
      dict(names=['cat'], object_id=None, merged_object_ids=3),
      dict(names=[['dog']], object_id=72)],
             [dict(phrase='a dog \ud83d'), dict(phrase=3)],
             [('70', ['brown', 5]), (None, ['green']), ([], 'red')])
  genome.write()
  run('visual_genome', '--source', genome.source, '--data_dir', tmp_path)
  (r,) = read(tmp_path, 'visual_genome')
  assert r['image_id'] == '7' and r['texts'] == ['a dog \ufffd']
  assert [(o['label'], o['id'], o['attributes']) for o in r['objects']] == [
      ('dog', 70, ['brown']), ('cat', 0, [])]
  found = report(tmp_path, 'visual_genome')
  assert counts(found) == {'phrase: empty': 1, 'box: no name': 1,
                           'attribute is not text': 1}
  assert found['lost'] == {'images': 0, 'boxes': 1}


def test_photographs_of_coco_can_be_left_out(genome, tmp_path):
  for i, coco in ((1, 500), (2, None), (3, 900), (4, 901)):
    genome.add(i, coco=coco)
  genome.write()
  held = tmp_path / 'instances_val2017.json'
  held.write_text(json.dumps(dict(images=[dict(id=500), dict(id=901)])))
  lines = tmp_path / 'karpathy.txt'
  lines.write_text('val2014/COCO_val2014_000000000900.jpg 900\n\n501\n')
  for k, (ids, kept) in enumerate(((held, ['2', '3']),
                                   (lines, ['1', '2', '4']))):
    run('visual_genome', '--source', genome.source, '--data_dir',
        tmp_path / str(k), '--exclude_coco', ids)
    assert [r['image_id'] for r in read(tmp_path / str(k),
                                        'visual_genome')] == kept
    assert sum(counts(report(tmp_path / str(k),
                             'visual_genome')).values()) == 4 - len(kept)
  argv = ['visual_genome', '--source', genome.source, '--data_dir',
          tmp_path / 'no', '--exclude_coco']
  lines.write_text('images\n')
  with pytest.raises(errors.UserError, match='karpathy.txt.*images'):
    run(*argv, lines)
  with pytest.raises(errors.UserError, match='gone.json'):
    run(*argv, tmp_path / 'gone.json')
  (genome.source / 'image_data.json').unlink()
  with pytest.raises(errors.UserError, match='image_data.json.*exclude_coco'):
    run(*argv, held)


def test_splits_of_bottom_up_attention(genome, tmp_path):
  for i in range(1, 7):
    genome.add(i)
  genome.write()
  lists = tmp_path / 'lists'
  lists.mkdir()
  for name, ids in (('train', (6, 1, 3)), ('val', (2,)), ('test', (4, 77))):
    (lists / f'{name}.txt').write_text(''.join(
        f'VG_100K_2/{i}.jpg xml/{i}.xml\n' for i in ids))
  argv = ['visual_genome', '--source', genome.source, '--data_dir',
          tmp_path / 'out']
  with pytest.raises(errors.UserError, match='exclude each other'):
    run(*argv, '--splits', lists, '--num_validation', 2)
  with pytest.raises(errors.UserError, match='leave none'):
    run(*argv, '--num_validation', 6)
  with pytest.raises(errors.UserError, match='train.txt'):
    run(*argv, '--splits', tmp_path)
  run(*argv, '--splits', lists)
  assert {s: [r['image_id'] for r in read(tmp_path / 'out', 'visual_genome', s)]
          for s in ('train', 'validation', 'test')} == {
              'train': ['1', '3', '6'], 'validation': ['2'], 'test': ['4']}


def test_official_zip_files(genome, tmp_path):
  genome.add(1)
  genome.add(2)
  genome.write()
  shutil.rmtree(genome.source / 'VG_100K_2')
  for k, name in ((1, 'images'), (2, 'images2')):
    with zipfile.ZipFile(genome.source / f'{name}.zip', 'w') as z:
      z.writestr(f'VG_100K{"_2" * (k == 2)}/{k}.jpg', jpeg(k))
  run('visual_genome', '--source', genome.source, '--data_dir', tmp_path)
  assert [r['image'] for r in read(tmp_path, 'visual_genome')] == [
      jpeg(1), jpeg(2)]


@pytest.mark.parametrize('content, says', [
    ('', 'objects.json is not readable'), ('{}', r'byte 0: no \['),
    ('[{"image_id": 1, "objects": []}', r'expected , or \]'),
    ('[{"image_id": 1, "objects": [', 'byte 1: '),
    ('[3]', "item 0 has no number 'image_id'"),
    ('[{"image_id": 1, "objects": []}, {"image_id": "x"}]', 'item 1'),
    ('[{"image_id": 1, "objects": [3]}]', "list 'objects' of objects"),
    (None, 'no annotation file .*objects.json')])
def test_malformed_annotations(genome, tmp_path, content, says):
  genome.add(1)
  genome.write()
  file = genome.source / 'objects.json'
  file.unlink()
  if content is not None:
    file.write_text(content)
  with pytest.raises(errors.UserError, match=says):
    run('visual_genome', '--source', genome.source, '--data_dir', tmp_path)
  (genome.source / 'objects.json.zip').write_text('')
  if content is None:
    with pytest.raises(errors.UserError, match='unzip .*objects.json.zip'):
      run('visual_genome', '--source', genome.source, '--data_dir', tmp_path)


def test_items_of_a_long_list(tmp_path):
  path = tmp_path / 'list.json'
  # Longer than the first guess, not ASCII, and numbers of many lengths.
  items = [dict(id=i, x=[dict(s='é"\\]}漢' * (1 if i else 20_000))])
           for i in range(200)]
  for form in (dict(ensure_ascii=False), dict(indent=2)):
    path.write_text(json.dumps(items, **form), encoding='utf-8')
    found = json_list.JsonList(str(path), ('image_id', 'id'), 'x')
    assert list(found.ids()) == list(range(200))
    assert [found.get(i) for i in range(199, -1, -1)] == items[::-1]
    assert found.get(200) is None


# Pairs from the web.


def write_shard(path, members):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def test_shards_of_img2dataset(tmp_path):
  source = tmp_path / 'sbu'
  for s in range(2):
    write_shard(source / f'{s:05d}.tar', [
        (f'{s:05d}{k:04d}.{kind}', data) for k in range(5)
        for kind, data in (
            ('jpg', jpeg(20 * k + s)), ('txt', f'text {s} {k}'.encode()),
            ('json', b'{"caption": "another", "url": "x"}'))])
  # No caption file; no image; not UTF-8; empty; broken; another format.
  write_shard(source / '00002.tar', [
      ('a.json', '{"caption": "über"}'.encode()), ('a.jpg', jpeg()),
      ('b.txt', b'a lone text'), ('c.jpg', jpeg()), ('c.txt', b'\xff'),
      ('d.jpg', jpeg()), ('d.txt', b' '), ('e.jpg', b'broken'),
      ('e.txt', b'x'), ('f.json', b'{}'), ('f.webp', jpeg())])
  write_shard(source / '00003.tar', [('g.jpg', jpeg()), ('g.txt', b'kept'),
                                     ('h.jpg', jpeg()), ('h.txt', b'lost')])
  # As a download that was cut off, in the last image.
  whole = (source / '00003.tar').read_bytes()
  (source / '00003.tar').write_bytes(whole[:512 * 5 + 700])
  (source / '00000.parquet').write_bytes(b'')
  run('pairs', '--name', 'sbu', '--source', source, '--data_dir', tmp_path,
      '--num_validation', 4)
  train, held = (read(tmp_path, 'sbu', s) for s in ('train', 'validation'))
  texts = [t for r in train + held for t in r['texts']]
  assert sorted(texts) == sorted(
      [f'text {s} {k}' for s in range(2) for k in range(5)]
      + ['über', 'kept'])
  by_id = {r['image_id']: r for r in train + held}
  assert by_id['00001/000010003']['image'] == jpeg(61)
  assert by_id['00001/000010003']['texts'] == ['text 1 3']
  # Spread over the 17 images of the shards; two of them are broken.
  assert [r['image_id'] for r in held] == ['00000/000000004',
                                           '00001/000010003']
  assert not any(r['objects'] or r['has_attributes'] for r in train)
  found = [counts(report(tmp_path, 'sbu', s)) for s in ('train',
                                                       'validation')]
  total = {k: sum(f.get(k, 0) for f in found) for k in found[0] | found[1]}
  assert total['sample without an image'] == 1
  assert total['image: no text'] == 3
  assert sum(v for k, v in total.items() if 'rest of a shard' in k) == 1
  assert sum(v for k, v in total.items() if 'image' in k) == 1 + 3 + 2


TABLES = {
    'tsv': ('image\ttext\na.jpg\tone "quoted\na.jpg\ttwo\nb/b.jpg\tthree\n',
            []),
    'csv': ('who,caption,file\n1,"one ""quoted",a.jpg\n2,two,a.jpg\n\n'
            '3,three,b/b.jpg\n', ['--image', 'file', '--text', 'caption']),
    'bare.tsv': ('one "quoted\ta.jpg\ntwo\ta.jpg\nthree\tb/b.jpg\n',
                 ['--image', '1', '--text', '0']),
    'jsonl': ('{"image": "a.jpg", "text": ["one \\"quoted", "two"]}\n'
              '{"text": "three", "image": "b/b.jpg"}\n', [])}


@pytest.mark.parametrize('kind', TABLES)
def test_tables(tmp_path, kind):
  source = tmp_path / 'mine'
  (source / 'b').mkdir(parents=True)
  (source / 'a.jpg').write_bytes(jpeg(1))
  (source / 'b' / 'b.jpg').write_bytes(jpeg(2))
  content, options = TABLES[kind]
  (source / f'pairs.{kind}').write_text(content)
  run('pairs', '--source', source, '--data_dir', tmp_path, *options)
  assert [(r['image'], r['texts']) for r in read(tmp_path, 'pairs')] == [
      (jpeg(1), ['one "quoted', 'two']), (jpeg(2), ['three'])]


@pytest.mark.parametrize('table, argv, says', [
    (None, [], r'no table \(.csv, .tsv, .jsonl\)'),
    ('', [], "no column 'image'"),
    ('picture\ttext\n', ['--image', 'pictures'], "mean 'picture'"),
    ('image\ttext\n', [], 'no pair of an image'),
    ('image\ttext\nhttp://x/a.jpg\thi\n', [], 'p.tsv:2: .*img2dataset'),
    ('image\ttext\na.jpg\t\xff\n', [], 'not readable after row'),
    ('image\ttext\na.jpg\thi\n', ['--num_validation', 1], 'leave none'),
    ('image\ttext\nnone.jpg\thi\n', [], 'none of 1 images can be used'),
    ('image\ttext\na.jpg\thi\n', ['--name', '../up'], "name: '../up'"),
    ('image\ttext\na.jpg\thi\n', ['--name', 'coco'], "name: 'coco'"),
    ('image\ttext\na.jpg\thi\n', ['--table', 'q.tsv'], 'no table .*q.tsv'),
    ('image\ttext\na.jpg\thi\n', ['--table', 'q.txt'], 'expected .csv')])
def test_bad_tables(tmp_path, table, argv, says):
  source = tmp_path / 'mine'
  source.mkdir()
  (source / 'a.jpg').write_bytes(jpeg())
  if table is not None:
    (source / 'p.tsv').write_bytes(table.encode('latin-1'))
  with pytest.raises(errors.UserError, match=says):
    run('pairs', '--source', source, '--data_dir', tmp_path / 'out', *argv)


def test_bad_rows_are_counted(tmp_path):
  (tmp_path / 'a.jpg').write_bytes(jpeg())
  (tmp_path / 'p.tsv').write_text(
      'image\ttext\na.jpg\tfine\na.jpg\n\ttext\ngone.jpg\ttext\na.jpg\tfine\n'
      '../p.tsv\ttext\n')
  run('pairs', '--source', tmp_path, '--data_dir', tmp_path,
      '--allow_losses')
  (r,) = read(tmp_path, 'pairs')
  assert r['texts'] == ['fine']
  found = counts(report(tmp_path, 'pairs'))
  assert found['row without an image'] == found['row without a text'] == 1
  assert sum(found.values()) == 4


# Mixtures.


def test_a_mixture_feeds_the_pipeline(genome, tmp_path):
  for i in range(1, 5):
    genome.add(i, [dict(names=['dog'])], [dict(phrase=f'dog {k}')
                                          for k in range(6)],
               [(10 * i, ['brown'])])
  run('visual_genome', '--source', genome.write(), '--data_dir', tmp_path)
  for name in ('sbu', 'cc3m'):
    write_shard(tmp_path / name / '0.tar', [
        (f'{k}.{kind}', data) for k in range(4)
        for kind, data in (('jpg', jpeg()), ('txt', b'a text'))])
    run('pairs', '--name', name, '--source', tmp_path / name, '--data_dir',
        tmp_path / 'data')
  shutil.move(tmp_path / 'visual_genome', tmp_path / 'data')
  run('scenes', '--data_dir', tmp_path / 'data', '--num_train', 4,
      '--num_validation', 0, '--num_test', 0, '--num_unseen', 0)
  names = ['visual_genome', 'scenes', 'sbu', 'cc3m']

  def batches(weight, sentences=1, count=10):
    p = pipeline.Pipeline(
        dict(dir=str(tmp_path / 'data'), buckets=((32, 32),),
             sentences=sentences, max_text=8, max_boxes=8, max_attributes=2,
             threads=1),
        vocabularies=vocabularies_lib.Vocabularies(
            tokenizer.load_tokenizer('wordpiece', 'bert-base-uncased'),
            LabelSpace.load('joint')), pp='decode|fit|boxes|text|itm(.5)',
        sources=[dict(name=n, split='train', weight=weight) for n in names],
        seed=0, batch_size=26, train=True)
    p.check_labels()
    for t in range(count):
      batch = p.batch(t)
      yield batch, [names.index(p.name(i).partition('/')[0])
                    for i in batch['example_id']]

  for batch, source in batches('by_rows', count=2):
    source = np.array(source)
    assert batch['valid'].all() and (np.bincount(source) >= 6).all()
    boxes = source < 2
    np.testing.assert_array_equal(batch['task_mask/detection'], boxes)
    np.testing.assert_array_equal(batch['task_mask/attributes'], boxes)
    assert not batch['box_mask'][~boxes].any()
    assert (batch['box_attributes'][~boxes] == -1).all()
    assert batch['box_mask'][boxes].any(-1).all()
    assert batch['task_mask/itm'].all() and batch['task_mask/mlm'].all()
  # 24, 20, 4 and 4 texts: of each pair an example, as concatenation has it.
  shown = np.bincount(sum((s for _, s in batches('by_texts')), []))
  np.testing.assert_array_equal(shown, [120, 100, 20, 20])
  # In groups of 4 texts an image: 8, 8, 4 and 4.
  shown = np.bincount(sum((s for _, s in batches('by_texts', 4, 12)), []))
  np.testing.assert_array_equal(shown, [104, 104, 52, 52])
  with pytest.raises(errors.UserError, match="weight 'text' of visual_genome"):
    next(batches('text'))


@pytest.mark.parametrize('spec, names, weight', [
    ('soho.py:r18', 'coco visual_genome', 'by_texts'),
    ('fiber.py:base', 'coco visual_genome sbu cc3m', 'by_texts'),
    ('e2e_vlp.py:r50', 'coco visual_genome', 'by_rows')])
def test_mixtures_of_configs(spec, names, weight, tmp_path):
  load = lambda data: cli.load_config(f'{REPO}/configs/{spec},data={data}')
  for arg, expected in (('published', names), ('coco+mine', 'coco mine')):
    config = load(arg)
    assert [dict(s) for s in config.data.train] == [
        dict(name=n, split='train', weight=weight) for n in expected.split()]
    for e in config.evals.values():
      assert e.source.to_dict() == dict(name='coco', split='validation')
    assert config.data.labels == (
        'joint+prepared' if 'mine' in arg else 'joint')
  assert [dict(s) for s in load('coco').data.train] == [
      dict(name='coco', split='train', weight=1.)]
  for wrong in ('coco+', 'coco sbu', ''):
    with pytest.raises(errors.UserError, match='name of a prepared dataset'):
      load(wrong)
  # What is not prepared: the command that makes it.
  with pytest.raises(errors.UserError, match='prepare pairs --name mine'):
    records.open_split(str(tmp_path), 'mine', 'train')
