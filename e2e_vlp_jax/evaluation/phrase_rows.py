"""Captions with their phrases in the colours of the phrases' boxes.

Wrong spans are seen at once: the coloured words are not those of the box.
"""
from e2e_vlp_jax.data import boxes as boxes_lib
from e2e_vlp_jax.tasks import base

MARK = '■'


def marked(text, phrases):
  """A text as (part, colour)s.

  Args:
    text: the text.
    phrases: [(first character, after the last, colour)]; where two overlap,
      the shorter one is seen.
  """
  colours = [base.INK] * len(text)
  for first, end, colour in sorted(phrases, key=lambda p: p[0] - p[1]):
    colours[first:end] = [colour] * (min(end, len(text)) - first)
  parts, start = [], 0
  for k in range(1, len(text) + 1):
    if k == len(text) or colours[k] != colours[start]:
      part = text[start:k].strip()
      parts += [(part, colours[start])] if part else []
      start = k
  return parts


def of_record(record):
  """The phrases and expressions of a record.

  One colour stands for an entity, or for a phrase of one caption where the
  dataset has no entities, and for all of its boxes.

  Args:
    record: as `records.Split.get` returns it.

  Returns:
    (list of `tasks.base.Box` in [0, 1], {number of a text: its row},
    [rows of expressions]). Phrases without a text number are left out.
  """
  colours, boxes = {}, {}
  spans = {}
  for p in record['phrases']:
    if p['text_number'] < 0:
      continue
    box = tuple(boxes_lib.swap_axes(p['bbox']).tolist())
    key = (('entity', p['id']) if p['id'] > 0 else
           (p['text_number'], *p['spans']))
    colour = boxes[box][0] if box in boxes and p['id'] <= 0 else None
    colour = colours.setdefault(key, colour or _next(colours))
    boxes.setdefault(box, (colour, p['text']))
    spans.setdefault(p['text_number'], []).extend(
        (first, end, colour) for first, end in p['spans'])
  rows = {k: [(f'{k + 1}.', base.FAINT), *marked(record['texts'][k], found)]
          for k, found in sorted(spans.items())}
  said = []
  for r in record['refexps']:
    box = tuple(boxes_lib.swap_axes(r['bbox']).tolist())
    colour = boxes[box][0] if box in boxes else colours.setdefault(
        ('expression', box), _next(colours))
    boxes.setdefault(box, (colour, ''))
    whole = r['spans'] or [(0, len(r['text']))]
    said.append([(MARK, colour), *marked(r['text'], [
        (first, end, colour) for first, end in whole])])
  return ([base.Box(box, colour, text[:24]) for box, (colour, text)
           in boxes.items()], rows, said)


def _next(colours):
  return base.COLOURS[len(set(colours.values())) % len(base.COLOURS)]
