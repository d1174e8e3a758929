"""Batch keys: declared by the ops, read by the pipeline, synthetic and docs."""
import pathlib
import sys

import numpy as np
import pytest

import e2e_vlp_jax.data
from e2e_vlp_jax.data import answer_list, keys, pp as pp_lib, records
from e2e_vlp_jax.data import synthetic, vocabularies
from e2e_vlp_jax.errors import UserError
from tests import test_pipeline
from tests.test_pipeline import CONFIG, FakeSplit, open_  # noqa: F401

DOCS = pathlib.Path(__file__).parent.parent / 'docs' / 'data.md'
SIZES = dict(vocab_size=60, num_classes=2, num_attributes=2, num_answers=3)
OP = '''
import numpy as np
from e2e_vlp_jax.data.keys import Key

def length(context, most=3):
  """How many objects there are, once for each of `most`."""
  return lambda example: {**example, 'object_count': np.full(
      most, len(example['objects']))}

OPS = {'length': length}
KEYS = {'length': (Key(
    'object_count', np.int16, 'N', -1, 'number of objects',
    lambda draw: draw.rng.integers(0, 9, draw.shape)),)}
SIZES = {'length': lambda most: {'N': most}}
'''


@pytest.fixture
def op_file(tmp_path, monkeypatch):
  """Writes an op file where the library looks for them, and loads it."""
  monkeypatch.setattr(e2e_vlp_jax.data, '__path__',
                      [*e2e_vlp_jax.data.__path__, str(tmp_path)])
  def write(name, text):
    (tmp_path / f'ops_{name}.py').write_text(text)
    monkeypatch.delitem(sys.modules, f'e2e_vlp_jax.data.ops_{name}',
                        raising=False)
    monkeypatch.setattr(pp_lib, 'OPS', pp_lib.find_ops())
  return write


def test_a_new_op_file_is_all_that_a_key_takes(op_file, open_):  # noqa: F811
  op_file('length', OP)
  for most in (3, 5):
    pp = f'decode|fit|length({most})'
    batch = open_(FakeSplit(20), pp=pp).batch(0)
    made = synthetic.synthetic_batch({**CONFIG, 'pp_train': pp}, batch_size=8,
                                     **SIZES)
    assert (batch['object_count'] == 1).all()
    for b in (batch, made):
      assert b['object_count'].shape == (8, most)
      assert b['object_count'].dtype == np.int16
  # Rows of padding hold the declared value.
  last = open_(FakeSplit(3), pp=pp, train=False).batch(0)
  assert (last['object_count'][3:] == -1).all()
  assert '| `object_count` | int16 [B,N] | -1 | length |' in pp_lib.table()


ANSWERS = '''
import numpy as np
from e2e_vlp_jax.data.keys import Key

def replies(context):
  return lambda example: {**example, 'reply_scores': np.isin(
      context.answers.answers, example['texts'])}

OPS = {'replies': replies}
KEYS = {'replies': (Key('reply_scores', np.float32, 'A', 0, 'scores',
                        lambda draw: draw.rng.random(draw.shape)),)}
'''


def test_an_op_may_use_the_answer_list(op_file, open_):  # noqa: F811
  op_file('replies', ANSWERS)
  words = vocabularies.Vocabularies(
      test_pipeline.tokenizer(), test_pipeline.LABELS,
      answer_list.AnswerList(['a cube 0', 'two', 'a cube 1']))
  pp = 'decode|fit|text|replies'
  batch = open_(FakeSplit(2), pp=pp, vocabularies=words,
                train=False).batch(0)
  assert batch['reply_scores'].tolist() == [
      [1, 0, 0], [0, 0, 1], *[[0, 0, 0]] * 6]
  made = synthetic.synthetic_batch({**CONFIG, 'pp_train': pp}, batch_size=8,
                                   **words.sizes)
  assert made['reply_scores'].shape == (8, 3)
  # Without an answer list there is no such key.
  assert 'reply_scores' not in open_(
      FakeSplit(2), pp='decode|fit|text|replies').batch(0)


@pytest.mark.parametrize('change, expected', [
    (("'object_count', np.int16, 'N'", "'boxes', np.float32, 'M5'"),
     r"key 'boxes': .*'length' .*\[B,M,5\].*'boxes' .*\[B,M,4\]|"
     r"key 'boxes': .*'boxes' .*\[B,M,4\].*'length' .*\[B,M,5\]"),
    (("np.int16, 'N'", "np.int16, 'Q'"), "letter 'Q'"),
    (("np.full(\n      most", "np.full(\n      most + 1"),
     r"'object_count' is declared as int16 \[B,N\].*\(4,\).*expected \(3,\)"),
    (("OPS = {'length': length}", "OPS = {'length': length, 'flip': length}"),
     "'flip' is already in"),
    (("KEYS = {'length'", "KEYS = {'lenght'"),
     "name the op 'lenght'; did you mean 'length'"),
])
def test_wrong_declarations(op_file, open_, change, expected):  # noqa: F811
  assert change[0] in OP
  with pytest.raises(UserError, match=expected):
    op_file('length', OP.replace(*change))
    open_(FakeSplit(8), pp='decode|fit|length')


@pytest.mark.parametrize('pp', [
    test_pipeline.PP, 'decode|squash', 'decode|fit|boxes', 'decode|fit|text',
    'decode|fit|boxes(crowds=2)',
    'decode|fit|text|itm|mlm'])
def test_synthetic_batches_are_like_real_ones(open_, pp):  # noqa: F811
  batch = open_(FakeSplit(20), pp=pp).batch(0)
  made = synthetic.synthetic_batch({**CONFIG, 'pp_train': pp}, batch_size=8,
                                   **SIZES)
  assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {
      k: (v.dtype, v.shape) for k, v in made.items()}


@pytest.mark.parametrize('pp', ['mlm|itm', 'itm|mlm'])
def test_synthetic_invariants(pp):
  config = {**CONFIG, 'buckets': ((24, 40),),
            'pp_train': f'decode|fit|boxes|text|{pp}'}
  one, other = (synthetic.synthetic_batch(config, batch_size=16, seed=k,
                                          **SIZES) for k in (0, 1))
  assert (one['image'] != other['image']).any()
  mask = one['image_mask']
  assert not one['image'][~mask].any()
  rows, columns = one['image_size'].T
  assert ((rows == 24) | (columns == 40)).all() and mask[:, 0, 0].all()
  assert (mask.sum((1, 2)) == rows * columns).all()
  corners = np.concatenate([one['boxes'][..., :2] - one['boxes'][..., 2:] / 2,
                            one['boxes'][..., :2] + one['boxes'][..., 2:] / 2])
  assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6
  assert not one['boxes'][~one['box_mask']].any()
  assert (one['box_attributes'][~one['box_mask']] == -1).all()
  for name in ('text', 'masked_text'):
    text, mask = one[name], one[name + '_mask']
    assert (text[..., 0] == keys.CLS).all() and not text[~mask].any()
    last = np.take_along_axis(text, mask.sum(-1, keepdims=True) - 1, -1)
    assert (last == keys.SEP).all()
  labels, true = one['mlm_labels'], one['itm_labels'] == 1
  assert 0 < true.mean() < 1
  assert (labels[~true] == -1).all() and (labels[true] >= 0).any(-1).all()
  predicted = labels >= 0
  assert (labels[predicted] == one['text'][predicted]).all()
  assert (labels[predicted] >= keys.FIRST_WORD).all()
  assert (one['masked_text'][predicted] == keys.MASK).all()
  same = (one['masked_text'] == one['text']) | predicted
  assert same[true].all() and not same[~true].all()


def test_a_synthetic_batch_needs_the_ops_before():
  with pytest.raises(UserError, match="pp_train: .*key 'text'"):
    synthetic.synthetic_batch({**CONFIG, 'pp_train': 'decode|fit|mlm'},
                              batch_size=2, **SIZES)


def test_padding_is_what_the_ops_make_of_nothing(open_):  # noqa: F811
  """So that a row of padding and a record without texts or boxes agree."""
  data = open_(FakeSplit(3), train=False)
  row = data._row(-1, {**records.nothing(), 'item': 0, 'second': None}, 0)  # pylint: disable=protected-access
  padding = {k: v[3] for k, v in data.batch(0).items()}
  for name, value in padding.items():
    if name != 'image' and not name.startswith('task_mask/'):
      np.testing.assert_array_equal(value, row[name], err_msg=name)


def test_the_table_in_the_docs_is_of_today():
  """Made by: python -c 'from e2e_vlp_jax.data import pp; print(pp.table())'."""
  text = DOCS.read_text(encoding='utf-8')
  assert pp_lib.table() == text.partition('<!-- keys -->\n')[2].partition(
      '\n<!-- end of keys -->')[0]
