"""Rows that are made from the items of a record: questions, statements, ..."""
import collections
import pathlib
import tarfile

import numpy as np
import pytest

from e2e_vlp_jax.data import pipeline, records, synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
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
