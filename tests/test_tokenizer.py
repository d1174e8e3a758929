"""Text <-> ids: equal to the official tokenizers, safe on odd input."""
import gzip
import json
import unicodedata

import pytest
import sentencepiece

from e2e_vlp_jax.data import tokenizer as tokenizer_lib
from e2e_vlp_jax.errors import UserError

SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']


@pytest.fixture(scope='module')
def bert():
  return tokenizer_lib.load_tokenizer('wordpiece', 'bert-base-uncased')


@pytest.fixture(scope='module')
def roberta(shared):
  return tokenizer_lib.load_tokenizer(
      'bpe', str(shared / 'data/vocab/roberta-base'))


@pytest.fixture(scope='module')
def goldens(shared):
  path = shared / 'data/goldens/tokenizers/expected_ids.json.gz'
  with gzip.open(path) as f:
    return json.load(f)


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pieces')
  corpus = folder / 'corpus.txt'
  corpus.write_text('a red cube left of a blue ball\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus), model_prefix=str(folder / 'm'), vocab_size=40,
      hard_vocab_limit=False, pad_id=3, minloglevel=2,
      user_defined_symbols='[MASK]')
  return tokenizer_lib.load_tokenizer('sentencepiece', str(folder / 'm.model'))


def test_wordpiece_equals_bert(record_property, bert, goldens):
  assert len(goldens) > 800
  record_property('parity', (
      f'WordPiece, bert-base-uncased, {len(goldens)} texts: texts with other '
      'ids', 'goldens/tokenizers (HF tokenizers)',
      sum(bert.encode(i['text']) != i['bert_ids'] for i in goldens), 0))
  for item in goldens:
    assert bert.encode(item['text']) == item['bert_ids']
    assert [bert.tokens[i] for i in item['bert_ids']] == item['bert_tokens']


def test_shipped_roberta(roberta):
  shipped = tokenizer_lib.load_tokenizer('bpe', 'roberta-base')
  assert shipped.to_dict() == roberta.to_dict()


def test_bpe_equals_roberta(record_property, roberta, goldens):
  record_property('parity', (
      f'Byte-level BPE, roberta-base, {len(goldens)} texts: texts with other '
      'ids', 'goldens/tokenizers (HF tokenizers)',
      sum(roberta.encode(i['text']) != i['roberta_ids'] for i in goldens), 0))
  for item in goldens:
    assert roberta.encode(item['text']) == item['roberta_ids']


def test_ids_of_special_tokens(bert, roberta):
  assert bert.vocab_size == len(bert.tokens) == 30522
  assert (bert.pad_id, bert.cls_id, bert.sep_id, bert.mask_id) == (
      0, 101, 102, 103)
  assert roberta.vocab_size == 50265
  assert (roberta.cls_id, roberta.pad_id, roberta.sep_id,
          roberta.mask_id) == (0, 1, 2, 50264)


def test_composed_and_decomposed_accents_are_one(bert):
  text = 'Le café, où l’été était naïf'
  assert bert.encode(unicodedata.normalize('NFC', text)) == bert.encode(
      unicodedata.normalize('NFD', text))


def test_a_vocabulary_keeps_odd_tokens_apart(tmp_path):
  """Unicode's line separators are tokens, not ends of lines."""
  path = tmp_path / 'v.txt'
  tokens = SPECIALS + ['a\u2028', 'b\x85', 'é']
  path.write_bytes('\r\n'.join(tokens + ['']).encode())
  assert tokenizer_lib.load_tokenizer('wordpiece', str(path)).tokens == tokens


def test_special_tokens_are_not_parsed_out_of_text(bert, pieces):
  for tokenizer in (bert, pieces):
    ids = tokenizer.encode('a [MASK] [SEP] ball </s>')[1:-1]
    assert not {tokenizer.mask_id, tokenizer.sep_id} & set(ids)


def test_a_long_text_keeps_its_end(bert, pieces):
  for tokenizer in (bert, pieces):
    whole = tokenizer.encode('a red cube left of a blue ball')
    for length in range(3, len(whole) + 2):
      ids = tokenizer.encode('a red cube left of a blue ball', length)
      assert len(ids) == min(length, len(whole))
      assert ids[-1] == tokenizer.sep_id
      assert ids[:-1] == whole[:len(ids) - 1]
    assert tokenizer.encode('') == [tokenizer.cls_id, tokenizer.sep_id]


def test_decode(bert, roberta, pieces):
  assert bert.decode(bert.encode('A Motorcyclist , parked .') + [
      bert.pad_id] * 3) == 'a motorcyclist, parked.'
  assert roberta.decode(roberta.encode('Two naïve cats')) == 'Two naïve cats'
  assert pieces.decode(pieces.encode('a red ball')) == 'a red ball'


def test_a_dict_holds_all_of_it(bert, roberta, pieces):
  for tokenizer in (bert, roberta, pieces):
    again = tokenizer_lib.from_dict(json.loads(json.dumps(
        tokenizer.to_dict())))
    text = 'A red cube, left of a naïve ball'
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(
        tokenizer.encode(text))
    assert again.special_ids == tokenizer.special_ids


def _bpe(folder, vocab, merges):
  (folder / 'vocab.json').write_text(vocab)
  if merges is not None:
    (folder / 'merges.txt').write_text(merges)
  return str(folder)


_BPE = json.dumps({t: i for i, t in enumerate(
    ['<s>', '<pad>', '</s>', '<unk>', '<mask>', 'a', 'b'])})


@pytest.mark.parametrize('kind, make, expected', [
    ('wordpeice', lambda d: 'scenes', "did you mean 'wordpiece'"),
    ('wordpiece', lambda d: 'bert-base', "did you mean 'bert-base-uncased'"),
    ('wordpiece', lambda d: str(d), 'no file'),
    ('wordpiece', lambda d: d / 'binary', 'not UTF-8'),
    ('wordpiece', lambda d: d / 'words', r'special token \[PAD\]'),
    ('bpe', lambda d: str(d / 'none'), 'no file'),
    ('bpe', lambda d: _bpe(d, '{', ''), 'not a vocab.json'),
    ('bpe', lambda d: _bpe(d, '["a"]', ''), 'not a vocab.json'),
    ('bpe', lambda d: _bpe(d, '{"a": 0, "b": 5}', ''), 'not a vocab.json'),
    ('bpe', lambda d: _bpe(d, _BPE, None), 'merges.txt'),
    ('bpe', lambda d: _bpe(d, _BPE, 'x y\n'), 'does not fit'),
    ('bpe', lambda d: _bpe(d, '{"a": 0}', ''), 'special token <pad>'),
    ('sentencepiece', lambda d: str(d / 'none'), 'no file'),
    ('sentencepiece', lambda d: d / 'words', 'not a SentencePiece'),
])
def test_bad_files(tmp_path, kind, make, expected):
  (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00\x81')
  (tmp_path / 'words').write_text('a\nb\n')
  with pytest.raises(UserError, match=expected):
    tokenizer_lib.load_tokenizer(kind, str(make(tmp_path)))
