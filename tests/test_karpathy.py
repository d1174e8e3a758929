"""Karpathy's split files, and photographs kept out of training."""
import json

import numpy as np
from PIL import Image
import pytest

from configs import finetune
from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import prepare
from e2e_vlp_jax.data import photos
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import vocabularies

ORDER = ('val', 'test', 'restval', 'train')  # the first to come in our files


def split_file(path, images, dataset='coco'):
  """Writes a file as Karpathy's: entries get numbers, tokens and sentids."""
  path.parent.mkdir(parents=True, exist_ok=True)
  entries = []
  for k, image in enumerate(images):
    image = dict(image)
    image['sentences'] = [
        dict(tokens=t.split(), raw=t, imgid=k, sentid=5 * k + n)
        for n, t in enumerate(image['sentences'])]
    entries.append(dict(image, imgid=k, sentids=[
        s['sentid'] for s in image['sentences']]))
  path.write_text(json.dumps(dict(images=entries, dataset=dataset)))


def coco_entry(i, split, sentences, part='val2014'):
  return dict(filepath=part, filename=f'COCO_{part}_{i:012d}.jpg', cocoid=i,
              split=split, sentences=sentences)


def picture(path, colour=90):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (24, 16), (colour, 60, 120)).save(path)


def read(data_dir, name):
  """({split: [records]}, report) of a prepared dataset."""
  folder = records.dataset_folder(str(data_dir), name)
  with open(f'{folder}/{records.REPORT}', encoding='utf-8') as f:
    report = json.load(f)
  found = {}
  for split in report['splits']:
    opened = records.open_split(str(data_dir), name, split)
    found[split] = [opened.get(i) for i in range(len(opened))]
  return found, report


@pytest.fixture(scope='module')
def captioned(shared):
  """{COCO id: its captions} of the 187 captioned photographs."""
  found = {}
  for name in ('train2017', 'val2017'):
    path = shared / 'data' / 'coco' / 'annotations' / f'captions_{name}.json'
    content = json.loads(path.read_text(encoding='utf-8'))
    here = {i['id'] for i in content['images']}
    for a in content['annotations']:
      if a['image_id'] in here and (
          shared / 'data' / 'coco' / 'images' / name
          / f'{a["image_id"]:012d}.jpg').exists():
        found.setdefault(a['image_id'], []).append(a['caption'])
  return found


@pytest.fixture(scope='module')
def both(shared, captioned, tmp_path_factory):
  """Data folder with `coco`, and the same photographs as `karpathy`."""
  folder = tmp_path_factory.mktemp('karpathy')
  source = folder / 'source'
  source.mkdir()
  (source / 'images').symlink_to(shared / 'data' / 'coco' / 'images')
  split_file(source / 'annotations' / 'dataset_coco.json', [
      coco_entry(i, ORDER[k % 4], captioned[i])
      for k, i in enumerate(sorted(captioned))])
  data = folder / 'data'
  for name, place in (('karpathy', source), ('coco', shared / 'data' / 'coco')):
    prepare.main([name, '--source', str(place), '--data_dir', str(data)])
  return data


# --- prepare ----------------------------------------------------------------
def test_real_captions_by_their_ids(both, captioned):
  """Photographs of 2017, found by the ids of the file of 2014."""
  found, report = read(both, 'karpathy')
  assert list(found) == ['train', 'restval', 'validation', 'test']
  assert sum(map(len, found.values())) == len(captioned) == 187
  names = dict(zip(('validation', 'test', 'restval', 'train'), range(4)))
  for split, held in found.items():
    wanted = sorted(captioned)[names[split]::4]
    assert [r['image_id'] for r in held] == [str(i) for i in wanted]
    for record, i in zip(held, wanted):
      assert record['texts'] == [' '.join(t.split()) for t in captioned[i]]
      assert not record['objects']
    assert not report['splits'][split]['skipped']
  assert not (both / 'karpathy' / '1.0.0' / records.LABELS).exists()


def test_the_counts_are_compared(tmp_path, capsys, monkeypatch):
  from e2e_vlp_jax.data.datasets import karpathy
  monkeypatch.setattr(karpathy.Builder, 'PUBLISHED', {'train': (1, 2)})
  source = tmp_path / 'source'
  split_file(source / 'dataset_coco.json', [
      coco_entry(9, 'train', ['a', 'b'], 'train2014'),
      coco_entry(3, 'test', ['a cat', ' ']), coco_entry(4, 'test', ['gone'])])
  picture(source / 'train2014' / 'COCO_train2014_000000000009.jpg')
  picture(source / 'val2014' / 'COCO_val2014_000000000003.jpg')
  prepare.main(['karpathy', '--source', str(source), '--data_dir',
                str(tmp_path / 'data')])
  said = capsys.readouterr().err
  assert 'train: 1 images, 2 sentences, as published' in said
  assert 'test: 2 images, 3 sentences; published: no such split' in said
  found, report = read(tmp_path / 'data', 'karpathy')
  assert [r['texts'] for r in found['test']] == [['a cat']]
  assert report['splits']['test']['skipped'] == {
      'sentence without words': dict(
          count=1, names=['COCO_val2014_000000000003.jpg']),
      'image: no such image file': dict(
          count=1, names=['COCO_val2014_000000000004.jpg'])}


def test_flickr30k(tmp_path):
  """Ids are those of Flickr; one split alone can be written."""
  source = tmp_path / 'source'
  split_file(source / 'dataset_flickr30k.json', [
      dict(filename=f'{i}.jpg', split=s, sentences=[f'{i} a', f'{i} b'])
      for i, s in ((11, 'val'), (12, 'train'), (13, 'test'))], 'flickr30k')
  for i in (11, 12, 13):
    picture(source / 'flickr30k-images' / f'{i}.jpg')
  prepare.main(['flickr30k', '--source', str(source), '--data_dir',
                str(tmp_path / 'all')])
  prepare.main(['flickr30k', '--source', str(source), '--data_dir',
                str(tmp_path / 'one'), '--splits', 'test'])
  found, _ = read(tmp_path / 'all', 'flickr30k')
  assert {s: [r['image_id'] for r in held] for s, held in found.items()} == {
      'train': ['12'], 'validation': ['11'], 'test': ['13']}
  assert found['test'][0]['texts'] == ['13 a', '13 b']
  assert list(read(tmp_path / 'one', 'flickr30k')[0]) == ['test']


@pytest.mark.parametrize('name, write, wanted', [
    ('flickr30k', [('dataset_coco.json', 'coco', {})],
     ['no dataset_flickr30k.json', 'dataset_coco.json, of another dataset']),
    ('karpathy', [('dataset_coco.json', 'flickr30k', {})],
     ["its 'dataset' is 'flickr30k', with 1 images", "expected 'coco'"]),
    ('karpathy', [], ['no dataset_coco.json in', '--source']),
    ('karpathy', [('dataset_coco.json', 'coco', dict(cocoid='x'))],
     ['images[0].cocoid', "'x'", 'a whole number']),
    ('karpathy', [('dataset_coco.json', 'coco', dict(split=3))],
     ['images[0].split', '3', 'text']),
    ('karpathy --splits tset', [('dataset_coco.json', 'coco', {})],
     ["'tset'", "did you mean 'test'"])])
def test_files_that_cannot_be_used(name, write, wanted, tmp_path):
  picture(tmp_path / 'val2014' / 'COCO_val2014_000000000003.jpg')
  picture(tmp_path / 'images' / 'any.jpg')
  for file, dataset, changed in write:
    split_file(tmp_path / file,
               [{**coco_entry(3, 'test', ['a']), **changed}], dataset)
  with pytest.raises(errors.UserError) as e:
    prepare.main([*name.split(), '--source', str(tmp_path), '--data_dir',
                  str(tmp_path / 'data')])
  assert all(part in str(e.value) for part in wanted), e.value


def test_an_image_in_two_splits(tmp_path):
  picture(tmp_path / 'val2014' / 'COCO_val2014_000000000003.jpg')
  split_file(tmp_path / 'dataset_coco.json', [
      coco_entry(3, 'test', ['a']), coco_entry(3, 'train', ['a'])])
  with pytest.raises(errors.UserError, match='have the same id 3, but differ: '
                     "split 'test' and 'train'"):
    prepare.main(['karpathy', '--source', str(tmp_path), '--data_dir',
                  str(tmp_path / 'data')])


# --- Photographs that training may not show ---------------------------------
def opened(data, sources, exclude, train=True, unit='image', weight='by_rows'):
  config = cli.load_config('configs/soho.py:tiny,data=coco,side=48')
  config.data.dir, config.data.unit = str(data), unit
  config.data.exclude = exclude
  return pipeline_lib.Pipeline(
      config.data, vocabularies=vocabularies.Vocabularies.load(config.data),
      sources=[dict(name=n, split=s, weight=weight) for n, s in sources],
      pp='decode|fit|text' if unit == 'image' else "decode|fit|text('texts')",
      seed=0, batch_size=16, train=train)


def shown(pipeline, batches):
  """Ids of the images in the first batches."""
  return [pipeline.record(i)['image_id'] for t in range(batches)
          for i in pipeline.example_ids(t) if i >= 0]


@pytest.mark.parametrize('unit', ['image', 'text'])
def test_no_batch_shows_them(both, unit):
  held = {r['image_id'] for r in read(both, 'karpathy')[0]['test']}
  sources = [('coco', 'train'), ('coco', 'validation'), ('karpathy', 'test'),
             ('karpathy', 'restval')]
  sources.remove(('karpathy', 'test'))
  free = opened(both, sources, (), unit=unit)
  kept = opened(both, sources, ('karpathy/test',), unit=unit)
  count = 60
  assert held & set(shown(free, count))
  seen = shown(kept, count)
  assert not held & set(seen)
  # All others still come.
  assert set(shown(free, count)) - held == set(seen)
  assert free.left_out == '' and free.num_examples == kept.num_examples
  total = sum(len(records.open_split(str(both), *s)) for s in sources)
  assert total == 242 + len(read(both, 'karpathy')[0]['restval'])
  first = records.open_split(str(both), 'coco', 'train')
  lost = sum(first.get(i)['image_id'] in held for i in range(len(first)))
  assert (f'images of karpathy/test left out (coco/train: {lost} of '
          f'{len(first)}, ' in kept.left_out)
  assert 'karpathy/restval: 0 of 47' in kept.left_out


def test_rows_are_dealt_to_what_is_left(both):
  """`by_rows` counts the images that may be shown."""
  pair = [('coco', 'train'), ('karpathy', 'train')]
  # karpathy/train is left with nothing that karpathy/test has: all of it;
  # coco/train loses the photographs of validation and test.
  kept = opened(both, pair, ('karpathy/validation', 'karpathy/test'))
  # pylint: disable=protected-access
  sizes = [sum(map(len, row)) for row in kept._sources.members(
      [(48, 64), (48, 72), (64, 48), (72, 48), (48, 48)])]
  assert kept._sources.weights(1) == sizes and sizes[1] == 46


def test_evaluation_shows_all(both):
  """The option is about training."""
  kept = opened(both, [('karpathy', 'test')], ('karpathy/test',), train=False)
  assert len(shown(kept, kept.num_batches)) == 47 and not kept.left_out


def test_without_the_option_batches_are_equal_to_the_bit(both):
  a, b = (opened(both, [('coco', 'train')], exclude)
          for exclude in ((), ('karpathy/train',)))
  assert (a.example_ids(0) != b.example_ids(0)).any()
  again = opened(both, [('coco', 'train')], ())
  for key, value in a.batch(3).items():
    np.testing.assert_array_equal(value, again.batch(3)[key])


@pytest.mark.parametrize('exclude, wanted', [
    (('karpathy/tset',), "did you mean 'test'"),
    (('karpathi/test',), "did you mean 'karpathy'"),
    (('karpathy',), "'karpathy'; expected the names of prepared splits"),
    (('karpathy/train', 'karpathy/validation', 'karpathy/test',
      'karpathy/restval'), 'leaves no image of karpathy/restval')])
def test_exclusions_that_cannot_be(both, exclude, wanted):
  with pytest.raises(errors.UserError, match=wanted):
    opened(both, [('coco', 'train'), ('karpathy', 'restval')], exclude)


def test_a_dataset_without_ids(both, tiny_scenes):
  with pytest.raises(errors.UserError, match='scenes/test has no official ids'):
    opened(tiny_scenes, [('scenes', 'train')], ('scenes/test',))
  assert not (both / 'scenes').exists()
  (both / 'scenes').symlink_to(tiny_scenes / 'scenes')
  try:
    kept = opened(both, [('coco', 'train'), ('scenes', 'train')],
                  ('karpathy/test',))
  finally:
    (both / 'scenes').unlink()
  assert 'scenes/train: no official ids to compare' in kept.left_out


def test_a_folder_of_an_earlier_version(both, tmp_path):
  """It has no ids; silence would let the photographs through."""
  split = records.open_split(str(both), 'coco', 'train')
  assert split.index[photos.COLUMN][0].startswith('coco:')
  assert 'flickr:' in split.index[photos.COLUMN][0]
  del split.index[photos.COLUMN]
  with pytest.raises(errors.UserError, match='coco was prepared by an earlier'):
    photos.kept(str(both), [split], ('karpathy/test',))


def test_visual_genome_and_flickr(shared, both, tmp_path):
  """Its photographs are known by COCO's ids and by Flickr's."""
  source, data = tmp_path / 'source', tmp_path / 'data'
  source.mkdir()
  for path in (shared / 'data' / 'visual_genome_micro').iterdir():
    (source / path.name).symlink_to(path)
  tested = read(both, 'karpathy')[0]['test'][0]['image_id']
  (source / 'image_data.json').write_text(json.dumps([
      dict(image_id=1, width=800, height=600, coco_id=None, flickr_id=None),
      dict(image_id=2, width=800, height=600, coco_id=int(tested),
           flickr_id=17)]))
  prepare.main(['visual_genome', '--source', str(source), '--data_dir',
                str(data)])
  split = records.open_split(str(data), 'visual_genome', 'train')
  held = {split.get(i)['image_id']: ids.split()
          for i, ids in enumerate(split.index[photos.COLUMN].tolist())}
  assert held['2'] == ['visual_genome:2', f'coco:{tested}', 'flickr:17']
  assert held['1'] == ['visual_genome:1'] and len(held) == len(split) > 2
  (data / 'karpathy').symlink_to(both / 'karpathy')
  masks, said = photos.kept(str(data), [split], ('karpathy/test',))
  assert [split.get(i)['image_id'] for i in np.flatnonzero(~masks[0])] == ['2']
  assert f'visual_genome/train: 1 of {len(split)}' in said


def test_addresses_at_flickr():
  at = photos.in_flickr
  assert at('http://farm9.staticflickr.com/8035/8024364858_9c41dc1666_z.jpg'
            ) == ('flickr:8024364858',)
  for other in (None, 3, '', 'http://example.org/a.jpg'):
    assert at(other) == ()


def test_the_argument_of_configs():
  for system in ('e2e_vlp', 'soho', 'fiber'):
    load = lambda arg, s=system: cli.load_config(f'configs/{s}.py:{arg}')
    assert load('tiny').data.exclude == ()
    assert load('tiny,exclude=karpathy/test+flickr30k/test').data.exclude == (
        'karpathy/test', 'flickr30k/test')
  # Fine-tuning chooses its own data.
  config = finetune.get_config('caption,system=e2e_vlp')
  assert not config.data.exclude
