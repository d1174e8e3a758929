"""Rows that are made from the items of a record: questions, statements, ..."""
import collections
import pathlib
import tarfile

import numpy as np
import pytest

from e2e_vlp_jax import prepare
from e2e_vlp_jax.data import photographs, pipeline, records, synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets.scenes import draw as scenes_draw
from e2e_vlp_jax.data.label_space import LabelSpace
from e2e_vlp_jax.data.tokenizer import load_tokenizer
from e2e_vlp_jax.errors import UserError

EARLIER = pathlib.Path(__file__).parent / 'data' / 'scenes_of_5a6402d.tar.xz'
CONFIG = dict(buckets=((32, 32),), sentences=2, max_text=24, max_boxes=6,
              max_attributes=4, threads=1)
WORDS = vocabularies_lib.Vocabularies(load_tokenizer('wordpiece', 'scenes'),
                                      LabelSpace.load('scenes'))
# unit: (list, key of the text)
LISTS = {'text': ('texts', None), 'question': ('questions', 'question'),
         'statement': ('statements', 'statement'),
         'entailment': ('entailment', 'text'), 'refexp': ('refexps', 'text')}


@pytest.fixture
def open_(tiny_scenes):
  def open_(unit, pp, sources=('train',), config=(), **more):
    sources = [s if isinstance(s, dict) else dict(name='scenes', split=s)
               for s in sources]
    return pipeline.Pipeline(
        {'dir': str(tiny_scenes), **CONFIG, 'unit': unit, **dict(config)},
        vocabularies=WORDS, sources=sources, pp=pp,
        **{**dict(seed=0, batch_size=8, train=False), **more})
  return open_


def text_of(record, unit, item):
  field, key = LISTS[unit]
  found = record[field][item]
  return found[key] if key else found


def shown(ids):
  """The text without the space that decoding leaves out."""
  return WORDS.tokenizer.decode(ids).replace(' ', '')


@pytest.mark.parametrize('unit', LISTS)
def test_each_item_is_a_row(open_, tiny_scenes, unit):
  pp = f'decode|fit|text({LISTS[unit][0]!r})'
  data = open_(unit, pp, ('validation', 'test'))
  splits = [records.open_split(str(tiny_scenes), 'scenes', s)
            for s in ('validation', 'test')]
  expected = [(s.get(i)['image_id'], k) for s in splits for i in range(len(s))
              for k in range(len(s.get(i)[LISTS[unit][0]]))]
  assert data.num_examples == len(expected)
  found = {}
  for _, batch in data.iterate():
    assert batch['text'].shape == (8, 1, 24)
    for row in np.flatnonzero(batch['valid']):
      example_id = batch['example_id'][row]
      record, item = data.unit(example_id)
      found[example_id] = (record['image_id'], item)
      text = text_of(record, unit, item)
      assert shown(batch['text'][row, 0]) == text.replace(' ', '')
      assert data.record(example_id)['image_id'] == record['image_id']
  assert [found[i] for i in range(len(expected))] == expected
  assert data.name(0) == f'scenes/validation record 0 {unit} 0'


def test_training_shows_each_item_once_an_epoch(open_):
  data = open_('statement', "decode|fit|text('statements')|itm(1.)",
               train=True)
  counts, swapped = collections.Counter(), 0
  for t in range(data.num_examples // 8):
    batch = data.batch(t)
    counts.update(batch['example_id'].tolist())
    images = [data.record(i)['image_id'] for i in batch['example_id']]
    for row in np.flatnonzero(batch['itm_labels'][:, 0] == 0):
      # The statement about another image of the batch.
      assert shown(batch['masked_text'][row, 0]) in {
          shown(batch['text'][k, 0]) for k in range(8)
          if images[k] != images[row]}
      swapped += 1
  assert set(counts.values()) == {1} and counts.total() == 64
  assert swapped > 55  # A few pairs of statements are equal.


def test_texts_of_the_image_stay_with_other_units(open_):
  batch = open_('question', 'decode|fit|boxes|text').batch(0)
  assert batch['text'].shape == (8, 2, 24) and batch['text_mask'].any()
  assert batch['box_mask'].any(-1).all()


def test_a_mixture_weighs_its_units(open_):
  source = lambda split, weight: dict(name='scenes', split=split,
                                      weight=weight)
  pp = "decode|fit|text('questions')"
  for weight in ('by_rows', 'by_texts'):
    data = open_('question', pp, [source('train', weight),
                                  source('test', weight)], train=True)
    sizes = [open_('question', pp, [s]).num_examples
             for s in ('train', 'test')]
    ids = np.concatenate([data.batch(t)['example_id'] for t in range(40)])
    share = (ids < sizes[0]).mean()
    assert abs(share - sizes[0] / sum(sizes)) < .02
  for old, new in (('images', 'by_rows'), ('texts', 'by_texts')):
    with pytest.raises(UserError, match=f"{old!r} of .* called {new!r} now"):
      open_('image', pp, [source('train', old)], train=True)
  with pytest.raises(UserError, match="'by_row' .*mean 'by_rows'"):
    open_('image', pp, [source('train', 'by_row')], train=True)


@pytest.mark.parametrize('unit, pp, expected', [
    ('questions', 'decode|fit', "data.unit: 'questions'; did you mean "
     "'question'"),
    ('image', "decode|fit|text('questions')",
     "needs data.unit='question'; it is 'image'"),
    ('text', "decode|fit|text('questions')", "it is 'text'"),
    ('question', "decode|fit|text('question')", "did you mean 'questions'"),
])
def test_bad_units(open_, unit, pp, expected):
  with pytest.raises(UserError, match=expected):
    open_(unit, pp)


def test_a_source_without_the_unit(open_, monkeypatch):
  real = records.Split.counts
  monkeypatch.setattr(records.Split, 'counts', lambda split, field: (
      0 * real(split, field) if split.split == 'test' else
      real(split, field)))
  open_('question', 'decode|fit', ('train',))
  with pytest.raises(UserError, match=r"'question': scenes/test has no "
                     'questions; it holds .*texts'):
    open_('question', 'decode|fit', ('train', 'test'))


def test_bad_records_are_counted_once(open_, monkeypatch, caplog):
  """Not once for each of their questions."""
  real = records.Split.get
  def get(split, i):
    if i in (2, 5):
      raise ValueError('damaged')
    return real(split, i)
  pp = "decode|fit|text('questions')"
  data = open_('question', pp, config=dict(max_bad_records=2))
  monkeypatch.setattr(records.Split, 'get', get)
  invalid = sum((~b['valid'] & (b['example_id'] >= 0)).sum()
                for _, b in data.iterate())
  assert invalid > 4
  assert data.bad_records == {f'scenes/train record {i}' for i in (2, 5)}
  assert 'scenes/train record 5 question 1: damaged' in caplog.text
  with pytest.raises(UserError, match='2 unreadable.*max_bad_records is 1'):
    list(open_('question', pp, config=dict(max_bad_records=1)).iterate())


def test_a_folder_of_an_earlier_version_is_counted_once(
    open_, tmp_path, caplog):
  with tarfile.open(EARLIER) as f:
    f.extractall(tmp_path, filter='data')
  for time in range(2):
    caplog.clear()
    data = open_('entailment', "decode|fit|text('entailment')",
                 config=dict(dir=str(tmp_path)))
    assert data.num_examples == 9 and data.batch(0)['valid'].all()
    assert ('prepared by an earlier version' in caplog.text) == (time == 0)


def test_synthetic_batches_have_one_text(open_):
  pp = "decode|fit|text('questions')|mlm|itm"
  made = synthetic.synthetic_batch({**CONFIG, 'pp_train': pp}, batch_size=8,
                                   **WORDS.sizes)
  assert {k: (v.dtype, v.shape) for k, v in made.items()} == {
      k: (v.dtype, v.shape) for k, v in open_('question', pp).batch(0).items()}


# --- A second image ----------------------------------------------------------


class Toy(base.RecordBuilder):
  """Four records of one colour each; statements name the next record."""
  name = 'toy'
  OPTIONS = {'shift': (1, 'how far ahead the second record is')}

  def sources(self):
    return {'train': (4, self._records)}

  def _records(self):
    for i in range(4):
      size = (20 + 10 * i, 40)
      image = np.full((*size, 3), 50 * (i + 1), np.uint8)
      second = (i + self.options['shift']) % 5 - 1  # -1 comes once
      yield base.record(
          image=scenes_draw.encode_png(image), image_id=str(i),
          height=size[0], width=size[1], statements=[
              dict(statement=f'image {k}', label=True, second_record=second)
              for k in range(2)])


PAIR = "decode|{}|second_image|text('statements')"


@pytest.mark.parametrize('place', ['fit', 'squash'])
def test_a_second_image_by_its_record(open_, tmp_path, place):
  prepare.prepare(Toy, str(tmp_path), None, dict(shift=1))
  data = open_('statement', PAIR.format(place), [
      dict(name='toy', split='train')], dict(dir=str(tmp_path)))
  batch = data.batch(0)
  assert batch['valid'].all() and len(batch['valid']) == 8
  for row, example_id in enumerate(batch['example_id']):
    record, item = data.unit(example_id)
    second = record['statements'][item]['second_record']
    assert second == int(record['image_id'])  # (i + 1) % 5 - 1
    for name in ('image', 'second_image'):
      mask = batch[f'{name}_mask'][row]
      assert (batch[name][row][mask] == 50 * (second + 1)).all()
      assert not batch[name][row][~mask].any()
      assert mask.all() == (place == 'squash') or record['height'] == 40


def test_units_come_in_their_image_s_bucket(open_, tmp_path):
  prepare.prepare(Toy, str(tmp_path), None, dict(shift=1))
  data = open_('statement', PAIR.format('fit'), [
      dict(name='toy', split='train')],
               dict(dir=str(tmp_path), buckets=((20, 40), (40, 40))),
               batch_size=2)
  shapes = set()
  for _, batch in data.iterate():
    for example_id in batch['example_id'][batch['valid']]:
      height = data.unit(example_id)[0]['height']
      shapes.add((height, batch['image'].shape[1]))
  assert shapes == {(20, 20), (30, 40), (40, 40), (50, 40)}


class Far(Toy):
  """Names a record that is not there."""
  name = 'far'

  def _records(self):
    for record in super()._records():
      record['statements'][0]['second_record'] = 9
      yield record


def test_a_second_record_that_is_not_there(tmp_path):
  with pytest.raises(ValueError, match='names record 9 of 4'):
    prepare.prepare(Far, str(tmp_path), None, {})


def test_statements_about_one_image(open_, tmp_path):
  prepare.prepare(Toy, str(tmp_path), None, dict(shift=2))
  data = open_('statement', PAIR.format('fit'), [
      dict(name='toy', split='train')], dict(dir=str(tmp_path)))
  batch = data.batch(0)
  alone = [data.unit(i)[0]['statements'][0]['second_record'] == -1
           for i in batch['example_id']]
  assert sum(alone) == 2 and batch['valid'].all()
  assert (batch['second_image_mask'].any((1, 2)) == ~np.array(alone)).all()
  assert not batch['second_image'][alone].any()


def test_second_images_that_are_stored_as_bytes(open_):
  """Those of scenes, which are no records."""
  data = open_('statement', PAIR.format('fit'),
               config=dict(buckets=((96, 96), (80, 96))))
  made = synthetic.synthetic_batch(
      {**CONFIG, 'buckets': ((96, 96),), 'pp_train': PAIR.format('fit')},
      batch_size=8, **WORDS.sizes)
  for _, batch in data.iterate(data.num_batches - 2):
    for row, example_id in enumerate(batch['example_id']):
      record, item = data.unit(example_id)
      np.testing.assert_array_equal(
          batch['second_image'][row], photographs.decode_image(
              record['statements'][item]['second_image']))
    assert {k: (v.dtype, v.shape) for k, v in made.items()} == {
        k: (v.dtype, v.shape) for k, v in batch.items()}


def test_a_broken_second_image_is_a_bad_record(open_, monkeypatch):
  real = records.Split.get
  def get(split, i):
    record = real(split, i)
    if i in (2, 3):
      image = record['statements'][0]['second_image']
      record['statements'][0]['second_image'] = image[:9 if i == 2 else -900]
    return record
  monkeypatch.setattr(records.Split, 'get', get)
  data = open_('statement', PAIR.format('fit'))
  batch = data.batch(0)
  assert (~batch['valid']).nonzero()[0].tolist() == [2, 3]
  assert not batch['image'][2:4].any() and not batch['second_image'][2:4].any()
  assert data.bad_records == {f'scenes/train record {i}' for i in (2, 3)}


@pytest.mark.parametrize('unit, pp, expected', [
    ('image', 'decode|fit|second_image', "needs data.unit='statement'"),
    ('statement', 'decode|second_image|fit', 'must stand before second_image')])
def test_second_image_in_the_wrong_place(open_, unit, pp, expected):
  with pytest.raises(UserError, match=expected):
    open_(unit, pp)
