"""Reads prepared data: any record of a split by its number.

A prepared split is an ArrayRecord dataset of TFDS and a file
`<split>.index.npz`, from which records can be ordered and grouped without
reading them.
"""
import contextlib
import io
import json
import logging
import os

import numpy as np
from PIL import Image

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space as label_space_lib
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data import units
from e2e_vlp_jax.storage import paths

REPORT = 'prepare_report.json'
LABELS = 'labels.json'    # the dataset's label space
CHANGES = 'changes.json'  # what `prepare` has changed in single records
FEDERATED = 'federated.json'  # classes that images are not labelled for
# Scripts that read records decode their images under this name.
decode_image = photographs.decode_image
# The lists of a record, and an empty item of each.
_NO_BOX = np.zeros(4, np.float32)
_LISTS = {
    'objects': {'bbox': _NO_BOX, 'label': '', 'attributes': (),
                'is_crowd': False, 'area': 0., 'id': -1},
    'phrases': {'bbox': _NO_BOX, 'text': '', 'text_number': -1, 'spans': (),
                'id': -1, 'kind': ''},
    'questions': {'question': '', 'answers': (), 'kind': '', 'id': -1},
    'refexps': {'text': '', 'bbox': _NO_BOX, 'spans': (), 'id': -1},
    'statements': {'second_image': b'', 'second_record': -1, 'statement': '',
                   'label': False, 'has_label': True, 'identifier': '',
                   'group': ''},
    'entailment': {'text': '', 'label': ''}}
# Fields that a builder may leave out of an item. Folders prepared by earlier
# versions lack them as well.
OPTIONAL = {field: {name: _LISTS[field][name] for name in names}
            for field, names in (
                ('phrases', ('text_number', 'spans', 'id', 'kind')),
                ('questions', ('id',)),
                ('refexps', ('spans', 'id')),
                ('statements', ('second_image', 'second_record', 'has_label',
                                'identifier', 'group')))}
_JOINED = ('attributes', 'answers')
_IMAGES = ('image', 'second_image')
_BOOLS = ('is_crowd', 'has_attributes', 'has_label')


class Split:
  """The records of one split.

  Attributes:
    name: the dataset's name.
    split: the split's name.
    index: dict of arrays [n]: int32 height, width, and the lengths of the
      record's lists: num_texts, num_objects, num_questions, ...; str
      photo_ids, see `photos`.
    info: the TFDS DatasetInfo.
  """

  def __init__(self, name, split, index_path, info, source):
    self.name, self.split, self.info = name, split, info
    self._source, self._index_path = source, index_path
    with np.load(index_path) as f:
      self.index = dict(f)

  def __len__(self):
    return len(self._source)

  def get(self, i):
    """Record i: a dict with the fields of `datasets.base.features`.

    The image is left encoded; strings are str; repeated fields are lists of
    dicts; boxes are float32 [4]; attributes and answers are lists of str;
    spans are lists of (first character, character after the last).
    """
    return _parse(self._source[int(i)])

  def counts(self, field):
    """How many items a list has in each record: int32 [n].

    The index of a folder that an earlier version prepared lacks most of the
    columns. They are counted once, by reading all records, and added to it.
    """
    if f'num_{field}' not in self.index:
      self._count_items()
    return self.index[f'num_{field}']

  def _count_items(self):
    logging.warning('%s/%s was prepared by an earlier version: counting the '
                    'items of its %d records, once', self.name, self.split,
                    len(self))
    fields = list(units.BY_FIELD)
    counts = np.zeros((len(self), len(fields)), np.int32)
    for i in range(len(self)):
      try:
        record = self.get(i)
      except Exception as e:  # pylint: disable=broad-exception-caught
        # Damaged bytes: count no items, so that it is in no batch.
        logging.warning('%s/%s record %d: %s', self.name, self.split, i, e)
        continue
      counts[i] = [len(record[f]) for f in fields]
    self.index |= {f'num_{f}': counts[:, k] for k, f in enumerate(fields)}
    with contextlib.suppress(OSError):  # Not writable: count again.
      part = f'{self._index_path}.{os.getpid()}.part'
      with open(part, 'wb') as f:
        np.savez(f, **self.index)
      os.replace(part, self._index_path)


def open_split(data_dir, name, split):
  """Opens a split that `prepare` has written.

  Raises:
    UserError: the dataset or the split is not there.
  """
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top
  folder = prepared_folder(data_dir, name)
  builder = tfds.builder_from_directory(folder)
  if split not in builder.info.splits:
    raise errors.UserError(f'{name} in {data_dir!r} has no split {split!r}'
                           + errors.nearest(split, builder.info.splits))
  source = builder.as_data_source(
      split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
  return Split(name, split, os.path.join(folder, f'{split}.index.npz'),
               builder.info, source)


def side_file(data_dir, name, file):
  """The content of a JSON file that `prepare` has written beside the records.

  Raises:
    UserError: the dataset is not there, or has no such file.
  """
  path = os.path.join(prepared_folder(data_dir, name), file)
  if not os.path.exists(path):
    raise errors.UserError(f'{name} in {data_dir!r} has no {file}; is it the '
                           'dataset that this evaluator is for?')
  with open(path, encoding='utf-8') as f:
    return json.load(f)


def label_space(data_dir, name):
  """The `LabelSpace` that is stored with a dataset; None: it has no objects.

  Folders of earlier versions lack the file: their space is the shipped one of
  the same name, if there is one.

  Raises:
    UserError: the dataset is not there.
  """
  path = os.path.join(prepared_folder(data_dir, name), LABELS)
  if os.path.exists(path):
    return label_space_lib.LabelSpace.load(path)
  return (label_space_lib.LabelSpace.load(name)
          if name in label_space_lib.names() else None)


def nothing():
  """An empty record: no image, and one empty item in each list of units."""
  return {'image': b'', 'image_id': '', 'height': 0, 'width': 0,
          'has_attributes': False, 'scene_json': '', 'texts': [''],
          **{field: [dict(item)] if field in units.BY_FIELD else []
             for field, item in _LISTS.items()}}


def second_image(split, statement):
  """The other picture that a statement is about.

  Args:
    split: the `Split` of the statement's record.
    statement: an item of the record's statements.

  Returns:
    {'image', 'height', 'width'} as in a record, or None if the statement is
    about one image.
  """
  if statement['second_record'] >= 0:
    record = split.get(statement['second_record'])
    return {k: record[k] for k in ('image', 'height', 'width')}
  if not statement['second_image']:
    return None
  with Image.open(io.BytesIO(statement['second_image'])) as image:
    return {'image': statement['second_image'], 'height': image.height,
            'width': image.width}


def prepared_folder(data_dir, name):
  """The folder of a dataset that `prepare` has written.

  Raises:
    UserError: it is not there; suggests the nearest.
  """
  paths.check_local('data.dir', data_dir)
  if is_prepared(data_dir, name):
    return dataset_folder(data_dir, name)
  found = prepared(data_dir)
  there = f' (it holds {", ".join(found)})' if found else ''
  built = discovery.names('e2e_vlp_jax.data.datasets', 'Builder')
  near, command, more = '', name, ''
  if name not in built:
    near = errors.nearest(name, dict.fromkeys([*found, *built]))
    near = near if 'did you mean' in near else ''  # The others are no choice.
    command = f'pairs --name {name} --source DIR'
    more = ' (own instead of pairs, if it has boxes)'
  raise errors.UserError(
      f'no prepared dataset {name!r} in {data_dir!r}{there}{near}; make it '
      f'with: python -m e2e_vlp_jax.prepare {command} --data_dir {data_dir}'
      f'{more}')


def is_prepared(data_dir, name):
  """Whether `prepare` has finished a dataset."""
  return os.path.exists(os.path.join(dataset_folder(data_dir, name), REPORT))


def prepared(data_dir):
  """Names of the datasets that a folder holds, sorted."""
  there = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
  return [name for name in there if is_prepared(data_dir, name)]


def dataset_folder(data_dir, name):
  """The folder of the only version of a prepared dataset."""
  return os.path.join(data_dir, name, '1.0.0')


def _parse(serialized):
  """A tf.train.Example of `datasets.base.features` as a plain dict."""
  # pylint: disable-next=g-import-not-at-top
  from tensorflow_datasets.proto import tf_example_pb2
  feature = tf_example_pb2.Example.FromString(serialized).features.feature
  found = {}
  for key, value in feature.items():
    kind = value.WhichOneof('kind')
    found[key] = getattr(value, kind).value if kind else ()
  record = {k: _plain(k, found[k])[0] for k in (
      'image', 'image_id', 'height', 'width', 'scene_json', 'has_attributes')}
  record['texts'] = _plain('texts', found.get('texts', ()))
  for key, names in _LISTS.items():
    columns = [found.get(f'{key}/{n}', ()) for n in names]
    # A box is four numbers.
    count = max(len(c) // (4 if n == 'bbox' else 1)
                for c, n in zip(columns, names))
    if not count:
      record[key] = []
      continue
    columns = [_plain(f'{key}/{n}', c) if len(c) or n not in
               OPTIONAL.get(key, ()) else [OPTIONAL[key][n]] * count
               for c, n in zip(columns, names)]
    record[key] = [dict(zip(names, row)) for row in zip(*columns, strict=True)]
  return record


def write_spans(spans):
  """[(first, after the last), ...] as it is stored: '0:5|9:12'."""
  return '|'.join(f'{first:d}:{end:d}' for first, end in spans)


def read_spans(text):
  """The opposite of `write_spans`."""
  return [tuple(map(int, span.split(':'))) for span in text.split('|') if span]


def _plain(key, values):
  """The stored values of a feature as the list that a record holds."""
  name = key.rpartition('/')[2]
  if name == 'bbox':
    return np.asarray(values, np.float32).reshape(-1, 4)
  if name in _BOOLS or key == 'statements/label':
    return [bool(v) for v in values]
  if not values or not isinstance(values[0], bytes) or name in _IMAGES:
    return values
  values = [v.decode() for v in values]
  if name == 'spans':
    return [read_spans(v) for v in values]
  if name in _JOINED:
    return [v.split('|') if v else [] for v in values]
  return values
