"""Caption metrics against coco-caption's and nlg-eval's own numbers.

tests/data/caption_metrics.json.gz holds a compact part for everybody; with
the shared reference data all of it is compared.
"""
import collections
import gzip
import json
import pathlib
import shutil
import time
import unicodedata

import numpy as np
import pytest

from e2e_vlp_jax.evaluation import caption_metrics
from e2e_vlp_jax.evaluation import ptb_tokenizer

DATA = pathlib.Path(__file__).parent / 'data' / 'caption_metrics.json.gz'
TOLERANCE = 1e-6


def read(path):
  with gzip.open(path, 'rt', encoding='utf-8') as f:
    return json.load(f)


@pytest.fixture(scope='module')
def compact():
  return read(DATA)


def test_tokens_are_those_of_the_stanford_tokenizer(compact):
  for text, expected in compact['tokens']:
    assert ptb_tokenizer.tokenize(text) == expected, text
  coco = compact['coco']
  flat = [r for refs in coco['references'] for r in refs]
  found = [' '.join(t) for t in ptb_tokenizer.tokenize_all(flat)]
  assert found == [t for refs in coco['tokens'] for t in refs]


@pytest.mark.parametrize('text, tokens', [
    ("A man's dog isn't on it's 2nd-floor balcony.",
     "a man 's dog is n't on it 's 2nd-floor balcony"),
    ('A "STOP" sign (red) on St. James St., 50/50!',
     'a stop sign -lrb- red -rrb- on st. james st. 50/50'),
    ('a dog\nand  a cat', 'a dog and a cat'),
    ('', ''), (' ... ', ''),
    # Unknown characters are dropped, combining marks join, quotes vanish.
    ('caf\xe9 \U0001f600 x', 'caf\xe9 x'), ('a\U0001f436b', 'a b'),
    ('e\u0301clair x', 'e\u0301clair x'), ('\ufeffa dog x', 'a dog x'),
    ('a\u200dzero\u200bwidth x', 'a zero width x'),
    ('two\xa0words', 'two words'), ('half\xadway', 'halfway'),
    ('10\xb0 5\xb2 \u2122 \u20ac5 \u2665\ufe0f',
     '10 \xb0 5 \xb2 \u2122 $ 5 \u2665'),
    ('\u201cstop\u201d \u2018go\u2019 \u2039x\u203a', 'stop go x'),
    ('\u0915\u093f\u0924\u093e\u092c \u5b575\u5b57',
     '\u0915\u093f\u0924\u093e\u092c \u5b575\u5b57'),
])
def test_tokenizer_examples(text, tokens):
  assert ' '.join(ptb_tokenizer.tokenize(text)) == tokens


@pytest.mark.slow
def test_every_character_against_the_original():
  """Alone and inside a word, where Java and pycocoevalcap are installed."""
  pytest.importorskip('pycocoevalcap')
  if not shutil.which('java'):
    pytest.skip('no java')
  from pycocoevalcap.tokenizer import ptbtokenizer  # pylint: disable=g-import-not-at-top
  characters = [chr(c) for c in [*range(0x20, 0xd800), *range(0xe000, 0x1fb00)]
                if not chr(c).isspace() and unicodedata.category(chr(c)) not in
                ('Cn', 'Co') and chr(c) not in '\x1c\x1d\x1e\x1f\x85']
  # A plain word ends every text, so that none looks into the next line.
  texts = [form.format(c) for form in ('a {} b x', 'ab{}cd x')
           for c in characters]
  theirs = ptbtokenizer.PTBTokenizer().tokenize(
      {i: [{'caption': t}] for i, t in enumerate(texts)})
  ours = ptb_tokenizer.tokenize_all(texts)
  wrong = [ascii((t, ' '.join(o), theirs[i][0]))
           for i, (t, o) in enumerate(zip(texts, ours))
           if ' '.join(o) != theirs[i][0]]
  assert not wrong, (len(wrong), wrong[:10])


def test_a_final_letter_looks_at_the_next_line_as_the_original_does():
  texts = ['A sign that reads K.', 'A dog.', 'A sign that reads K.', 'dogs']
  found = [t[-1] for t in ptb_tokenizer.tokenize_all(texts)]
  assert found == ['k', 'dog', 'k.', 'dogs']


def test_hundred_coco_captions_equal_coco_caption(compact):
  coco = compact['coco']
  overall, per_image = caption_metrics.caption_metrics(coco['candidates'],
                                                       coco['references'])
  assert set(overall) == set(coco['overall']) - {'METEOR'}
  for name, value in overall.items():
    assert value == pytest.approx(coco['overall'][name], abs=TOLERANCE), name
    np.testing.assert_allclose(per_image[name], coco['per_image'][name],
                               atol=TOLERANCE, err_msg=name)


def test_nlg_eval_example(record_property, compact):
  published = compact['nlg_eval']
  overall, _ = caption_metrics.caption_metrics(published['candidates'],
                                               published['references'])
  single = published['single']
  alone, _ = caption_metrics.caption_metrics([single['hyp']],
                                             [single['refs']])
  for name in overall:
    theirs = name.replace('BLEU', 'Bleu_')
    record_property('parity', (
        f'Captions, nlg-eval\'s example: {name}', 'published in its README',
        abs(overall[name] - published['overall'][theirs]), 1e-5))
    assert overall[name] == pytest.approx(published['overall'][theirs],
                                          abs=1e-5), name
    assert alone[name] == pytest.approx(single[theirs], abs=1e-5), name


@pytest.mark.parametrize('name', ['vinvl_base_val2017',
                                  'fakecap_val2017_overlap'])
def test_goldens_from_raw_strings(record_property, shared, name):
  references = collections.defaultdict(list)
  for a in read(shared / 'data' / 'text' / 'coco_captions_val2017.json.gz'
                )['annotations']:
    references[a['image_id']].append(a['caption'])
  folder = shared / 'data' / 'goldens' / 'captions' / name
  captions = {r['image_id']: r['caption']
              for r in read(folder / 'results.json.gz')}
  expected = json.loads((folder / 'expected_overall.json').read_text())
  expected_each = read(folder / 'expected_per_image.json.gz')
  ids = expected_each['image_id']

  start = time.time()
  overall, per_image = caption_metrics.caption_metrics(
      [captions[i] for i in ids], [references[i] for i in ids])
  print(f'{len(ids)} images in {time.time() - start:.1f} s')
  for key, value in overall.items():
    theirs = key.replace('BLEU', 'Bleu_')
    record_property('parity', (
        f'Captions, {name}, {len(ids)} images: {key}', 'pycocoevalcap 1.2',
        abs(value - expected[theirs]), TOLERANCE))
    assert value == pytest.approx(expected[theirs], abs=TOLERANCE), key
    if theirs in expected_each:
      np.testing.assert_allclose(per_image[key], expected_each[theirs],
                                 atol=TOLERANCE, err_msg=key)

  tokens = read(folder / 'ptb_tokenized.json.gz')
  flat = [r for i in ids for r in references[i]]
  found = [' '.join(t) for t in ptb_tokenizer.tokenize_all(flat)]
  assert found == [t for i in ids for t in tokens['refs'][str(i)]]


def test_perfect_empty_and_repeated_captions():
  references = [['a red circle', 'one circle'], ['a blue ring is here'],
                ['two white stars and a cross']]
  best = [r[0] for r in references]
  perfect, _ = caption_metrics.caption_metrics(best, references)
  assert perfect['ROUGE_L'] == pytest.approx(1)
  assert perfect['BLEU1'] == pytest.approx(1)
  empty, _ = caption_metrics.caption_metrics(['', '.', ''], references)
  assert all(0 <= v < 1e-6 for v in empty.values()), empty
  # Clipping: saying a word again earns nothing.
  stutter = [' '.join([b] * 4) for b in best]
  worse, _ = caption_metrics.caption_metrics(stutter, references)
  assert worse['CIDEr'] < perfect['CIDEr']


def test_cider_with_given_frequencies():
  """A batch alone scores as it does within the whole set."""
  tokens = lambda texts: [t.split() for t in texts]
  candidates = tokens(['a red circle', 'a blue ring', 'two white stars'])
  references = [tokens(r) for r in (
      ['a red circle', 'one circle'], ['a blue ring is here'],
      ['two white stars and a cross'])]
  whole = caption_metrics.cider(candidates, references)
  frequencies = caption_metrics.document_frequencies(references)
  assert caption_metrics.cider(candidates[:1], references[:1])[0] == 0
  np.testing.assert_allclose(
      [caption_metrics.cider([c], [r], frequencies)[0]
       for c, r in zip(candidates, references)], whole)


def test_what_cannot_be_scored_is_an_error():
  for candidates, references in (([], []), (['a'], []), (['a'], [[]])):
    with pytest.raises(ValueError):
      caption_metrics.caption_metrics(candidates, references)


@pytest.mark.slow
def test_meteor_where_it_can_run(compact):
  pytest.importorskip('pycocoevalcap', reason="pip install -e '.[meteor]'")
  if not shutil.which('java'):
    pytest.skip('no java')
  published = compact['nlg_eval']
  overall, per_image = caption_metrics.meteor(published['candidates'],
                                              published['references'])
  assert overall == pytest.approx(published['overall']['METEOR'], abs=1e-5)
  assert len(per_image) == 2


def test_meteor_is_none_without_java(monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  assert caption_metrics.meteor(['a dog'], [['a cat']]) is None
