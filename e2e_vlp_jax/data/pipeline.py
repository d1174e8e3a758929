"""Records -> batches of static shapes; batch(t) is a function of (seed, t).

`order` computes which unit stands in which row of batch t. The ops of the pp
string (`pp`) then make each row on its own, with random numbers from the row's
seed: (seed, t, row), in evaluation (seed, example_id). Nothing depends on the
number of hosts, threads or restarts: each host makes those rows of the global
batch that its devices will hold.

tf.data drives the work: its threads ask for batches, put them in order and read
ahead. A batch of more than _CHUNK rows is made in parts by a pool of threads,
which write them into its memory, so that nothing is copied afterwards. The rows
themselves are made by numpy (the ops plan tokens, boxes and windows), Pillow
and OpenCV (which render the pixels), not by TensorFlow's ops: most of the work
is on small arrays, and on two CPU cores a row of 96x96 takes 0.8 ms that way
and 3 ms with TensorFlow's ops.

The ops declare the keys of a batch; docs/data.md has the table. Masks are True
where VALID. What a record lacks is masked.
"""
import atexit
import concurrent.futures
import contextlib
import functools
import gc
import itertools
import logging
import os
import threading

import numpy as np

from e2e_vlp_jax.data import buffers, keys, order, pp as pp_lib, records, rng
from e2e_vlp_jax.data import sources as sources_lib, units
from e2e_vlp_jax.errors import UserError

_CHUNK = 16  # rows that one thread makes at a time
_AHEAD = 2  # prefetched batches
_LABELS_CHECKED = 256  # records per source that `check_labels` reads


class Pipeline:
  """Batches of a mixture of prepared datasets.

  Args:
    data_config: `config.data`: dir, buckets, sentences, max_text, max_boxes,
      max_attributes; optional unit ('image'; see `units`), threads (0
      = as many as cores), max_bad_records (100; more unreadable records end
      the run) and exclude (splits whose photographs no training batch shows,
      such as 'karpathy/test').
    vocabularies: a `vocabularies.Vocabularies`.
    sources: list of {name, split, weight}; the weight is the source's share of
      a training batch and need not be normalised. 'by_rows' stands for the
      number of its units, 'by_texts' for the number of rows that show each
      text once.
    pp: 'op|op(arg)'; see the module `pp`.
    seed: int.
    batch_size: B of the global batch.
    train: endless and shuffled, or every example once in order, grouped by
      bucket, the last batch of a bucket padded.
    rows: numbers of the rows of the global batch to make, in this order;
      None = all (`training.sharding.host_rows` knows a host's).

  Attributes:
    num_examples: units in all sources.
    num_batches: batches of an evaluation; None in training.
    left_out: what `exclude` leaves out, in words; '' without it.
    unit_name: what a row shows, `config.data.unit`.
    labels: the `label_space.LabelSpace` of its objects.
    bad_records: names of the unreadable records met so far.

  Raises:
    UserError: bad values, or a source that is empty or lacks the unit.
  """

  def __init__(self, data_config, *, vocabularies, sources, pp, seed,
               batch_size, train, rows=None):
    if batch_size < 1:
      raise UserError(f'batch_size: {batch_size}; expected at least 1')
    self._seed, self._train = seed, train
    self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    self._buckets = _checked_buckets(data_config)
    self._threads = data_config.get('threads', 0) or os.cpu_count()
    self._max_bad = data_config.get('max_bad_records', 100)
    self.bad_records = set()
    self._planning = threading.Lock()
    self._parts = [slice(k, k + _CHUNK)
                   for k in range(0, len(self._rows), _CHUNK)]
    self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)

    self._unit = units.find(data_config.get('unit', 'image'))
    self.unit_name = self._unit.name
    self.labels = vocabularies.labels
    self._sources = sources_lib.Sources(
        data_config['dir'], sources, self._unit,
        data_config.get('exclude', ()) if train else ())
    self.num_examples = self._sources.num_examples
    self.left_out = self._sources.left_out
    members = self._sources.members(self._buckets)
    weights = self._sources.weights(data_config['sentences'])
    batches = (order.TrainOrder(members, weights, batch_size, seed) if train
               else order.EvalOrder(members, batch_size))
    self.num_batches = None if train else len(batches)
    # Cached, because all parts of a batch need it.
    self._order = functools.lru_cache(64)(batches)

    self._set_ops(pp, data_config, vocabularies)
    self._set_keys(pp, data_config, vocabularies)
    self._try_ops(pp)

  def batch(self, t):
    """This host's rows of batch t, a dict of numpy arrays.

    Raises:
      UserError: more than data.max_bad_records unreadable records, or a
        name that the label space lacks.
    """
    return self._counted(self._make(int(t)))

  def example_ids(self, t):
    """example_id of every row of the global batch t: int64 [B]; -1 padding."""
    _, sources, numbers = self._order(int(t))
    return self._sources.example_ids(sources, numbers)

  def dataset(self, start=0):
    """Batches start, start + 1, ... as a tf.data.Dataset of dicts.

    In order, prefetched, endless in training; for tf.data's own tools. Unlike
    `iterate` it does not count the unreadable records, and an error in a row
    is raised as a TensorFlow error that quotes it.
    """
    tf = _tensorflow()
    calls = self._threads  # batches at a time
    if len(self._parts) > 1:
      # As many as give every thread a part, and one more, so that no thread
      # waits for the last parts of the others.
      calls = -(-calls // len(self._parts)) + 1

    def make(t):
      values = tf.numpy_function(
          lambda t: list(self._make(int(t)).values()), [t],
          [key.dtype for key in self._keys.values()], stateful=False)
      return {k: tf.ensure_shape(v, [len(self._rows), *self._shapes[k]])
              for k, v in zip(self._keys, values)}

    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = calls
    stop = np.iinfo(np.int64).max if self._train else self.num_batches
    return tf.data.Dataset.range(start, stop).map(
        make, num_parallel_calls=calls).prefetch(_AHEAD).with_options(options)

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
        self.batch(t)  # Raises the same error, without TensorFlow's wrapping.
        raise
      yield t, self._counted(batch)

  def record(self, example_id):
    """The record behind an example_id, as `records.Split.get` returns it."""
    return self.unit(example_id)[0]

  def unit(self, example_id):
    """(record, k): the example is the k-th item of the unit's list.

    k is 0 for images.
    """
    return self._sources.unit(example_id)

  def images(self, example_id):
    """The encoded images that the row shows: one, or with its second two."""
    record, item = self.unit(example_id)
    second = (self._sources.second_image(example_id, record, item)
              if self._two_images else None)
    return [record['image']] + ([second['image']] if second else [])

  def every_record(self):
    """Yields (example_id of its first unit, record) of all that can be read,
    except those that `exclude` leaves out."""
    return self._sources.every_record()

  def name(self, example_id):
    """'dataset/split record n', for messages; with a unit, also its item."""
    return self._sources.name(example_id)

  def check_labels(self):
    """Checks early for names that the label space lacks.

    Reads the first records of every source. Does nothing where no boxes are
    made, or where the boxes op drops unknown names.

    Raises:
      UserError: naming the record, the name and the nearest known one.
    """
    if not self._needs_names:
      return
    for name, record in self._sources.first_records(_LABELS_CHECKED):
      with _naming(lambda: name):  # pylint: disable=cell-var-from-loop
        for item in record['objects']:
          self._labels.class_id(item['label'])
          for attribute in item['attributes']:
            self._labels.attribute_id(attribute)

  # --- Making a batch ---

  def _set_ops(self, pp, data_config, vocabularies):
    """Sets the function of the pp string and what the pipeline needs of it."""
    self._labels = vocabularies.labels
    ops = dict(pp_lib.bind(pp))
    # Without text, what texts say of left and right does not matter.
    self._reads_text = any(key.name == 'text' for op in ops
                           for key in pp_lib.OPS[op].keys)
    self._swaps_text = 'itm' in ops
    self._shows_item = self._reads_text and bool(self._unit.field) and (
        ops.get('text', {}).get('field', '') is not None)
    self._two_images = 'second_image' in ops
    self._needs_names = 'boxes' in ops and not ops['boxes']['drop_unknown']
    self._apply = pp_lib.build(pp, pp_lib.Context(
        tokenizer=vocabularies.tokenizer, labels=vocabularies.labels,
        answers=vocabularies.answers, train=self._train, unit=self._unit.name,
        **{k: data_config[k] for k in ('sentences', 'max_text', 'max_boxes',
                                       'max_attributes')}))

  def _set_keys(self, pp, data_config, vocabularies):
    """Sets the keys of a batch, their shapes, and a padding row per bucket."""
    sizes = keys.data_sizes(data_config) | {'A': len(vocabularies.answers)}
    self._row_shapes = shapes = []  # of each bucket
    for height, width in self._buckets:
      found = pp_lib.declared(pp, {**sizes, 'H': height, 'W': width})
      self._keys = {key.name: key for key, _ in found}
      shapes.append({key.name: key.row_shape(s) for key, s in found})
    self._shapes = {
        name: tuple(size if all(s[name][axis] == size for s in shapes)
                    else None for axis, size in enumerate(shape))
        for name, shape in shapes[0].items()}
    self._buffers = {name: buffers.Buffers() for name in self._keys}
    self._rendered = {n for n, key in self._keys.items() if key.render}
    pads = {keys.PAD_ID: vocabularies.tokenizer.pad_id}
    self._blank = [{name: np.full(s[name], pads.get(key.padding, key.padding),
                                  key.dtype)
                    for name, key in self._keys.items()
                    if name not in self._rendered} for s in shapes]

  def _try_ops(self, pp):
    """Runs the ops on an empty record, to check their order and shapes."""
    row = self._row(-1, {**records.nothing(), 'item': 0, 'second': None}, 0)
    for name, value in self._blank[0].items():
      if np.shape(row[name]) != value.shape:
        raise UserError(f'pp string {pp!r}: the key {name!r} is declared as '
                        f'{self._keys[name]}, its op made {np.shape(row[name])}'
                        f'; expected {value.shape}')

  def _make(self, t):
    """This host's rows of batch t; its parts are made in parallel."""
    bucket = self._order(t)[0]
    batch = {name: self._buffers[name].zeros((len(self._rows), *shape),
                                             self._keys[name].dtype)
             for name, shape in self._row_shapes[bucket].items()}
    fill = lambda part: self._fill(
        {name: values[part] for name, values in batch.items()}, t,
        self._rows[part].tolist())
    if len(self._parts) == 1:
      fill(*self._parts)
    else:
      list(self._pool.map(fill, self._parts))
    return batch

  def _fill(self, batch, t, which):
    """Writes the given rows of batch t into `batch`, which holds zeros."""
    bucket, sources, _ = self._order(t)
    ids = self.example_ids(t)
    read = functools.cache(lambda row: self._read(ids[row]))
    for row in which:
      read(row)  # In parallel, as it may wait for a disk or a network.
    # Planning is pure Python and bound by the GIL; running it in parallel would
    # only cost context switches.
    with self._planning:
      rows = [self._planned(t, row, ids, sources, bucket, read)
              for row in which]
    for k, row in enumerate(rows):
      canvases = {name: batch[name][k] for name in self._rendered}
      if row['valid'] and not all(self._keys[name].render(row, canvas)
                                  for name, canvas in canvases.items()):
        # Its image is unreadable.
        rows[k] = {**self._blank[bucket], 'example_id': row['example_id'],
                   'image_size': row['image_size']}
        for canvas in canvases.values():
          canvas[:] = 0
    for name in self._blank[bucket]:
      for k, row in enumerate(rows):
        batch[name][k] = row[name]

  def _planned(self, t, row, ids, sources, bucket, read):
    """A row of batch t, its image still encoded; blank if unreadable."""
    record = read(row)
    if record is None:
      return {**self._blank[bucket], 'example_id': ids[row]}
    seed = (t, row) if self._train else (int(ids[row]),)
    partner = (self._partner(row, ids, sources, read) if self._swaps_text
               else None)
    return self._row(ids[row], record, bucket, rng.fold(self._seed, 2, *seed),
                     self._texts(partner) if partner else (),
                     self._sources.has_boxes[sources[row]])

  def _row(self, example_id, record, bucket, seed=0, partner_texts=(),
           has_boxes=False):
    """One row of a batch, its image still encoded."""
    with _naming(lambda: example_id >= 0 and self.name(example_id)):
      row = self._apply({
          **record, 'texts': self._texts(record),
          'partner_texts': partner_texts, 'has_boxes': has_boxes,
          'bucket': self._buckets[bucket], 'seed': seed})
    return {**row, 'example_id': example_id, 'valid': example_id >= 0,
            'image_size': (record['height'], record['width'])}

  def _texts(self, record):
    """The texts that a row of this record may show."""
    if not self._reads_text:
      return []
    if self._shows_item:
      return [self._unit.text_of(record, record['item'])]
    return record['texts']

  def _partner(self, row, ids, sources, read):
    """The next row's record in the global batch that shows another image.

    Of the same source if possible, because telling the texts of one dataset
    from those of another teaches nothing about images.
    """
    others = (row + 1 + np.arange(len(ids) - 1)) % len(ids)
    others = others[ids[others] >= 0]
    same = sources[others] == sources[row]
    for other in (*others[same], *others[~same]):
      found = read(int(other))
      if found and self._texts(found) and (found['image_id']
                                           != read(row)['image_id']):
        return found
    return None

  def _read(self, example_id):
    """The record with its item's number; None for padding or if unreadable.

    The item's number is under 'item', a second image under 'second'.
    """
    if example_id < 0:
      return None
    try:
      record, item = self.unit(example_id)
      if self._two_images:
        record['second'] = self._sources.second_image(example_id, record, item)
      return {**record, 'item': item}
    except Exception as e:  # pylint: disable=broad-exception-caught
      # Damaged bytes. The readers of ArrayRecord and protobuf share no error
      # class. `_counted` counts the record.
      logging.warning('%s: %s', self.name(example_id), e)
      return None

  def _counted(self, batch):
    """The batch, once its unreadable records are counted and reported."""
    bad = batch['example_id'][~batch['valid']]
    names = {self._sources.record_name(i) for i in bad[bad >= 0]}
    for name in sorted(names - self.bad_records):
      self.bad_records.add(name)
      count = len(self.bad_records)
      logging.warning('%s cannot be read; its row is masked (%d so far)',
                      name, count)
      if count > self._max_bad:
        raise UserError(f'data: {count} unreadable records, the last {name}; '
                        f'data.max_bad_records is {self._max_bad}')
    return batch


@contextlib.contextmanager
def _naming(name):
  """Adds the record's name, which `name` returns if there is one."""
  try:
    yield
  except UserError as e:
    if not (found := name()):
      raise
    raise UserError(f'data: {found}: {e}') from None


@functools.cache
def _tensorflow():
  """TensorFlow, imported when first needed."""
  import tensorflow as tf  # pylint: disable=g-import-not-at-top
  with contextlib.suppress(RuntimeError):  # TensorFlow is in use already.
    tf.config.set_visible_devices([], 'GPU')  # GPUs belong to JAX.
  atexit.register(_empty_iterators, tf.data.Iterator)
  return tf


def _empty_iterators(kind):
  """Empties tf.data iterators that are still alive at exit.

  A prefetching iterator alive at exit deadlocks: Python joins TensorFlow's
  threads while they wait for the GIL. Emptying it breaks the cycle; other
  references to it (a generator, a traceback) keep an empty object.
  """
  for found in gc.get_objects():
    if issubclass(type(found), kind):
      vars(found).clear()


def _checked_buckets(data_config):
  """[(H, W)] of the config; UserError unless all are usable."""
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
