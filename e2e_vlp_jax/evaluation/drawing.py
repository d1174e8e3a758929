"""Draws boxes with tags, and rows of coloured words, on Pillow images."""
import functools
import os

from PIL import ImageDraw, ImageFont

PAPER = '#16191d'
# Pixels: the height of a row of words, and about the width of a letter.
LINE, LETTER = 22, 8.4


def draw_boxes(photo, boxes, scale):
  """Draws boxes and their tags; earlier tags choose their places last."""
  pen, placed = ImageDraw.Draw(photo), []
  for one in boxes:
    x0, y0, x1, y1 = (round(float(v) * scale) for v in one.box)
    x0, y0 = max(x0, 1), max(y0, 1)
    x1 = max(min(x1, photo.width - 2), x0 + 1)
    y1 = max(min(y1, photo.height - 2), y0 + 1)
    placed.append((one, (x0, y0, x1, y1)))
    if one.style == 'dashed':
      _dashed(pen, placed[-1][1], one.colour)
    elif one.style == 'thin':
      pen.rectangle((x0, y0, x1, y1), outline=one.colour)
    else:
      pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline='black', width=5)
      pen.rectangle((x0, y0, x1, y1), outline=one.colour, width=3)
  taken = []
  for one, pixels in reversed(placed):
    if one.tag:
      _tag(photo, pen, one, pixels, taken)


def _dashed(pen, box, colour, dash=8):
  x0, y0, x1, y1 = box
  for width, ink in ((4, 'black'), (2, colour)):
    for x in range(x0, x1, 2 * dash):
      for y in (y0, y1):
        pen.line((x, y, min(x + dash, x1), y), ink, width)
    for y in range(y0, y1, 2 * dash):
      for x in (x0, x1):
        pen.line((x, y, x, min(y + dash, y1)), ink, width)


def _tag(photo, pen, one, pixels, taken):
  """Writes a box's tag at the first free place around it."""
  letters = font(15)
  width, height = int(letters.getlength(one.tag)) + 8, 20
  x0, y0, x1, y1 = pixels
  places = [(x0, y0 - height), (x0, y1), (x1 - width, y0 - height),
            (x1 - width, y1), (x0 + 2, y0 + 2), (x1, y0), (x0 - width, y0),
            (x0 + 2, y1 - height - 2)]
  free = []
  for x, y in places:
    place = (x, y, x + width, y + height)
    inside = (x >= 0 and y >= 0 and place[2] <= photo.width
              and place[3] <= photo.height)
    overlap = sum(max(0, min(place[2], t[2]) - max(x, t[0]))
                  * max(0, min(place[3], t[3]) - max(y, t[1])) for t in taken)
    free.append((not inside, overlap, place))
  # min keeps the first of equals.
  _, _, (x, y, _, _) = min(free, key=lambda f: f[:2])
  x = min(max(x, 0), max(photo.width - width, 0))
  y = min(max(y, 0), max(photo.height - height, 0))
  taken.append((x, y, x + width, y + height))
  outlined = one.style != 'bold'
  pen.rectangle(taken[-1], fill='#000000' if outlined else one.colour,
                outline=one.colour if outlined else None)
  pen.text((x + 4, y + height / 2), one.tag, font=letters, anchor='lm',
           fill=one.colour if outlined else '#000000')


def write(pen, x, y, row):
  """Writes the parts of a row one after the other, each in its colour."""
  letters = font(15)
  for text, colour in row:
    pen.text((x, y + LINE / 2), text, fill=colour, font=letters, anchor='lm')
    x += letters.getlength(text + ' ')


def wrap(row, letters):
  """Breaks a row of (text, colour) into rows of at most `letters` letters."""
  rows, length = [[]], 0
  for word, colour in [(w, c) for text, c in row for w in text.split(' ')]:
    if length and length + len(word) > letters:
      rows.append([('   ', colour)])
      length = 4
    rows[-1].append((word, colour))
    length += len(word) + 1
  return rows


@functools.lru_cache(None)
def font(size):
  """DejaVu Sans, which matplotlib ships: it has the check marks."""
  import matplotlib  # pylint: disable=g-import-not-at-top
  return ImageFont.truetype(os.path.join(
      matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), size)
