"""Writes about scenes: captions, questions and statements from the scene graph.

Everything is true of the graph by construction, or labelled as false, and uses
only the words of `vocabulary()`. Functions take a `random.Random` and, where
they may name an absent object, `pairs`: the (colour, shape) pairs that they may
name, so that a split without a pair does not mention it either.
"""
import functools
import itertools

from e2e_vlp_jax.data.datasets.scenes import draw as scene_draw
from e2e_vlp_jax.data.datasets.scenes import facts

CAPTIONS = 5
MOST_WORDS = 18               # maximum words of a caption
# A picture cannot show whether these are true.
HIDDEN = ('heavy', 'warm', 'soft', 'expensive')


@functools.cache
def vocabulary():
  """The WordPiece vocabulary: special tokens, then whole words."""
  words = '''
      a an the and is are there including one object objects which ? what how
      many yes no zero image images contain contains both left right of above
      below more than exactly colour size texture shape'''.split()
  words += facts.NUMBERS + HIDDEN + scene_draw.TEXTURES
  words += [*scene_draw.COLOURS, *scene_draw.SIZES, *scene_draw.SHAPES,
            *facts.PLURALS.values()]
  return ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *dict.fromkeys(words)]


def answers():
  """Every answer that `questions` can give, in a fixed order."""
  return ['yes', 'no', *facts.NUMBERS, *scene_draw.COLOURS,
          *scene_draw.SHAPES, *scene_draw.SIZES, *scene_draw.TEXTURES]


def captions(scene, rng):
  """`CAPTIONS` different true captions.

  Of five, two list objects (left to right), two relate them and one counts. If
  the scene has no clear relation, more are lists.
  """
  if len(scene['objects']) == 1:
    kinds = [_one] * CAPTIONS
  else:
    kinds = [_list, _relation, _list, _relation, _count]
  found = []
  for kind in kinds:
    for attempt in itertools.count():
      text = (kind if attempt < 10 else _list)(scene, rng)
      if text and text not in found and len(text.split()) <= MOST_WORDS:
        found.append(text)
        break
  return found


def phrases(scene, rng):
  """[(phrase, object)]: one for each object."""
  return [(facts.mention(_spec(o, rng)), o) for o in scene['objects']]


def questions(scene, rng, pairs):
  """[(question, answer, kind)]; kind existence|count|attribute|relation."""
  objects = scene['objects']
  found = []
  spec = _pair(rng.choice(objects)) if rng.random() < .5 else _absent(
      scene, rng, pairs)
  found.append((f'is there {facts.mention(spec)} ?',
                'yes' if facts.count(spec, scene) else 'no', 'existence'))

  spec = (_pair(rng.choice(objects)) if rng.random() < .8 else
          _absent(scene, rng, pairs))
  for key in rng.choice(((), ('colour',), ('shape',), ('colour', 'shape'))):
    spec.pop(key)
  found.append((f'how many {facts.words_of(spec, plural=True)} are there ?',
                facts.NUMBERS[facts.count(spec, scene)], 'count'))

  o = rng.choice(objects)
  key = rng.choice(('colour', 'shape', 'size', 'texture'))
  known = [k for k in ('size', 'colour', 'shape') if k != key]
  spec = _only(o, scene, [
      c for n in (1, 2, 3) for c in itertools.combinations(known, n)], rng)
  if spec:
    found.append((f'what {key} is the {facts.words_of(spec)} ?', o[key],
                  'attribute'))

  relation, a, b = _related(scene, rng)
  if relation:
    one, other = (_only(o, scene, [('colour', 'shape')], rng)
                  for o in (a, b))
    if other and sum(facts.holds(relation, o, b) for o in objects) == 1:
      key = rng.choice(('colour', 'shape'))
      found.append((f'what {key} is the object {relation} the '
                    f'{facts.words_of(other)} ?', a[key], 'relation'))
    if one and other:
      true = rng.random() < .5
      stated = relation if true else facts.OPPOSITE[relation]
      found.append((f'is the {facts.words_of(one)} {stated} the '
                    f'{facts.words_of(other)} ?', 'yes' if true else 'no',
                    'relation'))
  return found


def statement(first, second, rng, pairs):
  """(statement, bool) about two images; `first` is the left one."""
  wanted = rng.random() < .5
  while True:
    a, b = (rng.choice(s['objects']) for s in (first, second))
    form = rng.randrange(5)
    # Mostly an object that is in one of the two; sometimes any.
    spec = dict(zip(('colour', 'shape'), rng.choice(pairs)))
    if rng.random() < .8:
      spec = _pair(rng.choice((a, b)))
    in_first, in_second = (bool(facts.count(spec, s)) for s in (first, second))
    name = facts.mention(spec)
    if form == 0:
      other = _pair(b)
      text = (f'the left image contains {name} and the right image contains '
              f'{facts.mention(other)}')
      label = in_first and bool(facts.count(other, second))
    elif form == 1:
      text, label = f'both images contain {name}', in_first and in_second
    elif form == 2:
      text = f'exactly one image contains {name}'
      label = in_first != in_second
    elif form == 3:
      text = f'no image contains {name}'
      label = not (in_first or in_second)
    else:
      sides = [('left', first), ('right', second)]
      (side, more), (other, less) = rng.sample(sides, 2)
      text = (f'the {side} image contains more objects than the {other} '
              'image')
      label = len(more['objects']) > len(less['objects'])
    if label == wanted:
      return text, label


def entailment(scene, rng, pairs):
  """[(text, label)]: one each of entailment, neutral and contradiction.

  'Heavy' and the like make a text neutral if its object exists and a
  contradiction if not, so the label cannot be guessed without the picture.
  """
  o = rng.choice(scene['objects'])
  name = facts.mention(_pair(o))
  relation, a, b = _related(scene, rng)
  found = [(f'{name} is {o["size"]}', 'entailment'),
           (f'{name} is {rng.choice(HIDDEN)}', 'neutral')]
  if relation and rng.random() < .5:
    found[0] = (f'{facts.mention(_pair(a))} is {relation} '
                f'{facts.mention(_pair(b))}', 'entailment')
  absent = facts.mention(_absent(scene, rng, pairs))
  false = [f'{absent} is {rng.choice(HIDDEN)}',
           f'{absent} is {rng.choice(list(scene_draw.SIZES))}']
  for size in scene_draw.SIZES:
    if not facts.count({**_pair(o), 'size': size}, scene):
      false.append(f'{name} is {size}')
  if relation:
    text = (f'{facts.mention(_pair(a))} is {facts.OPPOSITE[relation]} '
            f'{facts.mention(_pair(b))}')
    if not facts.check_caption(text, scene)['right']:
      false.append(text)
  return found + [(rng.choice(false), 'contradiction')]


def referring(scene, rng):
  """[(expression, object)]: expressions that match exactly one object."""
  found = []
  keys = ('size', 'texture', 'colour', 'shape')
  for o in rng.sample(scene['objects'], min(2, len(scene['objects']))):
    spec = _only(o, scene, [c + ('shape',) for n in (0, 1, 2, 3)
                            for c in itertools.combinations(keys[:3], n)],
                 rng)
    if spec:
      found.append(('the ' + facts.words_of(spec), o))
  relation, a, b = _related(scene, rng)
  anchor = relation and _only(b, scene, [('colour', 'shape')], rng)
  if anchor:
    spec = {'shape': a['shape']}
    fits = [o for o in scene['objects'] if o is not b
            and facts.matches(spec, o) and facts.holds(relation, o, b)]
    if len(fits) == 1:
      found.append((f'the {facts.words_of(spec)} {relation} the '
                    f'{facts.words_of(anchor)}', a))
  return found


def _list(scene, rng):
  objects = scene['objects']
  n = min(len(objects), rng.choice((2, 2, 3)))
  chosen = sorted(rng.sample(objects, n),
                  key=lambda o: scene_draw.centre(o)[0])
  start = 'there is ' if n < 3 and rng.random() < .2 else ''
  return start + ' and '.join(facts.mention(_spec(o, rng)) for o in chosen)


def _relation(scene, rng):
  relation, a, b = _related(scene, rng)
  if not relation:
    return None
  more = [(r, o) for o in scene['objects'] if o is not a and o is not b
          for r in facts.RELATIONS if r != relation and facts.obvious(r, a, o)]
  if more and rng.random() < .25:
    # Colours and shapes only: three objects make a long sentence.
    second, c = rng.choice(more)
    a, b, c = (facts.mention(_pair(o)) for o in (a, b, c))
    return f'{a} is {relation} {b} and {second} {c}'
  a, b = (facts.mention(_spec(o, rng)) for o in (a, b))
  return f'{a} is {relation} {b}'


def _count(scene, rng):
  objects = scene['objects']
  o = rng.choice(objects)
  several = facts.count(_pair(o), scene)
  if several > 1:
    text = (f'there are {facts.NUMBERS[several]} '
            + facts.words_of(_pair(o), plural=True))
    others = [p for p in objects if not facts.matches(_pair(o), p)]
    if others:
      text += ' and ' + facts.mention(_spec(rng.choice(others), rng))
    return text
  listed = ' and '.join(facts.mention(_pair(o))
                        for o in rng.sample(objects, 2))
  return f'there are {facts.NUMBERS[len(objects)]} objects including {listed}'


def _one(scene, rng):
  start = rng.choice(('', 'there is ', 'there is one object which is '))
  return start + facts.mention(_spec(scene['objects'][0], rng))


def _pair(o):
  return {k: o[k] for k in ('colour', 'shape')}


def _spec(o, rng):
  """Colour and shape always; size and texture sometimes."""
  keys = ['colour', 'shape']
  keys += ['size'] * (rng.random() < .5)
  keys += ['texture'] * (rng.random() < (.15 if o['texture'] == 'plain'
                                         else .4))
  return {k: o[k] for k in keys}


def _absent(scene, rng, pairs):
  """An absent pair; mostly one that shares a word with an object."""
  o = rng.choice(scene['objects'])
  near = [p for p in pairs if o['colour'] in p or o['shape'] in p]
  while True:
    spec = dict(zip(('colour', 'shape'),
                    rng.choice(near if rng.random() < .7 else pairs)))
    if not facts.count(spec, scene):
      return spec


def _only(o, scene, choices, rng):
  """A spec of some of these keys that only `o` matches, or None."""
  specs = [{k: o[k] for k in keys} for keys in choices]
  specs = [s for s in specs if facts.count(s, scene) == 1]
  return rng.choice(specs) if specs else None


def _related(scene, rng):
  """(relation, a, b): an obvious relation of two objects of different pairs.
  """
  found = [(r, a, b) for a, b in itertools.permutations(scene['objects'], 2)
           if _pair(a) != _pair(b)
           for r in facts.RELATIONS if facts.obvious(r, a, b)]
  return rng.choice(found) if found else (None, None, None)
