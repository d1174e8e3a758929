"""Records -> batches of static shapes; batch(t) is a function of (seed, t).

`order` says which record stands in which row of batch t, in closed form.
Each row is then made on its own by the ops of the pp string (`builder`),
whose draws come from the row's seed (seed, t * B + row). Nothing depends on
the number of hosts, threads or restarts: a host makes a contiguous range of
the rows of the global batch.

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
import functools
import logging
import os

import numpy as np
import tensorflow as tf

from e2e_vlp_jax.data import builder, order, records
from e2e_vlp_jax.errors import UserError

# key -> what padding and unreadable records hold; None: the pad token.
_FILL = {
    'image': 0, 'image_mask': False,
    'text': None, 'text_mask': False,
    'masked_text': None, 'masked_text_mask': False,
    'mlm_labels': -1, 'itm_labels': -1,
    'boxes': 0, 'box_labels': 0, 'box_attributes': -1, 'box_mask': False,
    'task_mask/mlm': False, 'task_mask/itm': False,
    'task_mask/captioning': False, 'task_mask/detection': False,
    'task_mask/attributes': False,
    'example_id': -1, 'image_size': 0, 'valid': False,
}
_FETCHED = {
    'image': (tf.string, []), 'size': (tf.int32, [2]),
    'texts': (tf.string, [None]), 'partner_texts': (tf.string, [None]),
    'boxes': (tf.float32, [None, 4]), 'labels': (tf.string, [None]),
    'attributes': (tf.string, [None, None]), 'is_crowd': (tf.bool, [None]),
    'has_boxes': (tf.bool, []), 'has_attributes': (tf.bool, []),
    'bucket': (tf.int32, [2]), 'seed': (tf.int64, [2]),
    'example_id': (tf.int64, []),
}
_LABELS_CHECKED = 256  # records of a source that `check_labels` reads


class Pipeline:
  """Batches of a mixture of prepared datasets.

  Args:
    data_config: `config.data`: dir, buckets, sentences, max_text, max_boxes,
      max_attributes; optional threads (of tf.data, 0 = as many as cores) and
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
    bad_records: unreadable records met so far.

  Raises:
    UserError: bad values, an empty source, or a batch size that
      `host_count` does not divide.
  """

  def __init__(self, data_config, *, tokenizer, labels, sources, pp, seed,
               batch_size, train, host_index=0, host_count=1):
    if batch_size < 1 or batch_size % host_count:
      raise UserError(f'batch_size: {batch_size} does not divide over '
                      f'{host_count} hosts')
    # This process may own an accelerator that belongs to JAX.
    tf.config.set_visible_devices([], 'GPU')
    self._labels, self._pp, self._seed = labels, pp, seed
    self._train, self._batch_size = train, batch_size
    self._rows = batch_size // host_count
    self._first_row = host_index * self._rows
    self._buckets = _checked_buckets(data_config)
    self._threads = (data_config.get('threads', 0)
                     or len(os.sched_getaffinity(0)))
    self._max_bad = data_config.get('max_bad_records', 100)
    self.bad_records = 0

    self._names, self._splits = [], []
    for source in sources:
      split = records.open_split(data_config['dir'], source['name'],
                                 source['split'])
      self._names.append(f'{source["name"]}/{source["split"]}')
      self._splits.append(split)
      if not len(split):  # pylint: disable=g-explicit-length-test
        raise UserError(f'data: {self._names[-1]} has no examples')
    if not sources:
      raise UserError('data: no sources; expected a list of dict(name=..., '
                      'split=..., weight=...)')
    weights = [s.get('weight', 1.) for s in sources]
    if min(weights) < 0 or not sum(weights) > 0:
      raise UserError(f'data: the weights of the sources are {weights}; '
                      'expected numbers >= 0, not all 0')
    self._offsets = np.cumsum([0] + [len(s) for s in self._splits])
    self.num_examples = int(self._offsets[-1])
    self._has_boxes = [bool(np.any(s.index['num_objects']))
                       for s in self._splits]

    members = [_bucket_members(s.index, self._buckets) for s in self._splits]
    self.num_batches = None
    self._order = order.TrainOrder(members, weights, batch_size, seed)
    if not train:
      self._order = order.EvalOrder(members, batch_size)
      self.num_batches = len(self._order)
    # Both are asked for the same things by neighbouring rows, and only then.
    self._order = functools.lru_cache(16)(self._order)
    self._read = functools.lru_cache(256)(self._read)

    context = builder.Context(
        tokenizer=tokenizer, labels=labels, train=train,
        **{k: data_config[k] for k in ('sentences', 'max_text', 'max_boxes',
                                       'max_attributes')})
    self._apply = builder.build(pp, context)
    self._pad_id = tokenizer.pad_id
    # Traced once and here, so that a wrong pp string fails at once.
    self._row = tf.function(self._make_row, autograph=False, input_signature=[
        tf.TensorSpec([], tf.int64)])
    self._row.get_concrete_function()

  def batch(self, t):
    """This host's rows of batch t: dict of numpy arrays, see above."""
    return self._checked(next(iter(
        self._dataset(t, t + 1).as_numpy_iterator())))

  def iterate(self, start=0):
    """Yields (t, batch) for t = start, start + 1, ..., read ahead.

    Endless in training.

    Raises:
      UserError: more than data.max_bad_records unreadable records, or a
        label that the label space lacks.
    """
    stop = np.iinfo(np.int64).max // self._rows
    if self.num_batches is not None:
      stop = self.num_batches
    batches = self._dataset(start, stop).prefetch(2).as_numpy_iterator()
    for t, batch in enumerate(batches, start):
      yield t, self._checked(batch)

  def record(self, example_id):
    """The record behind an example_id, as `records.Split.get` returns it."""
    source, number = self._locate(example_id)
    return self._splits[source].get(number)

  def check_labels(self):
    """Looks for names that the label space lacks, before time is spent.

    Reads the first records of every source. Does nothing where the boxes op
    drops unknown names.

    Raises:
      UserError: naming the record, the name and the nearest known one.
    """
    for name, _, kwargs in builder.parse(self._pp):
      if name == 'boxes' and not kwargs.get('drop_unknown'):
        break
    else:
      return
    for source, split in enumerate(self._splits):
      for number in range(min(_LABELS_CHECKED, len(split))):
        for thing in split.get(number)['objects']:
          names = [('label', thing['label'])]
          names += [('attribute', a) for a in thing['attributes']]
          for kind, name in names:
            self._require(kind, name, int(self._offsets[source]) + number)

  # From here on: how a row is made.

  def _dataset(self, start, stop):
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = self._threads
    rows = tf.data.Dataset.range(start * self._rows, stop * self._rows)
    return (rows.map(self._row, num_parallel_calls=self._threads)
            .batch(self._rows, drop_remainder=True).with_options(options))

  def _make_row(self, position):
    """int64 [], counted over this host's rows -> the row as dict."""
    values = tf.numpy_function(
        self._fetch, [position], [d for d, _ in _FETCHED.values()],
        stateful=False)
    example = {k: tf.ensure_shape(v, shape) for (k, (_, shape)), v in
               zip(_FETCHED.items(), values)}
    image_size = example['size']
    example = self._apply(example)
    if 'image_mask' not in example:
      raise UserError(f'pp string {self._pp!r}: no fit, which makes the '
                      'image of a batch')
    valid = example['ok'] & (example['example_id'] >= 0)
    example |= {'image_size': image_size, 'valid': valid}
    row = {}
    for name, fill in _FILL.items():
      if name in example:
        x = example[name]
        fill = tf.cast(self._pad_id if fill is None else fill, x.dtype)
        row[name] = tf.where(valid, x, fill)
    # The consumer complains of these (`_checked`): a tf.data thread cannot
    # raise a UserError.
    row['_id'] = example['example_id']
    for name in ('unknown_label', 'unknown_attribute'):
      if name in example:
        row['_' + name] = tf.where(valid, example[name], '')
    return row

  def _fetch(self, position):
    """The record of a row as arrays, in the order of `_FETCHED`."""
    t, row = divmod(int(position), self._rows)
    row += self._first_row
    bucket, sources, numbers = self._order(t)
    source, number = int(sources[row]), int(numbers[row])
    example_id = -1 if number < 0 else int(self._offsets[source]) + number
    record = self._read(example_id) or _NOTHING
    objects = record['objects']
    attributes = [o['attributes'] for o in objects]
    width = max(map(len, attributes), default=0)
    seed = t * self._batch_size + row if self._train else example_id
    return (
        np.array(record['image'], object),
        np.array([record['height'], record['width']], np.int32),
        np.array(record['texts'], object),
        np.array(self._partner_texts(record, bucket, sources, numbers, row),
                 object),
        np.array([o['bbox'] for o in objects], np.float32).reshape(-1, 4),
        np.array([o['label'] for o in objects], object),
        np.array([a + [''] * (width - len(a)) for a in attributes],
                 object).reshape(len(objects), width),
        np.array([o['is_crowd'] for o in objects], bool),
        np.bool_(self._has_boxes[source]),
        np.bool_(record['has_attributes']),
        np.array(self._buckets[bucket], np.int32),
        np.array([self._seed & 0x7FFFFFFF, seed], np.int64),
        np.int64(example_id))

  def _partner_texts(self, record, bucket, sources, numbers, row):
    """Texts of the next row that shows another image.

    Of the same source, if there is one: telling texts of one dataset from
    those of another teaches nothing about images.
    """
    del bucket
    if record is _NOTHING:
      return []
    others = (row + 1 + np.arange(len(numbers) - 1)) % len(numbers)
    others = others[numbers[others] >= 0]
    same = sources[others] == sources[row]
    for other in (*others[same], *others[~same]):
      found = self._read(int(self._offsets[sources[other]] + numbers[other]))
      if found and found['texts'] and found['image_id'] != record['image_id']:
        return found['texts']
    return []

  def _read(self, example_id):
    """The record, or None for padding and where it cannot be read."""
    if example_id < 0:
      return None
    try:
      return self.record(example_id)
    except Exception as e:  # pylint: disable=broad-exception-caught
      # Damaged bytes: the readers of ArrayRecord and protobuf have no error
      # class in common. `_checked` counts it.
      logging.warning('%s: %s', self._name(example_id), e)
      return None

  def _locate(self, example_id):
    if not 0 <= example_id < self.num_examples:
      raise IndexError(f'example_id {example_id} of {self.num_examples}')
    source = int(np.searchsorted(self._offsets, example_id, 'right')) - 1
    return source, int(example_id - self._offsets[source])

  def _name(self, example_id):
    source, number = self._locate(example_id)
    return f'{self._names[source]} record {number}'

  def _require(self, kind, name, example_id):
    look_up = (self._labels.class_id if kind == 'label'
               else self._labels.attribute_id)
    try:
      look_up(name)
    except UserError as e:
      raise UserError(f'data: {self._name(example_id)} has the {kind} '
                      f'{name!r}: {e}') from None

  def _checked(self, batch):
    """Takes the rows' complaints out of the batch; raises or counts."""
    ids = batch.pop('_id')
    for kind in ('label', 'attribute'):
      names = batch.pop(f'_unknown_{kind}', ())
      for name, example_id in zip(names, ids):
        if name:
          self._require(kind, name.decode(), int(example_id))
    for example_id in ids[(ids >= 0) & ~batch['valid']]:
      self.bad_records += 1
      name = self._name(int(example_id))
      logging.warning('%s cannot be read; its row is masked (%d so far)',
                      name, self.bad_records)
      if self.bad_records > self._max_bad:
        raise UserError(
            f'data: {self.bad_records} unreadable records, the last {name}; '
            f'data.max_bad_records is {self._max_bad}')
    return batch


_NOTHING = {'image': b'', 'height': 0, 'width': 0, 'texts': [], 'objects': [],
            'has_attributes': False}


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
