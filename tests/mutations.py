"""Seeded damage to JSON values, texts and bytes, as fuzzers do it."""
import copy
import json
import math

VALUES = (None, True, False, 0, 1, -1, 2, 7, 3.5, 1e308, -1e308, 10**30,
          math.nan, math.inf, -math.inf, '', ' ', '0', '1', '7', '3.5', '1e400',
          'nan', '1_0', '٣', 'false', 'yes', 'x', 'a\ud83d', '\ud83d\ude00',
          'a\udcffb', '\0', 'a|b', 'é', [], [1], ['a', 'b'], ['a', None],
          [1, 2, 3, 4], ['1', 2, 3., 4], [1, 2, 3, 4, 5], {}, {'id': 1})


def damaged(value, rng):
  """A copy of a JSON value with one to three changes at random places."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 2, 3))):
    _damage(value, rng)
  return value


def _damage(value, rng):
  """Changes one place, in place."""
  places = list(_places(value))
  if not places:  # Nothing is left.
    return
  parent, key = rng.choice(places)
  kind = rng.randrange(5)
  if kind == 0:
    del parent[key]
  elif kind == 1 and isinstance(parent, list):
    parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
  elif kind == 2:  # The value of another place.
    other, at = rng.choice(places)
    parent[key] = copy.deepcopy(other[at])
  elif kind == 3:  # The same in other words, as another tool writes it.
    parent[key] = _reworded(parent[key], rng)
  else:
    parent[key] = copy.deepcopy(rng.choice(VALUES))


def _reworded(value, rng):
  if isinstance(value, bool) or value is None:
    return str(value)
  if isinstance(value, (int, float)):
    return rng.choice((str(value), float(value), f' {value} ', [value]))
  if isinstance(value, str):
    return rng.choice(([value], [value, value], value + '\ud83d', ' ' + value,
                       value.upper()))
  return rng.choice(([value], {'x': value}))


def _places(value):
  """Yields (container, key) of every place, weighted to the inner ones."""
  items = (value.items() if isinstance(value, dict) else
           enumerate(value) if isinstance(value, list) else ())
  for key, inner in items:
    yield value, key
    yield from _places(inner)


def text_of(value, rng):
  """JSON, which is cut or has a wrong byte once in a while: bytes."""
  data = json.dumps(value, ensure_ascii=rng.random() < .5).encode(
      'utf-8', 'surrogatepass')
  return bytes_damaged(data, rng) if rng.random() < .1 else data


def bytes_damaged(data, rng):
  """Cut, or with one to three bytes changed, inserted or lost."""
  data = bytearray(data)
  if rng.random() < .2:
    return bytes(data[:rng.randrange(len(data))])
  for _ in range(rng.choice((1, 1, 2, 3))):
    at, kind = rng.randrange(len(data)), rng.randrange(3)
    if kind == 0:
      data[at] = rng.randrange(256)
    elif kind == 1:
      data.insert(at, rng.choice(b'",\t\n\r\0[]{}x\xff'))
    else:
      del data[at]
  return bytes(data)
