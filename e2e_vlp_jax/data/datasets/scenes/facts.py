"""Checks whether what a caption states is true of a scene.

A *spec* is a partial description of an object: a dict with any of the keys
size, texture, colour, shape. An object matches when it agrees on all of them.
The captions follow this grammar (words are separated by spaces):

  caption  = list | 'there is' list | relation | count
  list     = mention {'and' mention}
  relation = mention 'is' REL mention ['and' REL mention]
  count    = 'there are' NUMBER specs ['and' mention]
           | 'there are' NUMBER 'objects including' list
           | 'there is one object which is' mention
  mention  = ('a' | 'an') [size] [texture] colour shape
  specs    = [size] [texture] colour shape-plural
  REL      = 'left of' | 'right of' | 'above' | 'below'
  NUMBER   = 'two' ... 'six'

Mentions of one caption are different objects (two mentions of 'a red circle'
need two of them). In a relation with two parts, both are about the first
object. In 'there are NUMBER specs and mention' the mention is none of those
counted. A relation holds when the centres are more than `CLEAR` pixels apart
on its axis.
"""
import itertools

from e2e_vlp_jax.data.datasets.scenes import draw as scene_draw

CLEAR = 12
NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six')
# name: (axis of the centre, sign of first minus second)
RELATIONS = {'left of': (0, -1), 'right of': (0, 1),
             'above': (1, -1), 'below': (1, 1)}
OPPOSITE = {'left of': 'right of', 'right of': 'left of',
            'above': 'below', 'below': 'above'}
PLURALS = {s: s + ('es' if s.endswith('ss') else 's')
           for s in scene_draw.SHAPES}


def matches(spec, o):
  """Whether object `o` agrees with every key of `spec`."""
  return all(o[k] == v for k, v in spec.items())


def count(spec, scene):
  """Number of objects of the scene that match."""
  return sum(matches(spec, o) for o in scene['objects'])


def holds(relation, a, b):
  """Whether object `a` is e.g. 'left of' object `b`."""
  axis, sign = RELATIONS[relation]
  return sign * _apart(a, b)[axis] > CLEAR


def obvious(relation, a, b):
  """`holds`, and its axis is the one on which they are further apart."""
  axis, _ = RELATIONS[relation]
  apart = [abs(d) for d in _apart(a, b)]
  return holds(relation, a, b) and apart[axis] > apart[1 - axis]


def _apart(a, b):
  (xa, ya), (xb, yb) = scene_draw.centre(a), scene_draw.centre(b)
  return xa - xb, ya - yb


def words_of(spec, plural=False):
  """'small striped red circle', or 'objects' where no shape is given."""
  shape = spec.get('shape', 'object')
  if plural:
    shape = PLURALS.get(shape, 'objects')
  return ' '.join([spec[k] for k in ('size', 'texture', 'colour')
                   if k in spec] + [shape])


def mention(spec):
  """`words_of` with 'a' or 'an'."""
  words = words_of(spec)
  return ('an ' if words[0] in 'aeiou' else 'a ') + words


def check_caption(caption, scene):
  """Whether all that a caption states is true of a scene.

  Args:
    caption: free text, such as a model's output.
    scene: a scene graph (`draw`).

  Returns:
    dict(facts=n, right=bool): the number of facts stated (one for each object
    with its colour and shape, each further attribute, count and relation; 0
    if the text does not follow the grammar), and whether all are true.
  """
  claims = _parse(caption)
  if claims is None:
    return dict(facts=0, right=False)
  mentions, relations, counted, _ = claims
  facts = (sum(len(m) - 1 for m in mentions) + len(relations)
           + sum(max(1, len(spec) - 1) for _, spec in counted))
  chosen = _assignments(claims, scene)
  return dict(facts=facts, right=next(chosen, None) is not None)


def meant(caption, scene):
  """The objects that the mentions of a true caption can mean.

  Returns:
    ([objects of each counted spec with a shape], [objects of each mention]),
    each in the order of the caption; both empty if it is not true.
  """
  claims = _parse(caption)
  if claims is None:
    return [], []
  mentions, _, counted, _ = claims
  objects = scene['objects']
  found = [{} for _ in mentions]
  true = False
  for chosen in _assignments(claims, scene):
    true = True
    for ids, k in zip(found, chosen):
      ids[k] = objects[k]
  if not true:
    return [], []
  return ([[o for o in objects if matches(spec, o)]
           for _, spec in counted if spec],
          [[ids[k] for k in sorted(ids)] for ids in found])


def _assignments(claims, scene):
  """Yields the ways in which a parsed caption is true.

  Each is a tuple with the number of the object of each mention.
  """
  mentions, relations, counted, excluded = claims
  objects = scene['objects']
  if not all(count(spec, scene) == n for n, spec in counted):
    return
  for chosen in itertools.permutations(range(len(objects)), len(mentions)):
    if all(matches(m, objects[k])
           and not (excluded and matches(excluded, objects[k]))
           for m, k in zip(mentions, chosen)) and all(
               holds(r, objects[chosen[a]], objects[chosen[b]])
               for r, a, b in relations):
      yield chosen


class _Words:
  """A cursor over the words of a caption."""

  def __init__(self, text):
    self.words, self.at = text.lower().split(), 0

  def take(self, phrase):
    """Steps over `phrase` if it comes next."""
    want = phrase.split()
    if self.words[self.at:self.at + len(want)] != want:
      return False
    self.at += len(want)
    return True

  def one_of(self, choices):
    """Steps over the choice (a dict's key or an item) that comes next."""
    return next((c for c in choices if self.take(c)), None)

  @property
  def done(self):
    return self.at == len(self.words)


def _parse(caption):
  """(mentions, [(relation, a, b)], [(n, spec)], excluded spec), or None."""
  w = _Words(caption)
  if w.take('there are'):
    number = w.one_of(NUMBERS[2:])
    if number is None:
      return None
    n = NUMBERS.index(number)
    if w.take('objects including'):
      return _finish(w, _mentions(w), counted=[(n, {})])
    spec = _parse_spec(w, {p: s for s, p in PLURALS.items()})
    if spec is None:
      return None
    mentions = []
    if not w.done:
      mentions = w.take('and') and _mentions(w, most=1)
    return _finish(w, mentions, counted=[(n, spec)], excluded=spec)
  if w.take('there is one object which is'):
    return _finish(w, _mentions(w, most=1), counted=[(1, {})])
  if w.take('there is'):
    return _finish(w, _mentions(w))
  mentions = _mentions(w)
  if not mentions or not w.take('is'):
    return _finish(w, mentions)
  if len(mentions) > 1:
    return None
  relations = []
  while len(relations) < 2:
    relation = w.one_of(RELATIONS)
    other = relation and _mentions(w, most=1)
    if not other:
      return None
    relations.append((relation, 0, len(mentions)))
    mentions += other
    if not w.take('and'):
      return _finish(w, mentions, relations)
  return None


def _finish(w, mentions, relations=(), counted=(), excluded=None):
  if mentions in (None, False) or not w.done:
    return None
  return mentions, list(relations), list(counted), excluded


def _mentions(w, most=scene_draw.MAX_OBJECTS):
  """mention {'and' mention}, as specs; None if it is not that.

  An 'and' after the last mention allowed is left to the caller.
  """
  found = []
  while True:
    article = w.one_of(('a', 'an'))
    spec = article and _parse_spec(w, {s: s for s in scene_draw.SHAPES})
    if not spec or mention(spec).split()[0] != article:
      return None
    found.append(spec)
    if len(found) == most or not w.take('and'):
      return found


def _parse_spec(w, shapes):
  """[size] [texture] colour shape; `shapes` maps the word to the shape."""
  size = w.one_of(scene_draw.SIZES)
  texture = w.one_of(scene_draw.TEXTURES)
  colour = w.one_of(scene_draw.COLOURS)
  shape = shapes.get(w.one_of(shapes))
  if not colour or not shape:
    return None
  spec = dict(size=size, texture=texture, colour=colour, shape=shape)
  return {k: v for k, v in spec.items() if v}
