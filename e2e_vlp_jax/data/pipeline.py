"""Records -> batches of static shapes; batch(t) is a function of (seed, t).

`order` says which record stands in which row of batch t, in closed form. The
ops of the pp string (`builder`) then make each row on its own, with draws
from the row's seed: (seed, t, row), in evaluation (seed, example_id). Nothing
depends on the number of hosts, threads or restarts: a host makes a
contiguous range of the rows of the global batch.

The ops plan (tokens, boxes, windows; some 0.2 ms an image), then a pool of
threads renders the pixels of the batch outside the interpreter's lock, and
`iterate` keeps a few batches ahead of the training. Why not tf.data: most of
the work is small arrays, on which TensorFlow's ops cost 3 ms an image (2 CPU
cores, 96x96 images), its antialiased resize takes three times as long as
Pillow's, it buries errors, and an iterator over Python functions that is
alive when the process ends can hang it.

Keys of a batch (B rows, bucket H x W, S texts of L tokens, M boxes, K
attributes). Masks are True where VALID. What a record lacks is masked:

image            uint8   [B,H,W,3] zero at bottom and right of the picture
image_mask       bool    [B,H,W]   True on the picture
text             int32   [B,S,L]   [CLS] words [SEP] padding, the true texts
text_mask        bool    [B,S,L]
masked_text      int32   [B,S,L]   after the ITM swap and the MLM masking
masked_text_mask bool    [B,S,L]
mlm_labels       int32   [B,S,L]   true id where a word is predicted, else -1
itm_labels       int32   [B,S]     1 true pair, 0 swapped, -1 no text
boxes            float32 [B,M,4]   cx, cy, w, h of the unpadded picture
box_labels       int32   [B,M]     0 padding
box_attributes   int32   [B,M,K]   -1 padding
box_mask         bool    [B,M]
task_mask/NAME   bool    [B]       mlm, itm, captioning, detection, attributes
example_id       int64   [B]       for `Pipeline.record`; -1 padding
image_size       int32   [B,2]     h, w of the original, upright
valid            bool    [B]       False for padding and unreadable records
"""
import collections
from concurrent import futures
import contextlib
import functools
import itertools
import logging
import os

import numpy as np

from e2e_vlp_jax.data import builder, draws, ops_image, order, records
from e2e_vlp_jax.errors import UserError

_DTYPES = {
    'image': np.uint8, 'image_mask': bool, 'text': np.int32,
    'text_mask': bool, 'masked_text': np.int32, 'masked_text_mask': bool,
    'mlm_labels': np.int32, 'itm_labels': np.int32, 'boxes': np.float32,
    'box_labels': np.int32, 'box_attributes': np.int32, 'box_mask': bool,
    'task_mask/mlm': bool, 'task_mask/itm': bool,
    'task_mask/captioning': bool, 'task_mask/detection': bool,
    'task_mask/attributes': bool, 'example_id': np.int64,
    'image_size': np.int32, 'valid': bool,
}
# A record of nothing, for rows of padding.
_NOTHING = {'image': b'', 'height': 0, 'width': 0, 'texts': [],
            'objects': [], 'has_attributes': False}
_AT_ONCE = 2  # batches in the making: one is planned, one is rendered
_AHEAD = 3    # batches made or in the making before they are asked for
_LABELS_CHECKED = 256  # records of a source that `check_labels` reads


class Pipeline:
  """Batches of a mixture of prepared datasets.

  Args:
    data_config: `config.data`: dir, buckets, sentences, max_text, max_boxes,
      max_attributes; optional threads (that render; 0 = as many as cores) and
      max_bad_records (100; more unreadable records end the run).
    tokenizer: a `tokenizer.Tokenizer`.
    labels: a `label_space.LabelSpace`.
    sources: list of {name, split, weight}; the weight is the source's share
      of a training batch and needs no normalising.
    pp: 'op|op(arg)', see `builder`.
    seed: int.
    batch_size: B of the global batch.
    train: endless and shuffled, or every example once in order, grouped by
      bucket, the last batch of a bucket padded.
    host_index, host_count: which contiguous part of the rows to make.

  Attributes:
    num_examples: examples in all sources.
    num_batches: batches of an evaluation; None in training.
    bad_records: example_ids of the unreadable records met so far.

  Raises:
    UserError: bad values, an empty source, or a batch size that
      `host_count` does not divide.
  """

  def __init__(self, data_config, *, tokenizer, labels, sources, pp, seed,
               batch_size, train, host_index=0, host_count=1):
    if batch_size < 1 or batch_size % host_count:
      raise UserError(f'batch_size: {batch_size} does not divide over '
                      f'{host_count} hosts')
    self._labels, self._seed = labels, seed
    self._train, self._batch_size = train, batch_size
    self._rows = batch_size // host_count
    self._first_row = host_index * self._rows
    self._buckets = _checked_buckets(data_config)
    self._makers = futures.ThreadPoolExecutor(_AT_ONCE)
    self._renderers = futures.ThreadPoolExecutor(
        data_config.get('threads', 0) or os.cpu_count())
    self._max_bad = data_config.get('max_bad_records', 100)
    self.bad_records = set()

    if not sources:
      raise UserError('data: no sources; expected a list of dict(name=..., '
                      'split=..., weight=...)')
    self._names, self._splits = [], []
    for source in sources:
      split = records.open_split(data_config['dir'], source['name'],
                                 source['split'])
      self._names.append(f'{source["name"]}/{source["split"]}')
      self._splits.append(split)
      if not len(split):  # pylint: disable=g-explicit-length-test
        raise UserError(f'data: {self._names[-1]} has no examples')
    weights = [s.get('weight', 1.) for s in sources]
    if min(weights) < 0 or not sum(weights) > 0:
      raise UserError(f'data: the weights of the sources are {weights}; '
                      'expected numbers >= 0, not all 0')
    self._offsets = np.cumsum([0] + [len(s) for s in self._splits])
    self.num_examples = int(self._offsets[-1])
    self._has_boxes = [bool(np.any(s.index['num_objects']))
                       for s in self._splits]

    members = [_bucket_members(s.index, self._buckets) for s in self._splits]
    self._order = (order.TrainOrder(members, weights, batch_size, seed)
                   if train else order.EvalOrder(members, batch_size))
    self.num_batches = None if train else len(self._order)

    ops = {name: kwargs for name, _, kwargs in builder.parse(pp)}
    self._reads_text, self._swaps_text = 'text' in ops, 'itm' in ops
    self._needs_names = ('boxes' in ops
                         and not ops['boxes'].get('drop_unknown'))
    self._apply = builder.build(pp, builder.Context(
        tokenizer=tokenizer, labels=labels, train=train,
        **{k: data_config[k] for k in ('sentences', 'max_text', 'max_boxes',
                                       'max_attributes')}))
    # Making the rows of padding also tries the pp string.
    self._blank = [self._row(-1, _NOTHING, bucket)
                   for bucket in range(len(self._buckets))]
    if 'target' not in self._blank[0]:
      raise UserError(f'pp string {pp!r}: no fit, which makes the image of a '
                      'batch')

  def batch(self, t):
    """This host's rows of batch t: dict of numpy arrays, see above.

    Raises:
      UserError: more than data.max_bad_records unreadable records, or a
        name that the label space lacks.
    """
    return self._counted(self._make(t))

  def iterate(self, start=0):
    """Yields (t, batch) for t = start, start + 1, ..., read ahead.

    Endless in training. Raises as `batch`.
    """
    steps = (itertools.count(start) if self._train else
             range(start, self.num_batches))
    ahead = collections.deque()
    try:
      for t in steps:
        ahead.append((t, self._makers.submit(self._make, t)))
        if len(ahead) > _AHEAD:
          t, batch = ahead.popleft()
          yield t, self._counted(batch.result())
      while ahead:
        t, batch = ahead.popleft()
        yield t, self._counted(batch.result())
    finally:
      for _, batch in ahead:
        batch.cancel()

  def record(self, example_id):
    """The record behind an example_id, as `records.Split.get` returns it."""
    source, number = self._locate(example_id)
    return self._splits[source].get(number)

  def check_labels(self):
    """Looks for names that the label space lacks, before time is spent.

    Reads the first records of every source. Does nothing where no boxes are
    made, or where the boxes op drops unknown names.

    Raises:
      UserError: naming the record, the name and the nearest known one.
    """
    if not self._needs_names:
      return
    for offset, split in zip(self._offsets, self._splits):
      for number in range(min(_LABELS_CHECKED, len(split))):
        with self._naming(offset + number):
          for thing in split.get(number)['objects']:
            self._labels.class_id(thing['label'])
            for attribute in thing['attributes']:
              self._labels.attribute_id(attribute)

  # From here on: how a batch is made.

  def _make(self, t):
    """This host's rows of batch t."""
    bucket, sources, numbers = self._order(t)
    ids = np.where(numbers < 0, -1, self._offsets[sources] + numbers)
    read = functools.cache(lambda row: self._read(ids[row]))
    rows = []
    for row in range(self._first_row, self._first_row + self._rows):
      record = read(row)
      if record is None:
        rows.append({**self._blank[bucket], 'example_id': ids[row]})
        continue
      seed = (t, row) if self._train else (int(ids[row]),)
      rows.append(self._row(
          ids[row], record, bucket, draws.fold(self._seed, 2, *seed),
          _partner_texts(row, ids, sources, read) if self._swaps_text else (),
          self._has_boxes[sources[row]]))

    image = np.zeros((self._rows, *self._buckets[bucket], 3), np.uint8)
    for k, ok in enumerate(self._renderers.map(ops_image.render, rows, image)):
      if not ok:
        rows[k] = {**self._blank[bucket],
                   **{n: rows[k][n] for n in ('example_id', 'image_size')}}
    batch = {k: np.array([row[k] for row in rows], dtype)
             for k, dtype in _DTYPES.items() if k in rows[0] and k != 'image'}
    return {'image': image, **batch}

  def _row(self, example_id, record, bucket, seed=0, partner_texts=(),
           has_boxes=False):
    """One row of a batch, its image still encoded."""
    texts = record['texts'] if self._reads_text else []
    with self._naming(example_id):
      row = self._apply({
          **record, 'texts': texts, 'partner_texts': partner_texts,
          'has_boxes': has_boxes, 'bucket': self._buckets[bucket],
          'seed': seed})
    return {**row, 'example_id': example_id, 'valid': example_id >= 0,
            'image_size': (record['height'], record['width'])}

  def _read(self, example_id):
    """The record, or None for padding and where it cannot be read."""
    if example_id < 0:
      return None
    try:
      return self.record(example_id)
    except Exception as e:  # pylint: disable=broad-exception-caught
      # Damaged bytes: the readers of ArrayRecord and protobuf have no error
      # class in common. `_counted` counts it.
      logging.warning('%s: %s', self._name(example_id), e)
      return None

  def _counted(self, batch):
    """The batch, once its unreadable rows are counted and reported."""
    bad = batch['example_id'][~batch['valid']].tolist()
    for example_id in set(bad) - self.bad_records - {-1}:
      self.bad_records.add(example_id)
      name, count = self._name(example_id), len(self.bad_records)
      logging.warning('%s cannot be read; its row is masked (%d so far)',
                      name, count)
      if count > self._max_bad:
        raise UserError(f'data: {count} unreadable records, the last {name}; '
                        f'data.max_bad_records is {self._max_bad}')
    return batch

  @contextlib.contextmanager
  def _naming(self, example_id):
    """Adds the record's name to a UserError."""
    try:
      yield
    except UserError as e:
      if example_id < 0:
        raise
      raise UserError(f'data: {self._name(example_id)}: {e}') from None

  def _locate(self, example_id):
    """(source, number of the record in it)."""
    if not 0 <= example_id < self.num_examples:
      raise IndexError(f'example_id {example_id} of {self.num_examples}')
    source = int(np.searchsorted(self._offsets, example_id, 'right')) - 1
    return source, int(example_id - self._offsets[source])

  def _name(self, example_id):
    source, number = self._locate(example_id)
    return f'{self._names[source]} record {number}'


def _partner_texts(row, ids, sources, read):
  """Texts of the next row of the global batch that shows another image.

  Of the same source, if there is one: telling the texts of one dataset from
  those of another teaches nothing about images.
  """
  others = (row + 1 + np.arange(len(ids) - 1)) % len(ids)
  others = others[ids[others] >= 0]
  same = sources[others] == sources[row]
  for other in (*others[same], *others[~same]):
    found = read(int(other))
    if found and found['texts'] and (found['image_id']
                                     != read(row)['image_id']):
      return found['texts']
  return []


def _checked_buckets(data_config):
  """[(H, W)] of the config, all of them usable."""
  for name, least in (('sentences', 1), ('max_text', 3), ('max_boxes', 1),
                      ('max_attributes', 1)):
    if data_config[name] < least:
      raise UserError(f'data.{name}: {data_config[name]} is less than '
                      f'{least}')
  buckets = [tuple(b) for b in data_config['buckets']]
  if not buckets or any(len(b) != 2 or min(b) < 1 for b in buckets):
    raise UserError(f'data.buckets: {buckets}; expected a list of (height, '
                    'width) in pixels')
  return buckets


def _bucket_members(index, buckets):
  """For each bucket the numbers of the records nearest in aspect ratio."""
  ratio = np.log(np.maximum(index['height'], 1)
                 / np.maximum(index['width'], 1))
  shapes = np.log([h / w for h, w in buckets])
  nearest = np.argmin(np.abs(ratio[:, None] - shapes), -1)
  return [np.flatnonzero(nearest == b) for b in range(len(buckets))]
