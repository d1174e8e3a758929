"""`pairs`: image-text pairs from the web (SBU, Conceptual Captions), or yours.

  python -m e2e_vlp_jax.prepare pairs --name sbu --source DIR --data_dir data

writes data/sbu, which configs refer to as `sbu`. --source contains either of
two layouts:

- images and a table (.tsv, .csv or .jsonl) with one pair per row. The options
  --image and --text name the columns of the image's path, relative to
  --source, and of the text: by header, by key in JSON lines, or by number from
  0 in a table without a header (`--image 1 --text 0`). Rows with the same
  image become one record with several texts; a JSON line may also have a list
  of texts. Fields of a .tsv are not quoted. A row with more fields than the
  header is left out: a comma may have cut its text.
- tar shards of img2dataset (`--output_format webdataset`), at any depth. Each
  sample has KEY.jpg (or another image format) and its text in KEY.txt or under
  `caption` in KEY.json.

All images go to the split train, except --num_validation images that are held
out, evenly spread (our choice). Images that are missing or broken or have no
text are left out and counted. Memory: all rows of a table; of tar shards, the
offsets within one shard at a time.
"""
import csv
import functools
import itertools
import glob
import json
import os
import tarfile

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values

_IMAGES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp')


class Builder(base.RecordBuilder):
  """Groups pairs by image; a `_Table` or several `_Shard`s locate them."""
  name = 'pairs'
  NEEDS_SOURCE = True
  OPTIONS = {
      'name': ('pairs', 'name of the corpus'),
      'table': ('', 'table under --source; default: the only one there'),
      'image': ('image', "the table's column of image paths"),
      'text': ('text', "the table's column of texts"),
      'num_validation': (0, 'images held out as split validation'),
      'limit': (0, 'images to keep per split, the first; 0 keeps all')}

  def annotation_files(self):
    return [p.path for p in self._parts if isinstance(p, _Table)]

  def sources(self):
    self._parts = self._found()
    total = sum(map(len, self._parts))
    count, limit = self.options['num_validation'], self.options['limit']
    if not total:
      faults = [f'; {reason} ({where})' for p in self._parts
                for reason, where in p.faults]
      raise errors.UserError(f'{self._parts[0].path}: no pair of an image and '
                             'a text' + ''.join(faults[:1]))
    if count >= total:
      raise errors.UserError(f'num_validation: {count} of {total} images leave '
                             'none for training')
    sizes = {'train': total - count}
    if count:
      sizes['validation'] = count
    return {split: (min(limit or size, size), functools.partial(
        self._records, split, total, min(limit or size, size)))
            for split, size in sizes.items()}

  def _found(self):
    """The table or the shards of the corpus."""
    find = lambda pattern: sorted(glob.glob(
        os.path.join(glob.escape(self.source), pattern), recursive=True))
    tables = [p for p in find('*') if p.endswith(tuple(_READ))]
    if self.options['table']:
      tables = [os.path.join(self.source, self.options['table'])]
    shards = find('**/*.tar')
    if len(tables) > 1:
      raise errors.UserError(
          f'{len(tables)} tables in {self.source!r}, such as {tables[0]}; '
          'choose one with --table')
    if tables:
      return [_Table(tables[0], self.source, self.options['image'],
                     self.options['text'])]
    if not shards:
      raise errors.UserError(
          f'no table ({", ".join(_READ)}) and no .tar shards in '
          f'{self.source!r}')
    return [_Shard(p, self.source) for p in shards]

  def _records(self, split, total, limit):
    done = written = 0
    for part in self._parts:
      names = part.names()
      wanted = [n for k, n in enumerate(names, done) if base.held_out(
          k, total, self.options['num_validation']) == (split == 'validation')]
      done += len(names)
      if split == 'train':
        for reason, where in part.faults:
          self.skip(split, reason, where,
                    'images' if reason.startswith(('row', 'sample')) else None)
      for name, stored in zip(wanted, part.load_all(wanted)):
        if isinstance(stored, errors.UserError):
          self.skip_image(split, stored, name, part.image_id(name))
          continue
        texts = list(dict.fromkeys(self._texts(split, part, name)))
        if not texts:
          self.skip(split, 'image: no text', part.image_id(name), 'images')
          continue
        self.note_image(split, stored)
        yield base.record(image=stored.data, image_id=part.image_id(name),
                          height=stored.height, width=stored.width,
                          texts=texts)
        written += 1
        if written == limit:
          return
      part.forget()

  def _texts(self, split, part, name):
    """The texts of an image, on one line each; counts those that are none."""
    where = part.image_id(name)
    for given in part.texts(name):
      try:
        texts = values.texts(given, 'caption', functools.partial(self.note,
                                                              split))
      except values.Wrong as e:
        self.skip(split, e.reason, f'{where} ({e.found})')
        continue
      for text in texts:
        if '\n' in text.strip():
          self.note(split, 'text of several lines, which became one')
        if line := base.clean(text):
          yield line
        else:
          self.skip(split, 'empty text', where)


class _Table:
  """Images in files, and their texts in a table.

  Attributes:
    path: path of the table.
    faults: [(reason, row number)] of the rows that are left out.
  """

  def __init__(self, path, source, image, text):
    self.path, self._source = path, source
    self._texts, self.faults = {}, []
    if not path.endswith(tuple(_READ)):
      raise errors.UserError(f'table: {path!r}; expected '
                             + ' or '.join(_READ))
    read = _READ[os.path.splitext(path)[1]]
    number = 0
    try:
      with open(path, encoding='utf-8-sig', newline='') as f:
        for number, row in read(f, image, text):
          self._add(number, row)
    except FileNotFoundError as e:
      raise errors.UserError(f'no table {path}') from e
    except errors.UserError:
      raise
    except _NoColumn as e:
      raise errors.UserError(f'{path}: no column {e}') from e
    except (OSError, ValueError, RecursionError) as e:
      raise errors.UserError(f'{path}: not readable after row {number}: {e}'
                             ) from e

  def _add(self, number, row):
    """Adds the row (image, text), or a fault in its place."""
    if isinstance(row, str):
      self.faults.append((row, number))
      return
    name, text = row
    if not isinstance(name, str) or not name.strip():
      self.faults.append(('row without an image', number))
    elif not isinstance(text, str) and not (
        isinstance(text, list) and any(isinstance(t, str) for t in text)):
      self.faults.append(('row without a text', number))
    elif '://' in name:
      raise errors.UserError(
          f'{self.path}:{number}: the image is a URL, {values.show(name)}; '
          'download the images first, for example with img2dataset')
    else:
      self._texts.setdefault(name.strip(), []).append(text)

  def __len__(self):
    return len(self._texts)

  def names(self):
    return list(self._texts)

  def texts(self, name):
    return self._texts[name]

  def image_id(self, name):
    return values.text(name, 'image')

  def load_all(self, names):
    files = image_files.ImageFiles(self._source, [''])
    return files.load_all(names, self.names())

  def forget(self):
    """Does nothing: there is only one table."""


class _NoColumn(Exception):
  pass


def _delimited(f, image, text, **form):
  """Yields (row number, (image, text)) of a .csv or .tsv file.

  In the place of a row that has more fields than it should comes a fault: a
  text with an unquoted comma would be cut there.
  """
  rows = enumerate(_rows(f, form), 1)
  number, header = next(rows, (0, []))
  width = len(header)
  if image.isdigit() and text.isdigit():
    columns = int(image), int(text)
    rows = itertools.chain([(number, header)], rows)
  else:
    for wanted in (image, text):
      if wanted not in header:
        raise _NoColumn(repr(wanted) + errors.nearest(wanted, header))
      if header.count(wanted) > 1:
        raise ValueError(f'{header.count(wanted)} columns are called '
                         f'{wanted!r}')
    columns = header.index(image), header.index(text)
  for number, row in rows:
    if len(row) > width:
      yield number, 'row with more fields than the first'
    elif row:
      yield number, [row[c] if c < len(row) else None for c in columns]


def _rows(f, form):
  """The rows of csv.reader.

  Raises:
    ValueError: a quotation mark is not closed, or stands inside a field.
  """
  reader = csv.reader(f, strict=True, **form)
  while True:
    start = reader.line_num + 1
    try:
      yield next(reader)
    except StopIteration:
      return
    except csv.Error as e:
      raise ValueError(f'the row that begins in line {start} is not valid: '
                       f'{e}; is a quotation mark not closed?') from e


def _json_lines(f, image, text):
  """Yields (row number, (image, text)) of a .jsonl file."""
  for number, line in enumerate(f, 1):
    if line.strip():
      row = json.loads(line)
      if not isinstance(row, dict):
        raise ValueError(f'row {number} is not a JSON object')
      for wanted in (image, text):
        if number == 1 and wanted not in row:
          raise _NoColumn(repr(wanted) + errors.nearest(wanted, row))
      yield number, (row.get(image), row.get(text))


_READ = {
    '.csv': _delimited,
    '.tsv': functools.partial(_delimited, delimiter='\t',
                              quoting=csv.QUOTE_NONE),
    '.jsonl': _json_lines}


class _Shard:
  """A tar file of img2dataset.

  `names` finds the offsets of its members and keeps them until `forget`.

  Attributes:
    path: path of the file.
    faults: as in `_Table`.
  """

  def __init__(self, path, source):
    self.path = path
    self._id = os.path.splitext(os.path.relpath(path, source))[0]
    self.faults = []
    self._count = len(self.names())
    self.forget()

  def __len__(self):
    return self._count

  def names(self):
    """Keys of the samples that have an image, in the order of the file."""
    samples, self.faults = {}, []
    try:
      for m in _members(self.path):
        if not m.isfile():
          self._fault('member of a shard that is no file', m.name)
          continue
        folder, name = os.path.split(m.name)
        # As in webdataset, the key ends at the first dot of the name.
        key, _, kind = name.partition('.')
        sample = samples.setdefault(os.path.join(folder, key), {})
        if kind.lower() in sample:
          self._fault('member of a shard that is there twice', m.name)
        sample.setdefault(kind.lower(), (m.offset_data, m.size))
    except Exception as e:  # pylint: disable=broad-except
      # tarfile raises TarError and much else where a header is damaged.
      self.faults.append((f'rest of a shard: {e}', self.path))
    for key, sample in samples.items():
      if not _image_kind(sample):
        self._fault('sample without an image', key)
    self._samples = {k: s for k, s in samples.items() if _image_kind(s)}
    return list(self._samples)

  def _fault(self, reason, name):
    self.faults.append((reason, self.image_id(name)))

  def forget(self):
    self._samples = {}

  def image_id(self, name):
    return values.text(f'{self._id}/{name}', 'image')

  def load_all(self, names):
    return image_files.load_all(names, self._image)

  def _image(self, name):
    sample = self._samples[name]
    return self._read(sample[_image_kind(sample)]), False

  def texts(self, name):
    """[a text, or a list of texts, or anything else that is there]."""
    sample = self._samples[name]
    try:
      if 'txt' in sample:
        return [self._read(sample['txt']).decode()]
      if 'json' in sample:
        caption = json.loads(self._read(sample['json']))['caption']
        return [] if caption is None else [caption]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
      pass  # Not UTF-8, or JSON without a caption: treat it as no text.
    return []

  def _read(self, extent):
    start, size = extent
    try:
      with open(self.path, 'rb') as f:
        f.seek(start)
        return f.read(size)
    except OSError as e:
      raise errors.UserError(f'{self.path} cannot be read: {e}') from e


def _image_kind(sample):
  return next((k for k in _IMAGES if k in sample), None)


def _members(path):
  """Yields the members of a tar file that are no folders.

  Raises:
    Exception: the file is damaged or cut off.
  """
  with tarfile.open(path, 'r:') as tar:
    for m in tar:
      if m.size < 0:
        raise tarfile.ReadError(f'{m.name!r} has a negative size')
      if not m.isdir():
        yield m
    # tarfile takes a damaged header for the end, and ends at the first end.
    tar.fileobj.seek(tar.offset)
    while rest := tar.fileobj.read(1 << 20):
      if rest.strip(b'\0'):
        raise tarfile.ReadError('damaged header, or a second tar file, after '
                                f'byte {tar.offset}')
