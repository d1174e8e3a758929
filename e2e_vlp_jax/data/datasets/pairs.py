"""`pairs`: image-text pairs from the web (SBU, Conceptual Captions), or yours.

  python -m e2e_vlp_jax.prepare pairs --name sbu --source DIR --data_dir data

writes data/sbu, which configs refer to as `sbu`. --source contains either of
two layouts:

- images and a table (.tsv, .csv or .jsonl) with one pair per row. The options
  --image and --text name the columns of the image's path, relative to
  --source, and of the text: by header, by key in JSON lines, or by number from
  0 in a table without a header (`--image 1 --text 0`). Rows with the same
  image become one record with several texts; a JSON line may also have a list
  of texts. Fields of a .tsv are not quoted.
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
import glob
import json
import os
import tarfile

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import base

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
      raise errors.UserError(f'{self._parts[0].path}: no pair of an image and '
                             'a text')
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
          self.skip(split, reason, where)
      for name, stored in zip(
          wanted, image_files.load_all(wanted, part.image)):
        if isinstance(stored, errors.UserError):
          self.skip(split, f'image: {base.reason(stored, name)}',
                    part.image_id(name))
          continue
        texts = list(dict.fromkeys(
            t for t in map(base.clean, part.texts(name)) if t))
        if not texts:
          self.skip(split, 'image: no text', part.image_id(name))
          continue
        if stored.changed:
          self.note(split, f'image encoded again: {stored.changed}')
        yield base.record(image=stored.data, image_id=part.image_id(name),
                          height=stored.height, width=stored.width,
                          texts=texts)
        written += 1
        if written == limit:
          return
      part.forget()


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
          name, texts = row
          texts = texts if isinstance(texts, list) else [texts]
          if not isinstance(name, str) or not name.strip():
            self.faults.append(('row without an image', number))
          elif not all(isinstance(t, str) for t in texts):
            self.faults.append(('row without a text', number))
          elif '://' in name:
            raise errors.UserError(
                f'{path}:{number}: the image is a URL, {name!r}; '
                'download the images first, for example with img2dataset')
          else:
            self._texts.setdefault(name.strip(), []).extend(texts)
    except FileNotFoundError as e:
      raise errors.UserError(f'no table {path}') from e
    except errors.UserError:
      raise
    except _NoColumn as e:
      raise errors.UserError(f'{path}: no column {e}') from e
    except (OSError, ValueError, csv.Error) as e:
      raise errors.UserError(f'{path}: not readable after row {number}: {e}'
                             ) from e

  def __len__(self):
    return len(self._texts)

  def names(self):
    return list(self._texts)

  def texts(self, name):
    return self._texts[name]

  def image_id(self, name):
    return name

  def image(self, name):
    try:
      with open(os.path.join(self._source, name), 'rb') as f:
        return f.read()
    except (OSError, ValueError) as e:
      raise errors.UserError(
          'no such image file' if isinstance(e, FileNotFoundError)
          else f'{name} cannot be read: {e}') from e

  def forget(self):
    """Does nothing: there is only one table."""


class _NoColumn(Exception):
  pass


def _delimited(f, image, text, **form):
  """Yields (row number, (image, text)) of a .csv or .tsv file."""
  rows = enumerate(csv.reader(f, **form), 1)
  if image.isdigit() and text.isdigit():
    columns = int(image), int(text)
  else:
    _, header = next(rows, (0, []))
    for wanted in (image, text):
      if wanted not in header:
        raise _NoColumn(repr(wanted) + errors.nearest(wanted, header))
    columns = header.index(image), header.index(text)
  for number, row in rows:
    if row:
      yield number, [row[c] if c < len(row) else None for c in columns]


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
      with tarfile.open(self.path, 'r:') as tar:
        for m in tar:
          if m.isfile():
            folder, name = os.path.split(m.name)
            # As in webdataset, the key ends at the first dot of the name.
            key, _, kind = name.partition('.')
            samples.setdefault(os.path.join(folder, key), {})[
                kind.lower()] = m.offset_data, m.size
    except (tarfile.TarError, OSError, EOFError) as e:
      self.faults.append((f'rest of a shard: {e}', self.path))
    self.faults += [('sample without an image', f'{self._id}/{k}')
                    for k, s in samples.items() if not _image_kind(s)]
    self._samples = {k: s for k, s in samples.items() if _image_kind(s)}
    return list(self._samples)

  def forget(self):
    self._samples = {}

  def image_id(self, name):
    return f'{self._id}/{name}'

  def image(self, name):
    sample = self._samples[name]
    return self._read(sample[_image_kind(sample)])

  def texts(self, name):
    sample = self._samples[name]
    try:
      if 'txt' in sample:
        return [self._read(sample['txt']).decode()]
      if 'json' in sample:
        return [json.loads(self._read(sample['json']))['caption'] or '']
    except (ValueError, KeyError, TypeError):
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
