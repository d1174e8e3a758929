"""Phrases as tokens, class names as captions; equal to FIBER's own code."""
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from e2e_vlp_jax.data import class_captions
from e2e_vlp_jax.data import spans
from e2e_vlp_jax.data import tokenizer as tokenizer_lib

ROBERTA = tokenizer_lib.load_tokenizer('bpe', 'roberta-base')
BERT = tokenizer_lib.load_tokenizer('wordpiece', 'bert-base-uncased')
LENGTH = 256


@pytest.fixture(scope='module')
def arrays(shared):
  path = shared / 'reference' / 'fiber_fine' / 'captions_positive_maps.npz'
  with np.load(path) as f:
    return dict(f)


def tokens_of(row):
  return [int(k) for k in row if k >= 0]


# --- Spans -> tokens --------------------------------------------------------
@pytest.mark.parametrize('k', range(4))
def test_phrases(arrays, k):
  """Offsets and positive maps of FIBER's phrases, exactly."""
  get = lambda name: arrays[f'phrase{k}/{name}']
  text = str(get('caption'))
  assert ROBERTA.token_spans(text, LENGTH) == list(
      map(tuple, get('token_char_offsets').tolist()))
  wanted = get('positive_map_after_collate') > 0
  phrases = [[] for _ in wanted]
  for row, first, end in get('spans_row_begin_end').tolist():
    phrases[row].append((first, end))
  found = spans.token_mask(ROBERTA, text, phrases, LENGTH)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('tokenizer', [ROBERTA, BERT], ids=['bpe', 'wordpiece'])
@hypothesis.given(st.lists(st.sampled_from(
    ['a', 'dog', 'Skyscraper', 'café', "doesn't", 'soccer-ball', '.']),
                           min_size=1, max_size=8), st.data())
@hypothesis.settings(deadline=None, max_examples=40)
def test_a_phrase_of_whole_words_is_its_tokens(tokenizer, words, data):
  """Decoding a phrase's tokens gives the phrase."""
  first = data.draw(st.integers(0, len(words) - 1))
  last = data.draw(st.integers(first, len(words) - 1))
  text = ' '.join(words)
  start = len(' '.join(words[:first])) + bool(first)
  phrase = ' '.join(words[first:last + 1])
  mask, = spans.token_mask(tokenizer, text, [[(start, start + len(phrase))]],
                           64)
  ids = np.array(tokenizer.encode(text, 64))
  plain = lambda ids: tokenizer.decode(ids).replace(' ', '').lower()
  assert plain(ids[mask[:len(ids)]]) == plain(tokenizer.encode(phrase))
  assert not mask[0] and not mask[len(ids) - 1:].any()


def test_words_beyond_the_limit_have_no_tokens():
  text = 'a dog ' * 20 + 'and a cat'
  at = text.index('a cat')
  whole, = spans.token_mask(ROBERTA, text, [[(at, at + 5)]], 64)
  cut, = spans.token_mask(ROBERTA, text, [[(at, at + 5)]], 20)
  assert whole.sum() == 2 and not cut.any()
  # Nor has a span of spaces.
  assert not spans.token_mask(ROBERTA, 'a      b', [[(2, 6)]], 8).any()


# --- Phrases in their captions ----------------------------------------------
@pytest.mark.parametrize('phrase, text, taken, wanted', [
    ('dog', 'a hotdog and a dog', (), (15, 18)),   # a whole word first
    ('dog', 'a hotdog', (), (5, 8)),
    ('the dog', 'The dog', (), (0, 7)),
    ('a  dog', 'see a\ndog', (), (4, 9)),
    ('a dog', 'a dog and a dog', [(0, 5)], (10, 15)),
    ('a dog', 'a dog', [(0, 5)], (0, 5)),
    ('(x+', 'is (x+ y', (), (3, 6)),
    ('cat', 'a dog', (), None), (' ', 'a dog', (), None)])
def test_find(phrase, text, taken, wanted):
  assert spans.find(phrase, text, taken) == wanted


@hypothesis.given(st.text('ab \t\n', max_size=12), st.data())
@hypothesis.settings(deadline=None)
def test_clean_moves_spans_along(text, data):
  first = data.draw(st.integers(0, len(text)))
  end = data.draw(st.integers(first, len(text)))
  found, [[(a, b)]] = spans.clean(text, [[(first, end)]])
  assert found == ' '.join(text.split())
  assert found[a:b].split() == text[first:end].split()


def test_joined():
  assert spans.joined([(9, 12), (0, 5), (3, 7)]) == [(0, 7), (9, 12)]
  assert spans.joined([(0, 5), (5, 7)]) == [(0, 5), (5, 7)]


# --- Class names as captions ------------------------------------------------
def test_names(arrays):
  assert [class_captions.clean_name(str(n)) for n in arrays['vocab_names']
          ] == arrays['vocab_names_cleaned'].tolist()


@pytest.mark.parametrize('kind', ['ordered', 'shuffled'])
def test_all_classes(arrays, kind):
  get = lambda name: arrays[f'od_simple_{kind}/{name}']
  text = str(get('caption'))
  names = text.split('. ')
  found, where = class_captions.caption(names)
  assert found == text and len(ROBERTA.encode(text)) == get('num_tokens')
  wanted = get('positive_map') > 0
  of_box = [[where[names.index(text[a:b])]] for a, b in get('spans').tolist()]
  assert [s[0] for s in of_box] == list(map(tuple, get('spans').tolist()))
  np.testing.assert_array_equal(
      spans.token_mask(ROBERTA, text, of_box, LENGTH), wanted)


@pytest.mark.parametrize('k', range(5))
def test_sampled_captions(arrays, k):
  """Captions, spans and budgets; the draws themselves are ours."""
  get = lambda name: arrays[f'od_neg{k}/{name}']
  names = dict(zip(arrays['vocab_ids'].tolist(),
                   map(str, arrays['vocab_names_cleaned'])))
  costs = {i: class_captions.cost(ROBERTA, n) for i, n in names.items()}
  order = get('labels_in_caption_order').tolist()
  text, where = class_captions.caption([names[i] for i in order])
  assert text == str(get('caption'))
  assert where == list(map(tuple, get('label_spans').tolist()))
  span_of = dict(zip(order, where))
  kept = get('labels_kept').tolist()
  np.testing.assert_array_equal(
      spans.token_mask(ROBERTA, text, [[span_of[i]] for i in kept], LENGTH),
      get('positive_map') > 0)
  length = int(get('max_query_len'))
  if kept == get('labels_in').tolist():
    assert sum(costs[i] for i in set(kept)) == get('positive_caption_length')
  assert class_captions.fitting([costs[i] for i in dict.fromkeys(kept)],
                                length) == len(set(kept))
  # What its negatives take fits into what its positives leave.
  room = length - 2 - int(get('positive_caption_length'))
  others = [i for i in order if i not in kept]
  assert not others or sum(costs[i] for i in others) < room


def test_positives_stop_at_the_first_that_does_not_fit():
  assert class_captions.fitting([3, 4, 9, 1], 12) == 2


def test_negatives():
  """How many, never a positive, and within the budget."""
  candidates = [f'name{k}' for k in range(30)]
  draw = lambda kind, share, room=10**6, most=20, positives=(): (
      class_captions.sampled(
          set(positives), candidates, lambda name: 5, room, most,
          np.concatenate([[kind, share], np.linspace(.9, .1, 30)]),
          (.1, .2, .3)))
  assert len(draw(.05, 0.)) == 1          # one
  assert draw(.25, 0.) == []              # none
  assert len(draw(.5, 0.)) == 20          # as many as asked for
  assert len(draw(.7, 0.)) == 1 and len(draw(.7, .999)) == 20  # uniform
  assert draw(.5, 0.) == candidates[:-21:-1]
  assert 'name29' not in draw(.5, 0., positives=['name29'])
  assert len(draw(.5, 0., positives=['name29'])) == 19
  assert len(draw(.5, 0., room=16)) == 3 and draw(.5, 0., room=5) == []


def test_queries(arrays):
  """All classes in one caption, and 40 in each of two."""
  names = arrays['coco_names'].tolist()
  for key, most, captions in (
      ('query_coco', None, [str(arrays['query_coco/caption'])]),
      ('query_coco_chunk40', 40,
       arrays['query_coco_chunk40/captions'].tolist())):
    chunks = class_captions.chunks(names, ROBERTA, LENGTH, most)
    assert [k for chunk in chunks for k in chunk] == list(range(80))
    assert len(chunks) == len(captions)
    for n, (chunk, caption) in enumerate(zip(chunks, captions)):
      text, where = class_captions.caption([names[k] for k in chunk])
      assert text == caption
      found = spans.token_mask(ROBERTA, text, [[s] for s in where], LENGTH)
      wanted = arrays[f'{key}/tokens_padded_minus1' if most is None else
                      f'{key}/tokens{n}']
      assert [np.flatnonzero(row).tolist() for row in found] == list(
          map(tokens_of, wanted))


def test_chunks_that_the_model_can_read():
  names = [f'{c}{n} tall building' for c in 'abcdef' for n in range(9)]
  for length in (12, 40, 256):
    chunks = class_captions.chunks(names, ROBERTA, length)
    assert [k for chunk in chunks for k in chunk] == list(range(54))
    for chunk in chunks:
      text, _ = class_captions.caption([names[k] for k in chunk])
      assert len(ROBERTA.encode(text)) <= length
