"""Records -> batches of static shapes; batch(t) is a function of (seed, t).

`order` says which record stands in which row of batch t, in closed form. The
ops of the pp string (`builder`) then make each row on its own, with draws
from the row's seed: (seed, t, row), in evaluation (seed, example_id). Nothing
depends on the number of hosts, threads or restarts: a host makes those rows
of the global batch that its devices will hold.

tf.data drives it: it asks for parts of batches from its own threads, puts
them together in order and reads ahead. The rows themselves are made by numpy
(the ops plan: tokens, boxes, windows), Pillow and OpenCV (`ops_image.render`),
not by TensorFlow's ops: most of the work is small arrays, and on two CPU cores
a row of 96x96 takes 0.8 ms so, 3 ms with TensorFlow's ops. Being driven by
tf.data costs 0.95 times (96x96) to 1.04 times (512x512) the CPU time of a pool
of threads of our own; asked for row by row instead of _CHUNK rows a call, it
would cost 1.5 times.

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
import atexit
import contextlib
import functools
import gc
import itertools
import logging
import os
import threading

import numpy as np

from e2e_vlp_jax.data import ops_image, order, pp as pp_lib, records, rng
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
_CHUNK = 16  # rows that tf.data asks for at once: a call has its price
_AHEAD = 2  # finished batches that wait to be asked for
_LABELS_CHECKED = 256  # records of a source that `check_labels` reads


class Pipeline:
  """Batches of a mixture of prepared datasets.

  Args:
    data_config: `config.data`: dir, buckets, sentences, max_text, max_boxes,
      max_attributes; optional threads (of tf.data; 0 = as many as cores) and
      max_bad_records (100; more unreadable records end the run).
    vocabularies: a `vocabularies.Vocabularies`.
    sources: list of {name, split, weight}; the weight is the source's share
      of a training batch and needs no normalising. 'images': as many as the
      source has; 'texts': as many rows as it takes to show each text once.
    pp: 'op|op(arg)', see `builder`.
    seed: int.
    batch_size: B of the global batch.
    train: endless and shuffled, or every example once in order, grouped by
      bucket, the last batch of a bucket padded.
    rows: numbers of the rows of the global batch to make, in this order;
      None = all (`training.sharding.host_rows` knows a host's).

  Attributes:
    num_examples: examples in all sources.
    num_batches: batches of an evaluation; None in training.
    bad_records: example_ids of the unreadable records met so far.

  Raises:
    UserError: bad values or an empty source.
  """

  def __init__(self, data_config, *, vocabularies, sources, pp, seed,
               batch_size, train, rows=None):
    if batch_size < 1:
      raise UserError(f'batch_size: {batch_size}; expected at least 1')
    self._labels, self._seed = vocabularies.labels, seed
    self._train, self._batch_size = train, batch_size
    self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    self._buckets = _checked_buckets(data_config)
    self._threads = data_config.get('threads', 0) or os.cpu_count()
    self._max_bad = data_config.get('max_bad_records', 100)
    self.bad_records = set()
    self._planning = threading.Lock()

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
    weights = [_weight(s.get('weight', 1.), split, data_config['sentences'])
               for s, split in zip(sources, self._splits)]
    if min(weights) < 0 or not sum(weights) > 0:
      raise UserError(f'data: the weights of the sources are {weights}; '
                      'expected numbers >= 0, not all 0')
    self._offsets = np.cumsum([0] + [len(s) for s in self._splits])
    self.num_examples = int(self._offsets[-1])
    self._has_boxes = [bool(np.any(s.index['num_objects']))
                       for s in self._splits]

    members = [_bucket_members(s.index, self._buckets) for s in self._splits]
    rows = (order.TrainOrder(members, weights, batch_size, seed) if train
            else order.EvalOrder(members, batch_size))
    self.num_batches = None if train else len(rows)
    # The parts of a batch ask for the same thing, one after the other.
    self._order = functools.lru_cache(64)(rows)

    ops = {name: kwargs for name, _, kwargs in pp_lib.parse(pp)}
    self._reads_text, self._swaps_text = 'text' in ops, 'itm' in ops
    self._needs_names = ('boxes' in ops
                         and not ops['boxes'].get('drop_unknown'))
    self._apply = pp_lib.build(pp, pp_lib.Context(
        tokenizer=vocabularies.tokenizer, labels=vocabularies.labels,
        train=train,
        **{k: data_config[k] for k in ('sentences', 'max_text', 'max_boxes',
                                       'max_attributes')}))
    # Making the rows of padding also tries the pp string.
    self._blank = [self._row(-1, _NOTHING, bucket)
                   for bucket in range(len(self._buckets))]
    if 'target' not in self._blank[0]:
      raise UserError(f'pp string {pp!r}: no fit or squash, which make the '
                      'image of a batch')
    self._shapes = {k: np.shape(self._blank[0][k]) for k in _DTYPES
                    if k in self._blank[0]}
    same = self._buckets[0] if len(self._buckets) == 1 else (None, None)
    self._shapes |= {'image': (*same, 3), 'image_mask': same}

  def batch(self, t):
    """This host's rows of batch t: dict of numpy arrays, see above.

    Raises:
      UserError: more than data.max_bad_records unreadable records, or a
        name that the label space lacks.
    """
    return self._counted(self._make(int(t), self._rows))

  def example_ids(self, t):
    """example_id of every row of the global batch t: int64 [B]; -1 padding."""
    _, sources, numbers = self._order(int(t))
    return np.where(numbers < 0, -1, self._offsets[sources] + numbers)

  def dataset(self, start=0):
    """Batches start, start + 1, ... as a tf.data.Dataset of dicts.

    In order, read ahead, endless in training; for tf.data's own tools.
    Unlike `iterate` it does not count the unreadable records, and an error
    in a row comes as one of TensorFlow's, with the error's text in it.
    """
    tf = _tensorflow()
    count = len(self._rows)
    parts = -(-count // _CHUNK)  # of a batch

    def make(number):
      t, part = divmod(int(number), parts)
      rows = self._rows[part * _CHUNK:(part + 1) * _CHUNK]
      return list(self._make(t, rows).values())

    def make_op(number):
      rows = count if parts == 1 else None
      values = tf.numpy_function(
          make, [number], [_DTYPES[k] for k in self._shapes], stateful=False)
      return {k: tf.ensure_shape(v, [rows, *self._shapes[k]])
              for k, v in zip(self._shapes, values)}

    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = self._threads
    stop = (np.iinfo(np.int64).max // parts if self._train
            else self.num_batches)
    batches = tf.data.Dataset.range(start * parts, stop * parts).map(
        make_op, num_parallel_calls=self._threads)
    if parts > 1:  # It copies.
      batches = batches.rebatch(count, drop_remainder=True)
    return batches.prefetch(_AHEAD).with_options(options)

  def iterate(self, start=0):
    """Yields (t, batch) for t = start, start + 1, ..., from `dataset`.

    Endless in training. The arrays are read-only. Raises as `batch`.
    """
    failures = _tensorflow().errors.OpError
    batches = self.dataset(start).as_numpy_iterator()
    for t in itertools.count(start):
      try:
        batch = next(batches)
      except StopIteration:
        return
      except failures:
        self.batch(t)  # Fails as well, and says it without TensorFlow.
        raise
      yield t, self._counted(batch)

  def record(self, example_id):
    """The record behind an example_id, as `records.Split.get` returns it."""
    source, number = self._locate(example_id)
    return self._splits[source].get(number)

  def name(self, example_id):
    """'dataset/split record n', for messages."""
    source, number = self._locate(example_id)
    return f'{self._names[source]} record {number}'

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
        record = self._read(offset + number) or _NOTHING
        with self._naming(offset + number):
          for thing in record['objects']:
            self._labels.class_id(thing['label'])
            for attribute in thing['attributes']:
              self._labels.attribute_id(attribute)

  # From here on: how a batch is made.

  def _make(self, t, which):
    """The given rows of batch t."""
    bucket, sources, _ = self._order(t)
    ids = self.example_ids(t)
    read = functools.cache(lambda row: self._read(ids[row]))
    which = which.tolist()
    for row in which:
      read(row)  # In parallel, as it may wait for a disk or a network.
    # One thread plans at a time: Python lets no two of them run, and would
    # only have them take turns.
    with self._planning:
      rows = [self._planned(t, row, ids, sources, bucket, read)
              for row in which]
    image = _aligned((len(rows), *self._buckets[bucket], 3))
    for k, (row, canvas) in enumerate(zip(rows, image)):
      if row['valid'] and not ops_image.render(row, canvas):
        rows[k] = {**self._blank[bucket], 'example_id': row['example_id'],
                   'image_size': row['image_size']}
    batch = {k: np.array([row[k] for row in rows], _DTYPES[k])
             for k in self._shapes if k != 'image'}
    return {'image': image, **batch}

  def _planned(self, t, row, ids, sources, bucket, read):
    """A row of batch t, its image still encoded; blank if unreadable."""
    record = read(row)
    if record is None:
      return {**self._blank[bucket], 'example_id': ids[row]}
    seed = (t, row) if self._train else (int(ids[row]),)
    return self._row(
        ids[row], record, bucket, rng.fold(self._seed, 2, *seed),
        _partner_texts(row, ids, sources, read) if self._swaps_text else (),
        self._has_boxes[sources[row]])

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
      logging.warning('%s: %s', self.name(example_id), e)
      return None

  def _counted(self, batch):
    """The batch, once its unreadable rows are counted and reported."""
    bad = batch['example_id'][~batch['valid']].tolist()
    for example_id in set(bad) - self.bad_records - {-1}:
      self.bad_records.add(example_id)
      name, count = self.name(example_id), len(self.bad_records)
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
      raise UserError(f'data: {self.name(example_id)}: {e}') from None

  def _locate(self, example_id):
    """(source, number of the record in it)."""
    if not 0 <= example_id < self.num_examples:
      raise IndexError(f'example_id {example_id} of {self.num_examples}')
    source = int(np.searchsorted(self._offsets, example_id, 'right')) - 1
    return source, int(example_id - self._offsets[source])


@functools.cache
def _tensorflow():
  """TensorFlow, imported when it is first needed."""
  import tensorflow as tf  # pylint: disable=g-import-not-at-top
  with contextlib.suppress(RuntimeError):  # It is in use already.
    tf.config.set_visible_devices([], 'GPU')  # They belong to JAX.
  atexit.register(_empty_iterators, tf.data.Iterator)
  return tf


def _empty_iterators(kind):
  """Frees what the tf.data iterators hold that are alive at exit.

  Python could not be taken down under one that reads ahead: it waits for
  TensorFlow's threads, and they wait for Python's lock. Who holds them (a
  generator, the traceback of an error) is left with an empty object.
  """
  for thing in gc.get_objects():
    if issubclass(type(thing), kind):
      vars(thing).clear()


def _aligned(shape):
  """Zeros, uint8, that TensorFlow takes over without a copy."""
  size = int(np.prod(shape))
  flat = np.zeros(size + 64, np.uint8)
  start = -flat.ctypes.data % 64
  return flat[start:start + size].reshape(shape)


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


def _weight(weight, split, sentences):
  """The weight of a source as a number."""
  if not isinstance(weight, str):
    return weight
  if weight == 'by_rows':
    return len(split)
  if weight == 'by_texts':
    return int((-(-split.index['num_texts'] // sentences)).sum())
  raise UserError(f'data: weight {weight!r} of {split.name}; expected a number '
                  'or one of by_rows, by_texts')


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
