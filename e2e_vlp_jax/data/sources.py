"""The prepared splits that a pipeline mixes, and their example ids.

An example_id counts the units of all sources: those of the first source in its
order, then those of the next.
"""
import numpy as np

from e2e_vlp_jax.data import photos
from e2e_vlp_jax.data import records
from e2e_vlp_jax.errors import UserError, nearest

_RENAMED = {'images': 'by_rows', 'texts': 'by_texts'}


class Sources:
  """Splits of prepared datasets, cut into units.

  Args:
    data_dir: folder of the prepared datasets.
    sources: list of {name, split, weight}.
    unit: a `units.Unit`.
    exclude: splits ('karpathy/test') whose photographs are left out.

  Attributes:
    num_examples: units of all sources, those left out included.
    left_out: how many images are left out, in words; '' if none is to be.
    has_boxes: for each source, whether any of its records has objects.

  Raises:
    UserError: no source, or one that is not prepared or has no units; or
      `exclude` names no such split, or leaves nothing of a source.
  """

  def __init__(self, data_dir, sources, unit, exclude=()):
    if not sources:
      raise UserError('data: no sources; expected a list of dict(name=..., '
                      'split=..., weight=...)')
    self._unit = unit
    self._names = [f'{s["name"]}/{s["split"]}' for s in sources]
    self._splits = [records.open_split(data_dir, s['name'], s['split'])
                    for s in sources]
    self._wanted = [s.get('weight', 1.) for s in sources]
    self._first_units = [self._number(*pair)
                         for pair in zip(self._names, self._splits)]
    self._offsets = np.cumsum([0] + [int(f[-1]) for f in self._first_units])
    self.num_examples = int(self._offsets[-1])
    self.has_boxes = [bool(np.any(s.index['num_objects']))
                      for s in self._splits]
    self._kept, self.left_out = photos.kept(data_dir, self._splits, exclude)

  def _number(self, name, split):
    """The number of the first unit of each record, and of all units."""
    if not len(split):  # pylint: disable=g-explicit-length-test
      raise UserError(f'data: {name} has no examples')
    if not self._unit.field:
      return np.arange(len(split) + 1)
    counts = split.counts(self._unit.field)
    if not counts.any():
      held = [c.removeprefix('num_') for c, n in split.index.items()
              if c.startswith('num_') and n.any()]
      raise UserError(
          f'data.unit {self._unit.name!r}: {name} has no {self._unit.field}; '
          f'it holds {", ".join(held) or "images alone"}')
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

  def members(self, buckets):
    """members[source][bucket]: the numbers of the units in that bucket.

    An image belongs to the bucket that is nearest in aspect ratio.
    """
    shapes = np.log([h / w for h, w in buckets])
    members = []
    for split, first, kept in zip(self._splits, self._first_units, self._kept):
      ratio = np.log(np.maximum(split.index['height'], 1)
                     / np.maximum(split.index['width'], 1))
      bucket = np.argmin(np.abs(ratio[:, None] - shapes), -1)
      bucket = np.repeat(np.where(kept, bucket, -1), np.diff(first))
      members.append([np.flatnonzero(bucket == b)
                      for b in range(len(buckets))])
    return members

  def weights(self, sentences):
    """The weights of the sources as numbers.

    Args:
      sentences: S, the maximum number of texts of a row.

    Raises:
      UserError: an unknown word, negative numbers, or all 0.
    """
    found = [self._weight(*x, sentences) for x in zip(
        self._wanted, self._names, self._splits, self._first_units,
        self._kept)]
    if min(found) < 0 or not sum(found) > 0:
      raise UserError(f'data: the weights of the sources are {found}; '
                      'expected numbers >= 0, not all 0')
    return found

  def _weight(self, weight, name, split, first, kept, sentences):
    if not isinstance(weight, str):
      return weight
    if weight == 'by_texts' and not self._unit.field:
      return int((-(-split.index['num_texts'] // sentences))[kept].sum())
    if weight in ('by_rows', 'by_texts'):  # A unit of a list has one text.
      return int(np.diff(first)[kept].sum())
    if weight in _RENAMED:
      raise UserError(f'data: weight {weight!r} of {name} is called '
                      f'{_RENAMED[weight]!r} now')
    raise UserError(f'data: weight {weight!r} of {name}; expected a number or '
                    'a word' + nearest(weight, _RENAMED.values()))

  def example_ids(self, sources, numbers):
    """example_id of the units of these sources and numbers; -1 stays."""
    return np.where(numbers < 0, -1, self._offsets[sources] + numbers)

  def locate(self, example_id):
    """(source, number of the record in it, number of the item in that)."""
    if not 0 <= example_id < self.num_examples:
      raise IndexError(f'example_id {example_id} of {self.num_examples}')
    source = int(np.searchsorted(self._offsets, example_id, 'right')) - 1
    first = self._first_units[source]
    number = example_id - self._offsets[source]
    record = int(np.searchsorted(first, number, 'right')) - 1
    return source, record, int(number - first[record])

  def unit(self, example_id):
    """(record, number of the item in the unit's list; 0 for images)."""
    source, record, item = self.locate(example_id)
    return self._splits[source].get(record), item

  def second_image(self, example_id, record, item):
    """See `records.second_image`."""
    source, _, _ = self.locate(example_id)
    return records.second_image(self._splits[source],
                                record['statements'][item])

  def record_name(self, example_id):
    """'dataset/split record n', for messages."""
    source, record, _ = self.locate(example_id)
    return f'{self._names[source]} record {record}'

  def name(self, example_id):
    """`record_name`, and which item of the record."""
    name, item = self.record_name(example_id), self.locate(example_id)[2]
    return f'{name} {self._unit.name} {item}' if self._unit.field else name

  def every_record(self):
    """Yields (example_id of its first unit, record) of all that may be used.

    Those that cannot be read are left out.
    """
    for split, first, kept, offset in zip(
        self._splits, self._first_units, self._kept, self._offsets):
      for number in np.flatnonzero(kept & (np.diff(first) > 0)).tolist():
        try:
          record = split.get(number)
        except Exception:  # pylint: disable=broad-exception-caught
          continue  # Counted and reported when it comes in a batch.
        yield int(offset + first[number]), record

  def first_records(self, count):
    """Yields (name, record) of the first records of every source.

    Those that cannot be read are left out.
    """
    for name, split in zip(self._names, self._splits):
      for number in range(min(count, len(split))):
        try:
          record = split.get(number)
        except Exception:  # pylint: disable=broad-exception-caught
          continue  # Counted and reported when it comes in a batch.
        yield f'{name} record {number}', record
