"""What annotation files mean, read a second time, without the project's code.

Slow and plain. Written for test_mutations.py from the documentation of
`prepare`, not from its code; a file that means nothing raises anything.
"""
import io
import json
import math
import re
import urllib.parse

from PIL import Image


def number(v):
  """The number that a JSON value means, or None."""
  if isinstance(v, str):
    v = v.strip(' \t\n\r\f\v')
    if not v or any(c not in '0123456789+-.eE' for c in v):
      return None
    try:
      v = float(v)
    except ValueError:
      return None
  if isinstance(v, bool) or not isinstance(v, (int, float)):
    return None
  try:
    return float(v) if math.isfinite(v) else None
  except OverflowError:
    return None


def whole(v):
  """The 64-bit whole number that a JSON value means, or None."""
  if isinstance(v, str) and re.fullmatch('[+-]?[0-9]{1,30}', v.strip(
      ' \t\n\r\f\v')):
    v = int(v)
  if not isinstance(v, int) or isinstance(v, bool):
    v = number(v)
    if v is None or v != math.floor(v):
      return None
  return int(v) if -2**63 <= v < 2**63 else None


def name_of(v):
  """An id: a whole number or another text, or None."""
  if isinstance(v, str) and v.strip() and not re.fullmatch(
      '[+-]?[0-9]{1,30}', v.strip(' \t\n\r\f\v')):
    return words(v)
  return whole(v)


def words(v):
  """Text without halves of characters, or None."""
  if not isinstance(v, str):
    return None
  v = re.sub('([\ud800-\udbff])([\udc00-\udfff])', lambda m: chr(
      0x10000 + (ord(m[1]) - 0xd800) * 1024 + ord(m[2]) - 0xdc00), v)
  return ''.join('\ufffd' if 0xd800 <= ord(c) < 0xe000 else c for c in v)


def line(v):
  """Text on one line, or None where nothing is left."""
  v = words(v)
  return ' '.join(v.split()) or None if v is not None else None


def lines(v):
  """The non-empty lines of a text or of the texts in a list."""
  return [t for t in map(line, v if isinstance(v, list) else [v]) if t]


def box(v, width, height, image):
  """(x0, y0, x1, y1) in [0, 1] and the area, or None."""
  v = [number(x) for x in v] if isinstance(v, list) and len(v) == 4 else [None]
  if None in v or min(v[2:]) <= 0:
    return None
  w, h = image
  if abs(width * h - height * w) > max(width, height, w, h):
    return None
  x0, y0 = max(v[0], 0), max(v[1], 0)
  x1, y1 = min(v[0] + v[2], width), min(v[1] + v[3], height)
  if x0 >= x1 or y0 >= y1:
    return None
  return x0 / width, y0 / height, x1 / width, y1 / height


def truth(v):
  """Whether a flag is set; None where it is none."""
  if isinstance(v, str):
    return {'0': False, '1': True, 'false': False, 'true': True, 'no': False,
            'yes': True}.get(v.strip().lower())
  if isinstance(v, (bool, int, float)) and v in (0, 1):
    return v == 1
  return None


def file_of(name, names, files):
  """The file that a name means: itself, or the only one that looks alike."""
  key = lambda n: [p for p in urllib.parse.unquote(n).casefold().replace(
      '\\', '/').split('/') if p not in ('', '.', '..')]
  if name in files:
    return name
  alike = [f for f in files if key(f) == key(name)]
  rivals = [n for n in set(names) if key(n) == key(name)]
  return alike[0] if len(alike) == len(rivals) == 1 else None


def coco(instances, captions, sizes):
  """[(id, texts, [(box, label, crowd, id)])] of two JSON files.

  Args:
    instances, captions: bytes.
    sizes: {file name: (width, height)} of the images that exist.
  """
  files = [json.loads(f) for f in (instances, captions)]
  images, labels, found = {}, {}, []
  for f in files:
    for i in f['images']:
      images.setdefault(name_of(i['id']), []).append(i)
    for c in f.get('categories', ()):
      labels[name_of(c['id'])] = words(c['name'])
  for i in sorted(images, key=lambda i: (isinstance(i, str), i)):
    name = file_of(images[i][0]['file_name'], [
        e['file_name'] for same in images.values() for e in same], sizes)
    if name is None:
      continue
    sides = [next((whole(e[k]) for e in images[i] if e.get(k) is not None),
                  None) for k in ('width', 'height')]
    size = sizes[name] if None in sides else sides
    texts, objects = [], []
    for a in [a for f in files for a in f['annotations']]:
      if name_of(a.get('image_id')) != i:
        continue
      if 'caption' in a:
        texts += lines(a['caption'])
      crowd = False if a.get('iscrowd') is None else truth(a['iscrowd'])
      label = labels.get(name_of(a.get('category_id')))
      at = box(a.get('bbox'), *size, sizes[name])
      if None not in (crowd, label, at):
        number_ = whole(a.get('id'))
        objects.append((at, label, crowd, -1 if number_ is None else number_))
    found.append((str(i), texts, objects))
  return found


def genome(files, sizes, known):
  """[(id, texts, [(box, label, attributes)], number of phrases)].

  Args:
    files: {name without .json: bytes}.
    sizes: {id: (width, height)} of the images that exist.
    known: (classes, attributes), as {what it is called: its name}.
  """
  items = {n: {whole(i[k]): i for i in reversed(json.loads(f)) for k in [
      'image_id' if 'image_id' in i else 'id']} for n, f in files.items()}
  regions, found = items['region_descriptions'], []
  for i in sorted({*items['objects'], *regions, *items['image_data']}):
    if i not in sizes:
      continue
    size = [whole(items['image_data'].get(i, {}).get(k)) or 0
            for k in ('width', 'height')]
    size = sizes[i] if min(size) <= 0 else size
    texts, phrases, objects = {}, 0, []
    for r in regions.get(i, {}).get('regions', ()):
      text = line(r.get('phrase'))
      if text:
        texts[text] = True
        phrases += box([r.get(k) for k in ('x', 'y', 'width', 'height')],
                       *size, sizes[i]) is not None
    told = [(whole(a.get('object_id')), a.get('attributes')) for a in
            items['attributes'].get(i, {}).get('attributes', ())]
    for o in items['objects'].get(i, {}).get('objects', ()):
      name = o.get('names') or o.get('name')
      name = words(name[0] if isinstance(name, list) else name)
      merged = o.get('merged_object_ids')
      ids = [whole(o.get('object_id')), *(
          map(whole, merged) if isinstance(merged, list) else ())]
      mine = [t for k in dict.fromkeys(ids) if k is not None
              for t in told if t[0] == k]
      if name is None:
        continue
      told = [t for t in told if t not in mine]
      label = known[0].get(tidy(name))
      at = box([o.get(k) for k in 'xywh'], *size, sizes[i])
      if label is None or at is None:
        continue
      attributes = [part for _, given in mine
                    for a in (given if isinstance(given, list) else [given])
                    if isinstance(a, str) for part in split_and(words(a))]
      objects.append((at, label, list(dict.fromkeys(
          known[1][a] for a in attributes if a in known[1]))))
    found.append((str(i), list(texts), objects, phrases))
  return found


def tidy(name):
  return re.sub(r'\.$', '', ' '.join(name.split()).lower()).strip()


def split_and(attribute):
  name = tidy(attribute)
  return [name] if name == 'black and white' else [
      p.strip() for p in name.split(' and ')]


def is_picture(data):
  try:
    Image.open(io.BytesIO(data)).load()
  except Exception:  # pylint: disable=broad-except
    return False
  return True


def octal(field):
  """A number of a tar header, or None."""
  digits = field.split(b'\0')[0].strip() or b'0'
  return int(digits, 8) if re.fullmatch(b'[0-7]+', digits) else None


def shard(data):
  """[(key, texts)] of the whole samples of a tar file."""
  samples, at = {}, 0
  while at + 512 <= len(data):
    head = data[at:at + 512]
    if not head.strip(b'\0'):
      break
    total = sum(head[:148]) + sum(head[156:]) + 8 * 32
    if octal(head[148:156]) != total:
      break
    name = head[:100].split(b'\0')[0].decode('utf-8', 'surrogateescape')
    size = octal(head[124:136])
    key, _, kind = name.rpartition('/')[2].partition('.')
    content = data[at + 512:at + 512 + size]
    samples.setdefault(name.rpartition('/')[0] + key, {}).setdefault(
        kind.lower(), content)
    at += 512 + -(-size // 512) * 512
  found = []
  for key, sample in samples.items():
    if not is_picture(sample.get('png', b'')):
      continue
    texts = None
    if 'txt' in sample:
      try:
        texts = lines(sample['txt'].decode())
      except UnicodeDecodeError:
        pass
    else:
      try:
        texts = lines(json.loads(sample['json'])['caption'])
      except (KeyError, ValueError, TypeError, IndexError):
        pass
    if texts:
      found.append((key, list(dict.fromkeys(texts))))
  return found


def table(data, kind, images):
  """[(image, texts)] of a table with the columns image and text.

  Args:
    data: bytes.
    kind: 'csv', 'tsv' or 'jsonl'.
    images: names of the images that exist.
  """
  found = {}
  for name, texts in rows(data.decode('utf-8-sig'), kind):
    if isinstance(name, str) and name.strip():
      if any(isinstance(t, str) for t in (
          texts if isinstance(texts, list) else [texts])):
        found.setdefault(name.strip(), []).extend(lines(texts))
  return [(n, list(dict.fromkeys(t))) for n, t in found.items()
          if t and file_of(n, found, images)]


def rows(text, kind):
  """Yields (image, text) of each row that is whole."""
  if kind == 'jsonl':
    for row in filter(str.strip, re.split('\r\n|\r|\n', text)):
      row = json.loads(row)
      yield row.get('image'), row.get('text')
    return
  read = fields(text) if kind == 'csv' else [
      row.split('\t') for row in re.split('\r\n|\r|\n', text)]
  head = read[0]
  for row in read[1:]:
    if row != [''] and len(row) <= len(head):
      row += [None] * (len(head) - len(row))
      yield row[head.index('image')], row[head.index('text')]


def fields(text):
  """The rows of CSV, by a state for each character."""
  found, row, cell, state = [], [], '', 'start'
  for c in text:
    if state == 'quoted':
      if c == '"':
        state = 'quote'
      else:
        cell += c
    elif c == '"' and state in ('start', 'quote'):
      cell += '"' if state == 'quote' else ''
      state = 'quoted'
    elif c in ',\r\n':
      row, cell, state = [*row, cell], '', 'start'
      if c != ',':
        found.append(row)
        row = []
    elif state == 'quote':
      raise ValueError('text after a quotation mark')
    else:
      cell, state = cell + c, 'plain'
  if state == 'quoted':
    raise ValueError('a quotation mark is not closed')
  return [*found, [*row, cell]]
