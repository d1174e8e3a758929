"""Drawn scenes: the same bytes from the same seed, and nothing untrue."""
import collections
import hashlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import answer_list
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data.datasets.scenes import draw as scene_draw
from e2e_vlp_jax.data.datasets.scenes import facts as scene_facts
from e2e_vlp_jax.data.datasets.scenes import text as scene_text
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets.scenes import builder as scenes
from e2e_vlp_jax.data.label_space import LabelSpace

SEED = 3
SPLITS = ('train', 'validation', 'test', 'unseen')
RELATION = r'(left of|right of|above|below)'


@pytest.fixture(scope='module')
def examples():
  print(f'seed {SEED}')
  return {s: [scenes.example(SEED, s, i) for i in range(80)] for s in SPLITS}


@pytest.fixture(scope='module')
def pairs(examples):
  """(record, scene graph) of all splits."""
  return [(e, json.loads(e['scene_json']))
          for split in examples.values() for e in split]


def sentences(e):
  """Every piece of language in a record."""
  yield from e['texts']
  yield from (p['text'] for p in e['phrases'])
  yield from (q['question'] for q in e['questions'])
  yield from (a for q in e['questions'] for a in q['answers'])
  yield from (r['text'] for r in e['refexps'])
  yield from (s['statement'] for s in e['statements'])
  yield from (t['text'] for t in e['entailment'])


def digest(found):
  return hashlib.sha256(b''.join(base.canonical(e) for e in found)).hexdigest()


def test_same_bytes_in_another_process(examples):
  code = ('import hashlib;'
          'from e2e_vlp_jax.data.datasets.scenes import builder as scenes;'
          'from e2e_vlp_jax.data.datasets.base import canonical;'
          'print(hashlib.sha256(b"".join(canonical(scenes.example('
          f'{SEED}, s, i)) for s in {SPLITS} for i in range(10))).hexdigest())')
  out = subprocess.run(
      [sys.executable, '-c', code], check=True, capture_output=True, text=True,
      env={**os.environ, 'PYTHONHASHSEED': '77',
           'PYTHONPATH': str(pathlib.Path(scenes.__file__).parents[4])})
  assert out.stdout.split()[-1] == digest(
      [examples[s][i] for s in SPLITS for i in range(10)])


def test_seeds_and_splits_differ(examples):
  images = [e['image'] for split in examples.values() for e in split]
  images += [scenes.example(SEED + 1, 'train', i)['image'] for i in range(10)]
  assert len(set(images)) == len(images)


def test_variety(pairs):
  objects = [o for _, s in pairs for o in s['objects']]
  for key, values in (('shape', scene_draw.SHAPES),
                      ('colour', scene_draw.COLOURS),
                      ('size', scene_draw.SIZES),
                      ('texture', scene_draw.TEXTURES)):
    assert {o[key] for o in objects} == set(values)
  assert {len(s['objects']) for _, s in pairs} == set(range(1, 7))
  assert {s['background'] for _, s in pairs} == {'plain', 'cluttered'}


def visible(scene, k):
  """Pixels of object k that are seen, bool [96, 96]: those that change when
  only its colour changes."""
  pictures = []
  for colour in ('blue', 'yellow'):
    objects = [dict(o) for o in scene['objects']]
    objects[k]['colour'] = colour
    pictures.append(scene_draw.draw_scene({**scene, 'objects': objects}, 'x'))
  return (pictures[0] != pictures[1]).any(-1)


def test_boxes_are_tight_around_what_is_drawn(pairs):
  for _, scene in pairs[:100]:
    for o in scene['objects']:
      seen = visible({**scene, 'objects': [o]}, 0)
      ys, xs = np.nonzero(seen)
      assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == o['box']
      assert seen.sum() == o['area']


def test_no_object_is_hidden(pairs):
  shares = [visible(scene, k).sum() / o['area'] for _, scene in pairs[:100]
            for k, o in enumerate(scene['objects'])]
  print(f'least visible {min(shares):.2f}, overlapped '
        f'{np.mean(np.array(shares) < 1):.2f}')
  # A smooth edge of what lies on top still shows a little of it.
  assert min(shares) >= 0.65
  assert np.mean(np.array(shares) < 1) > .05


def test_record_agrees_with_the_scene(pairs):
  labels = LabelSpace.load('scenes')
  assert list(scene_draw.SHAPES) == labels.classes
  assert labels.attribute_groups == {
      'colour': list(scene_draw.COLOURS), 'size': list(scene_draw.SIZES),
      'texture': list(scene_draw.TEXTURES)}
  for e, scene in pairs:
    image = photographs.decode_image(e['image'])
    assert image.shape == (96, 96, 3) == (e['height'], e['width'], 3)
    for o, drawn in zip(e['objects'], scene['objects'], strict=True):
      y0, x0, y1, x1 = o['bbox'] * 96
      np.testing.assert_allclose([x0, y0, x1, y1], drawn['box'], atol=1e-4)
      labels.class_id(o['label'])
      for a in o['attributes']:
        labels.attribute_id(a)


def test_held_out_pairs(examples):
  held = {f'{c} {s}' for c, s in scene_draw.HELD_OUT}
  held |= {f'{c} {scene_facts.PLURALS[s]}' for c, s in scene_draw.HELD_OUT}
  assert len(scene_draw.HELD_OUT) == 6
  for split, found in examples.items():
    for e in found:
      drawn = {(o['attributes'][0], o['label']) for o in e['objects']}
      if split == 'unseen':
        assert drawn & scene_draw.HELD_OUT
        continue
      assert not drawn & scene_draw.HELD_OUT
      for text in sentences(e):
        words = text.split()
        assert not held & set(map(' '.join, zip(words, words[1:]))), text


def test_every_caption_is_right_and_says_something(pairs):
  mentions = []
  for e, scene in pairs:
    assert len(set(e['texts'])) == 5
    for text in e['texts']:
      found = scene_facts.check_caption(text, scene)
      assert found['right'] and found['facts'] >= 1, (text, scene)
      assert len(text.split()) <= 18
      if len(scene['objects']) > 1:
        mentions.append(sum(text.split().count(w) for s in scene_draw.SHAPES
                            for w in (s, scene_facts.PLURALS[s])))
  assert np.mean(np.array(mentions) >= 2) > 0.95


def test_mutated_captions_are_wrong(pairs):
  tried = collections.Counter()
  for e, scene in pairs:
    present = {o['colour'] for o in scene['objects']}
    absent = next(c for c in scene_draw.COLOURS
                  if c not in present and c != 'orange')
    for text in e['texts']:
      mutants = []
      for word in set(text.split()) & present - {'orange'}:
        mutants.append(('colour', text.replace(word, absent)))
      # Two parts of a relation are flipped together: still both wrong.
      if re.search(RELATION, text) and text.count(' is ') == 1:
        flipped = re.sub(RELATION, lambda m: scene_facts.OPPOSITE[m[0]], text)
        # It may be true of two other objects that look alike.
        looks = collections.Counter((o['colour'], o['shape'])
                                    for o in scene['objects'])
        if max(looks.values()) == 1:
          mutants.append(('relation', flipped))
      for a, b in zip(scene_facts.NUMBERS[2:], scene_facts.NUMBERS[3:]):
        if f'there are {a} ' in text:
          mutants.append(('count', text.replace(f'are {a}', f'are {b}')))
      for kind, mutant in mutants:
        tried[kind] += 1
        assert not scene_facts.check_caption(mutant, scene)['right'], (
            kind, mutant, scene)
  print(dict(tried))
  assert min(tried[k] for k in ('colour', 'relation', 'count')) > 50


SCENE = {'objects': [
    dict(shape='star', colour='red', size='small', texture='plain',
         box=[0, 0, 16, 16]),
    dict(shape='star', colour='red', size='large', texture='dotted',
         box=[60, 0, 90, 30]),
    dict(shape='cross', colour='orange', size='large', texture='striped',
         box=[0, 60, 30, 90])]}


@pytest.mark.parametrize('caption, facts', [
    ('a red star', 1),
    ('A small red star and a large dotted red star', 5),
    ('there is an orange cross', 1),
    ('a red star is left of a red star', 3),
    ('a small red star is above an orange cross and left of a red star', 6),
    ('there are two red stars', 1),
    ('there are two red stars and a striped orange cross', 3),
    ('there are three objects including a red star and an orange cross', 3)])
def test_true_captions(caption, facts):
  assert scene_facts.check_caption(caption, SCENE) == dict(facts=facts,
                                                           right=True)


@pytest.mark.parametrize('caption', [
    '', 'a', 'star', 'red star', 'a star', 'a red', 'an red star',
    'a orange cross', 'a red small star', 'a red star and', 'and a red star',
    'a red star a red star', 'a red star is', 'a red star is left of',
    'a red star is left', 'a red star is left of a red star and',
    'a red star is left of a red star and a red star', 'there is',
    'there are', 'there are two', 'there are red stars',
    'there are two red star', 'there are two stars', 'there are two objects',
    'there are three objects including', 'there are one red stars',
    'there is one object which is a red star', 'a red star [SEP]',
    'a red star and a red star is left of an orange cross',
    'a blue star', 'a small striped red star',
    'a red star and a red star and a red star',
    'a large red star and a large dotted red star',
    'an orange cross and an orange cross',
    'a small red star is right of a large red star',
    'an orange cross is above a red star',
    'there are three red stars', 'there are two large red stars',
    'there are two red stars and a red star',
    'there are two objects including a red star and an orange cross'])
def test_false_and_malformed_captions(caption):
  assert not scene_facts.check_caption(caption, SCENE)['right']


def _matching(scene, words):
  """Objects that a run of attribute words describes, read independently."""
  words = [w for w in words.split() if w not in ('a', 'an', 'the')]
  singular = {v: k for k, v in scene_facts.PLURALS.items()}
  words = [singular.get(w, w) for w in words
           if w not in ('object', 'objects')]
  return [o for o in scene['objects']
          if set(words) <= {o['shape'], o['colour'], o['size'], o['texture']}]


def _is(relation, a, b):
  centre = lambda o: ((o['box'][0] + o['box'][2]) / 2,
                      (o['box'][1] + o['box'][3]) / 2)
  dx, dy = np.subtract(centre(a), centre(b))
  return {'left of': dx, 'right of': -dx, 'above': dy,
          'below': -dy}[relation] < 0


def test_answers_are_right(pairs):
  asked = collections.Counter()
  for e, scene in pairs:
    for q in e['questions']:
      text, answer, kind = q['question'], q['answers'][0], q['kind']
      asked[kind, answer] += 1
      if m := re.fullmatch(r'is there (.*) \?', text):
        assert answer == ('yes' if _matching(scene, m[1]) else 'no')
      elif m := re.fullmatch(r'how many (.*) are there \?', text):
        assert answer == scene_facts.NUMBERS[len(_matching(scene, m[1]))]
      elif m := re.fullmatch(rf'is the (.*) {RELATION} the (.*) \?', text):
        (a,), (b,) = _matching(scene, m[1]), _matching(scene, m[3])
        assert answer == ('yes' if _is(m[2], a, b) else 'no')
      elif m := re.fullmatch(rf'what (\w+) is the object {RELATION} the (.*) '
                             r'\?', text):
        (b,) = _matching(scene, m[3])
        assert answer in [o[m[1]] for o in scene['objects']
                          if _is(m[2], o, b)]
      else:
        m = re.fullmatch(r'what (\w+) is the (.*) \?', text)
        (o,) = _matching(scene, m[2])
        assert answer == o[m[1]]
  kinds = collections.Counter(k for k, _ in asked.elements())
  assert set(kinds) == {'existence', 'count', 'attribute', 'relation'}
  for kind in ('existence', 'relation'):
    yes, no = asked[kind, 'yes'], asked[kind, 'no']
    assert .35 < yes / (yes + no) < .65
  assert {a for k, a in asked if k == 'count'} >= {'zero', 'one', 'two'}


def test_the_answer_list_is_complete_and_exact(pairs):
  shipped = answer_list.AnswerList.load('scenes')
  assert shipped.answers == scene_text.answers()
  given = {a for e, _ in pairs for q in e['questions'] for a in q['answers']}
  # Six objects of one kind are rare.
  for seed in range(400):
    scene = scene_draw.sample_scene(f'{SEED} answers {seed}')
    given |= {a for _, a, _ in scene_text.questions(
        scene, random.Random(seed), scene_draw.SEEN_PAIRS)}
  assert given == set(shipped.answers)


def test_the_answers_of_vqa():
  """The order is that of the source, which ships both directions."""
  answers = answer_list.AnswerList.load('vqav2')
  assert len(answers) == 3129
  assert answers.answers[:3] == ['', 'woods', 'trash can']
  assert {'vqav2', 'scenes'} <= set(answer_list.names())
  with pytest.raises(errors.UserError, match="did you mean 'vqav2'"):
    answer_list.AnswerList.load('vqa2')


def test_answers_are_those_of_lxmert(shared):
  ids = json.loads((shared / 'data/vocab/lxmert_vqa/trainval_ans2label.json'
                    ).read_text())
  assert answer_list.AnswerList.load('vqav2').ids == ids


def test_expressions_fit_one_object(pairs):
  found = 0
  for e, scene in pairs:
    for r in e['refexps']:
      m = re.fullmatch(rf'(.*?)(?: {RELATION} the (.*))?', r['text'])
      fits = _matching(scene, m[1])
      if m[2]:
        (anchor,) = _matching(scene, m[3])
        # Near the axis nothing is said to be left or right.
        fits = [o for o in fits if o is not anchor
                and scene_facts.holds(m[2], o, anchor)]
      assert len(fits) == 1, r
      np.testing.assert_allclose(np.array(fits[0]['box'])[[1, 0, 3, 2]] / 96,
                                 r['bbox'], atol=1e-6)
      found += 1
  assert found > len(pairs)


def test_statements_about_two_images():
  labels = []
  for i in range(120):
    first, second = (scene_draw.sample_scene(f'{SEED} {k} {i}') for k in 'ab')
    text, label = scene_text.statement(first, second, random.Random(i),
                                       scene_draw.SEEN_PAIRS)
    labels.append(label)
    n = len(first['objects']), len(second['objects'])
    if m := re.fullmatch('the (left|right) image contains more .*', text):
      assert label == (n[0] > n[1] if m[1] == 'left' else n[1] > n[0])
    elif m := re.fullmatch('the left image contains (.*) and the right image '
                           'contains (.*)', text):
      assert label == bool(_matching(first, m[1]) and _matching(second, m[2]))
    else:
      m = re.fullmatch('(both|exactly one|no) images? contains? (.*)', text)
      count = bool(_matching(first, m[2])) + bool(_matching(second, m[2]))
      assert label == (count == {'both': 2, 'exactly one': 1, 'no': 0}[m[1]])
  assert .35 < np.mean(labels) < .65


def test_entailment(pairs):
  for e, scene in pairs:
    labels = [t['label'] for t in e['entailment']]
    assert sorted(labels) == ['contradiction', 'entailment', 'neutral']
    for t in e['entailment']:
      if m := re.fullmatch(rf'(.*) is {RELATION} (.*)', t['text']):
        true = scene_facts.check_caption(t['text'], scene)['right']
      else:
        m = re.fullmatch(r'(.*) is (\w+)', t['text'])
        hidden = m[2] in scene_text.HIDDEN
        there = _matching(scene, m[1] + ('' if hidden else f' {m[2]}'))
        if hidden and there:
          assert t['label'] == 'neutral', t
          continue
        true = bool(there)
      assert t['label'] == ('entailment' if true else 'contradiction'), t


def test_vocabulary_is_closed(pairs):
  shipped = (pathlib.Path(scenes.__file__).parents[2] / 'vocab'
             / 'scenes.txt').read_text().split()
  assert shipped == scene_text.vocabulary()
  assert shipped[:5] == ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  assert len(set(shipped)) == len(shipped)
  spoken = {w for e, _ in pairs for t in sentences(e) for w in t.split()}
  assert spoken <= set(shipped)


def test_tokenizer_knows_every_word(pairs):
  from e2e_vlp_jax.data import tokenizer
  tokens = tokenizer.load_tokenizer('wordpiece', 'scenes')
  unknown = tokens.tokens.index('[UNK]')
  for e, _ in pairs[::5]:
    for text in sentences(e):
      ids = tokens.encode(text, 64)
      assert unknown not in ids
      assert tokens.decode(ids) == text.replace(' ?', '?')
