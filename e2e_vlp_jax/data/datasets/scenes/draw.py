"""Draws scenes: a scene graph of 1 to 6 objects, and its picture.

It uses only numpy, Pillow's PNG encoder and Python's `random`, and every number
comes from the seed, so the same seed gives the same bytes.

A scene graph is JSON-able:
  {'background': 'plain' | 'cluttered',
   'objects': [{'shape', 'colour', 'size', 'texture',
                'box': [x0, y0, x1, y1], 'area'}]}
Boxes are in whole pixels, tight around the object before others cover it;
area is its number of pixels. Later objects lie on top.
"""
import functools
import io
import math
import random

import numpy as np
from PIL import Image

SIDE = 96                     # pixels, height and width of a scene
MAX_OBJECTS = 6
MIN_VISIBLE = 0.65            # least uncovered share of each object
SHAPES = ('circle', 'square', 'triangle', 'star', 'cross', 'ring')
COLOURS = {
    'red': (228, 38, 40), 'orange': (250, 138, 24), 'yellow': (250, 232, 60),
    'green': (40, 178, 62), 'cyan': (50, 215, 226), 'blue': (52, 88, 250),
    'purple': (176, 62, 206), 'white': (246, 246, 246)}
SIZES = {'small': (14, 20), 'large': (26, 36)}      # pixels, inclusive
TEXTURES = ('plain', 'striped', 'dotted')
# One colour of each shape occurs in the split `unseen` only.
HELD_OUT = frozenset((
    ('purple', 'circle'), ('cyan', 'square'), ('blue', 'triangle'),
    ('orange', 'star'), ('green', 'cross'), ('red', 'ring')))
ALL_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES)
SEEN_PAIRS = tuple(p for p in ALL_PAIRS if p not in HELD_OUT)


def sample_scene(seed, unseen=False):
  """A random scene graph.

  Args:
    seed: a string; the same string gives the same scene.
    unseen: True puts at least one held-out colour-shape pair in the scene;
      False leaves all of them out.
  """
  rng = random.Random(f'scene {seed}')
  wanted = rng.randint(1, MAX_OBJECTS)
  pairs = [rng.choice(ALL_PAIRS if unseen else SEEN_PAIRS)
           for _ in range(wanted)]
  if unseen:
    pairs[rng.randrange(wanted)] = rng.choice(sorted(HELD_OUT))
  # Independent objects are rarely alike, but counting needs some that are.
  if wanted > 1 and rng.random() < 0.3:
    a, b = rng.sample(range(wanted), 2)
    if not unseen or pairs[b] not in HELD_OUT:
      pairs[b] = pairs[a]
  owner = np.full((SIDE, SIDE), -1, np.int8)
  objects = []
  # Held-out pairs first: objects that do not fit are left out of the scene.
  for colour, shape in sorted(pairs, key=lambda p: p not in HELD_OUT):
    size = 'large' if rng.random() < (.6 if wanted < 4 else .35) else 'small'
    texture = rng.choice(('plain',) + TEXTURES)
    for attempt in range(40):
      if attempt == 20:
        size = 'small'
      pixels = rng.randint(*SIZES[size])
      mask = _stencil(shape, pixels)[0] > 0
      h, w = mask.shape
      x, y = rng.randint(1, SIDE - w - 1), rng.randint(1, SIDE - h - 1)
      covered = np.bincount(owner[y:y + h, x:x + w][mask] + 1,
                            minlength=len(objects) + 1)[1:]
      visible = np.bincount(owner.ravel() + 1,
                            minlength=len(objects) + 1)[1:] - covered
      if any(v < MIN_VISIBLE * o['area'] for v, o in zip(visible, objects)):
        continue
      box = [x, y, x + w, y + h]
      # Boxes that nearly coincide (a small object in the hole of a ring) and
      # overlapping objects of one colour would make detection a guess.
      if any(_overlap(box, o['box']) > (0.35 if o['colour'] != colour else 0)
             for o in objects):
        continue
      owner[y:y + h, x:x + w][mask] = len(objects)
      objects.append(dict(shape=shape, colour=colour, size=size,
                          texture=texture, box=box, area=int(mask.sum())))
      break
  return {'background': rng.choice(('plain', 'cluttered')),
          'objects': objects}


def draw_scene(scene, seed):
  """The picture of a scene: uint8 [SIDE, SIDE, 3]; noise from `seed`."""
  rng = random.Random(f'picture {seed}')
  image = _background(scene['background'] == 'cluttered', rng)
  for o in scene['objects']:
    x0, y0, x1, y1 = o['box']
    alpha, ink = _stencil(o['shape'], _pixels(o), o['texture'])
    colour = np.float32([c + rng.randint(-10, 10)
                         for c in COLOURS[o['colour']]])
    paint = colour * ink[:, :, None]
    window = image[y0:y1, x0:x1]
    window += alpha[:, :, None] * (paint - window)
  noise = np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8)
  noise = (noise % 3).astype(np.float32).reshape(SIDE, SIDE, 1) * 4 - 4
  return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def encode_png(image):
  """PNG bytes of uint8 [H, W, 3]."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, 'PNG', compress_level=1)
  return out.getvalue()


def centre(o):
  """(x, y) of the centre of an object's box, in pixels."""
  x0, y0, x1, y1 = o['box']
  return (x0 + x1) / 2, (y0 + y1) / 2


def _pixels(o):
  """The size of the stencil that drew an object, from its box."""
  x0, _, x1, _ = o['box']
  return x1 - x0


def _overlap(a, b):
  """Intersection over the smaller of two boxes."""
  w = min(a[2], b[2]) - max(a[0], b[0])
  h = min(a[3], b[3]) - max(a[1], b[1])
  if w <= 0 or h <= 0:
    return 0.
  area = lambda c: (c[2] - c[0]) * (c[3] - c[1])
  return w * h / min(area(a), area(b))


def _background(cluttered, rng):
  """A dark greyish canvas, float32 [SIDE, SIDE, 3].

  Every colour of `COLOURS` is brighter or far more saturated than it.
  """
  base = np.float32([rng.randint(24, 66)] * 3)
  base += np.float32([rng.randint(-8, 8) for _ in range(3)])
  image = np.broadcast_to(base, (SIDE, SIDE, 3)).copy()
  if not cluttered:
    return image
  angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(8, 24)
  ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
  image += (strength * (math.cos(angle) * ramp[None, :]
                        + math.sin(angle) * ramp[:, None]))[:, :, None]
  steps = np.linspace(0, 1, 2 * SIDE)
  for _ in range(rng.randint(3, 7)):
    (x0, x1), (y0, y1) = ([rng.randrange(SIDE) for _ in 'ab'] for _ in 'xy')
    image[np.rint(y0 + (y1 - y0) * steps).astype(int),
          np.rint(x0 + (x1 - x0) * steps).astype(int)] = _dull(rng)
  for _ in range(rng.randint(8, 24)):
    x, y, r = rng.randrange(SIDE), rng.randrange(SIDE), rng.randint(1, 2)
    image[y:y + r, x:x + r] = _dull(rng)
  return image


def _dull(rng):
  level = rng.randint(20, 120)
  return [level + rng.randint(-10, 10) for _ in range(3)]


@functools.cache
def _stencil(shape, pixels, texture='plain'):
  """How an object is drawn: (coverage, ink), both float32 [h, w] in [0, 1].

  Coverage is trimmed to the rows that it touches; its width is `pixels` for
  every shape, so the box determines the stencil. Ink is the brightness of the
  texture.
  """
  fine = 8                     # samples per pixel, for smooth edges
  t = (np.arange(pixels * fine) + .5) / (pixels * fine) * 2 - 1
  u, v = t[None, :], t[:, None]
  r = np.hypot(u, v)
  if shape == 'circle':
    inside = r <= 1
  elif shape == 'square':
    inside = (abs(u) <= 1) & (abs(v) <= 1)
  elif shape == 'triangle':
    inside = abs(u) <= (v + 1) / 2
  elif shape == 'star':
    inside = _in_star(u / 1.05, v / 1.05)
  elif shape == 'cross':
    inside = (abs(u) <= .36) | (abs(v) <= .36)
  else:
    inside = (r <= 1) & (r >= .52)
  alpha = inside.reshape(pixels, fine, pixels, fine).mean((1, 3))
  alpha = np.where(alpha < .1, 0, alpha).astype(np.float32)
  rows, = np.nonzero(alpha.any(1))
  alpha = alpha[rows[0]:rows[-1] + 1]
  y, x = np.indices(alpha.shape)
  if texture == 'striped':
    marks = (x + y) % 6 < 3
  elif texture == 'dotted':
    marks = ((x + 2 * (y // 4 % 2)) % 4 < 2) & (y % 4 < 2)
  else:
    marks = np.zeros(alpha.shape, bool)
  # The rim stays plain, so texture does not blur the outline.
  padded = np.pad(alpha, 1)
  core = np.minimum.reduce([padded[1:-1, :-2], padded[1:-1, 2:],
                            padded[:-2, 1:-1], padded[2:, 1:-1], alpha])
  ink = np.where(marks & (core == 1), .38, 1).astype(np.float32)
  return alpha, ink


def _in_star(u, v):
  """Points of a five-pointed star of radius 1 with a tip at the top."""
  sector = 2 * math.pi / 5
  angle = np.arctan2(u, -v)
  # Fold all ten half points onto one: tip at angle 0, notch at half a sector.
  angle = abs((angle + sector / 2) % sector - sector / 2)
  r = np.hypot(u, v)
  x, y = r * np.cos(angle), r * np.sin(angle)
  notch = .48
  nx, ny = notch * math.cos(sector / 2), notch * math.sin(sector / 2)
  # Inside: on the centre's side of the edge from the tip (1, 0) to the notch.
  return (nx - 1) * y - ny * (x - 1) >= 0
