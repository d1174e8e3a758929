"""The record that every dataset yields, and the TFDS builder they share.

A new dataset is one file in this folder with a class `Builder(RecordBuilder)`
that says where its records come from; `prepare NAME` finds it by its name.
"""
import collections
import hashlib
import json
import re

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import boxes
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import photos
from e2e_vlp_jax.data import records
from e2e_vlp_jax.data import units
from e2e_vlp_jax.data.datasets import values

_BYTES = lambda: tfds.features.Scalar(np.object_)
_BOX = lambda: tfds.features.Tensor(shape=(4,), dtype=np.float32)
_TEXT = tfds.features.Text
_CLIPPED = 'clipped to the image'
_NAMED = 1000  # names that a report lists per reason; it counts all
# An option of the datasets whose files have boxes and photographs.
UPRIGHT = {'upright': (
    False, 'boxes were drawn on upright pictures: turn none by EXIF')}


def features():
  """The features of a record. Boxes are (ymin, xmin, ymax, xmax) in [0, 1].

  Lists inside lists (an object's attributes, a question's answers, the spans of
  a phrase) are stored as one string, joined by '|'; `data.records` reads them
  as lists.
  """
  sequence = tfds.features.Sequence
  return tfds.features.FeaturesDict({
      'image': _BYTES(),                # JPEG or PNG: upright, RGB, 8 bit
      'image_id': _TEXT(),
      'height': np.int32,
      'width': np.int32,
      'texts': sequence(_TEXT()),       # true sentences about the image
      'objects': sequence({
          'bbox': _BOX(),
          'label': _TEXT(),             # a class name; ids come from a
          'attributes': _TEXT(),        # label space when it is read
          'is_crowd': np.bool_,
          'area': np.float32,           # pixels
          'id': np.int64}),
      # A phrase with several boxes is several items.
      'phrases': sequence({
          'bbox': _BOX(), 'text': _TEXT(),
          'text_number': np.int64,      # of `texts` in which it stands, or -1
          'spans': _TEXT(),             # its characters there
          'id': np.int64,               # of the entity, or -1
          'kind': _TEXT()}),            # such as people, clothing, scene
      'questions': sequence({
          'question': _TEXT(), 'answers': _TEXT(), 'kind': _TEXT(),
          'id': np.int64}),             # the dataset's own id, or -1
      'refexps': sequence({
          'text': _TEXT(), 'bbox': _BOX(),
          'spans': _TEXT(),             # the words that name the object
          'id': np.int64}),             # the dataset's own id, or -1
      # About this image (the left one) and another, which is either
      # `second_record`, the number of its record in this split, or the picture
      # `second_image`. With neither (-1 and empty), about this image only.
      'statements': sequence({
          'second_image': _BYTES(), 'second_record': np.int64,
          'statement': _TEXT(),
          'label': np.bool_,            # whether it is true,
          'has_label': np.bool_,        # unless that is not known
          'identifier': _TEXT(),        # the dataset's own, or ''
          'group': _TEXT()}),           # equal where one sentence is said of
                                        # several images, for consistency
      'entailment': sequence({'text': _TEXT(), 'label': _TEXT()}),
      'scene_json': _TEXT(),            # the scene graph of a drawn image
      # Whether the objects of this dataset have attribute labels at all. If
      # so, an object without attributes really has none.
      'has_attributes': np.bool_,
  })


def record(**fields):
  """A full record; fields that are not given are empty.

  Items may leave out the fields of `records.OPTIONAL`. `photo_ids`, names of
  the photograph in other collections ('coco:139'), go into the split's index
  only.
  """
  full = dict(texts=[], objects=[], phrases=[], questions=[], refexps=[],
              statements=[], entailment=[], scene_json='',
              has_attributes=False)
  full.update(fields)
  return full


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes records in their order and collects what a report needs.

  A subclass is called Builder and has `name`, `OPTIONS` and `sources`. If
  `name` is one of its options, its value names the dataset that is written.

  Attributes:
    options: the values of `OPTIONS`.
    indexes: {split: {column: array [n]}} of the records, in their order.
    reports: {split: {...}}: counts, what was skipped and why, a digest. Where
      phrases and expressions have boxes of their own, `phrases` and
      `expressions` count them.
    allow_losses: write a split even if more than half of its images are lost.
    changes: {split: {number of a record: [{what, name, box}]}}: what was
      changed in a record, for the first such records; `box` as the annotations
      had it, x0, y0, x1, y1 in [0, 1] or beyond, or None.
  """
  VERSION = tfds.core.Version('1.0.0')
  # Command-line options of the dataset: {name: (default, help)}.
  OPTIONS = {}
  # The shipped label space that has the names of the dataset's objects.
  LABELS = ''
  # The collection whose official ids the records' image_id are, such as
  # 'coco'; by it `data.exclude` knows a photograph again. '': no such ids.
  PHOTOS = ''
  # True where `prepare` needs --source, a folder of official files.
  NEEDS_SOURCE = False
  # TFDS would look here for checksums of downloads; we download nothing.
  code_path = None

  def __init__(self, *, data_dir, source=None, allow_losses=False, **options):
    unknown = [k for k in options if k not in self.OPTIONS]
    if unknown:
      raise errors.UserError(f'{self.name} has no option {unknown[0]!r}'
                             + errors.nearest(unknown[0], self.OPTIONS))
    if self.NEEDS_SOURCE and not source:
      raise errors.UserError(f'{self.name} needs --source, the folder of its '
                             'official files')
    negative = [k for k, v in options.items()
                if not isinstance(v, str) and v < 0]
    if negative:
      raise errors.UserError(f'{self.name}: {negative[0]} is '
                             f'{options[negative[0]]}; expected 0 or more')
    self.source, self.allow_losses = source, allow_losses
    self.options = {k: options.get(k, v) for k, (v, _) in self.OPTIONS.items()}
    self.name = self.options.get('name', self.name)
    self.indexes, self.reports = {}, collections.defaultdict(_empty_report)
    self.changes, self._events = {}, []
    # {split: {reason for which images are lost: how many}}
    self._lost_images = collections.defaultdict(collections.Counter)
    super().__init__(data_dir=data_dir, file_format='array_record')

  def sources(self):
    """{split: (upper bound of its records, function that yields them)}."""
    raise NotImplementedError

  def label_space(self):
    """The `LabelSpace` that is stored with the dataset; None: no objects."""
    return label_space.LabelSpace.load(self.LABELS) if self.LABELS else None

  def side_files(self):
    """{name: JSON-able content} of files to write beside the records."""
    return {}

  def annotation_files(self):
    """Paths whose checksums go into the report."""
    return []

  def named_splits(self, known, where=''):
    """The splits that the option `splits` names, each once; [] without.

    Args:
      known: names of the splits that there are.
      where: beginning of the error message, such as 'FILE has '.

    Raises:
      UserError: another name; suggests the nearest.
    """
    named = [s for s in self.options['splits'].replace(' ', '').split(',')
             if s]
    for split in named:
      if split not in known:
        raise errors.UserError(f'splits: {where}no split {split!r}'
                               + errors.nearest(split, known))
    return list(dict.fromkeys(named))

  def skip(self, split, reason, name=None, lost=None):
    """Counts something that is left out, and lists its `name` if given.

    Args:
      split: name of the split.
      reason: why, in words that are the same for all names.
      name: what it is called in the files.
      lost: 'images' or 'boxes' if a record or an object is missing because of
        it, which nobody asked for.
    """
    report = self.reports[split]
    found = report['skipped'].setdefault(reason, {'count': 0, 'names': []})
    found['count'] += 1
    if lost:
      report['lost'][lost] += 1
      if lost == 'images':
        self._lost_images[split][reason] += 1
    if name is not None and len(found['names']) < _NAMED:
      # A name may hold half a character, which nothing can print or write.
      found['names'].append(str(name).encode('utf-8', 'backslashreplace')
                            .decode())

  def note(self, split, what):
    """Counts something that is kept, but changed."""
    changed = self.reports[split]['changed']
    changed[what] = changed.get(what, 0) + 1

  def skip_image(self, split, error, name, where=None):
    """Counts an image that cannot be read.

    Args:
      split: name of the split.
      error: the UserError that came instead of the image.
      name: its file, as the error calls it.
      where: its name in the report; `name` by default.
    """
    self.skip(split, f'image: {reason(error, name)}', where or name, 'images')

  def note_image(self, split, stored):
    """Counts what was changed in an image that is kept."""
    if stored.renamed:
      self.note(split, 'image found under a similar name')
      self._event(stored, 'image found under a similar name')
    if stored.changed:
      self.note(split, f'image encoded again: {stored.changed}')
      self._event(stored, f'image encoded again: {stored.changed}')

  def _event(self, stored, what, name='', box=None):
    """Keeps a change of an image or of its boxes for `changes`."""
    self._events.append((stored, dict(
        what=what, name=str(name).encode('utf-8', 'backslashreplace').decode(),
        box=[round(float(v), 5) for v in box] if box and np.isfinite(
            box).all() else None)))

  def box(self, split, what, name, xywh, stored, height, width):
    """A box of the annotations, checked and clipped to the image.

    A box without area in the image is left out and counted.

    Args:
      split: name of the split.
      what: kind of annotation, such as 'box', for the report.
      name: name of the annotation, for the report.
      xywh: left, top, width and height in pixels; may be anything.
      stored: the `image_files.Stored` image.
      height, width: the image's size according to the annotations.

    Returns:
      (x0, y0, x1, y1) in [0, 1] of the upright picture, or None.
    """
    lost = 'boxes' if what == 'box' else None
    def skip(why, box=None):
      self.skip(split, f'{what}: {why}', name, lost)
      self._event(stored, f'{what} left out: {why}', name, box)
    try:
      x, y, w, h = values.box(xywh, what)
    except values.Wrong:
      return skip('not four finite numbers')
    corners = x, y, x + w, y + h
    given = x / width, y / height, (x + w) / width, (y + h) / height
    if w <= 0 or h <= 0:
      return skip('no area', given)
    frame = stored.frame(height, width, self.options.get('upright', False))
    if frame is None:
      return skip(f'annotated on {width}x{height}, the image is '
                  f'{stored.width}x{stored.height}', given)
    inside = frame.clip(*corners)
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
      return skip('outside the image', frame.place(*corners))
    box = frame.place(*inside)
    if not (stored_box(box)[2:] > stored_box(box)[:2]).all():
      return skip('no area', given)  # As it is stored.
    # Some of COCO's boxes stick out by a hundredth of a pixel.
    if max(abs(p - q) for p, q in zip(inside, corners)) > .1:
      self.note(split, f'{what} {_CLIPPED}')
      self._event(stored, f'{what} clipped', name, frame.place(*corners))
    if frame.turns:
      self._event(stored, f'{what} turned with its picture (EXIF)', name)
    for key, count in (('turned', frame.turns),
                       ('drawn_upright', frame.drawn_upright)):
      self.reports[split][key] += count
    return box

  def area(self, split, given, xywh, box, stored, height, width):
    """The area of an object, in pixels of the upright picture.

    What is no positive number, or more than the image has, is replaced by the
    area of the box and counted. COCO's evaluation groups objects by it.

    Args:
      split: name of the split.
      given: of the annotations, in the pixels of `xywh`; None where absent.
      xywh: the box, as `box` has accepted it.
      box: what `box` has returned.
      stored, height, width: see `box`.
    """
    scale = stored.height * stored.width / (height * width)
    try:
      area = None if given is None else values.positive(given, 'area')
      if area is not None and area <= height * width:
        return area * scale
    except values.Wrong:
      pass
    if given is not None:
      self.note(split, "area replaced by the box's")
    w, h = values.box(xywh, 'box')[2:]
    seen = ((box[2] - box[0]) * (box[3] - box[1])
            * stored.height * stored.width)
    whole = w * h * scale
    # Not that of the parts outside the image.
    return whole if whole < 1.01 * seen else seen

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=features(),
                                 disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    found = self.sources()
    if not found:
      raise errors.UserError(f'{self.name}: no split to write')
    return {split: self._generate_examples(split, most, read_records)
            for split, (most, read_records) in found.items()}

  def _generate_examples(self, split, most, read_records):
    totals, labels = collections.Counter(), collections.Counter()
    index = collections.defaultdict(list)
    referred = -1  # the highest number of a second image's record
    digest = hashlib.sha256()
    progress = tqdm.tqdm(total=most, desc=f'{self.name} {split}', unit='image')
    for k, example in enumerate(read_records()):
      progress.update(k + 1 - progress.n)
      photo_ids = example.pop('photo_ids', ())
      if self.PHOTOS:
        photo_ids = f'{self.PHOTOS}:{example["image_id"]}', *photo_ids
      index[photos.COLUMN].append(' '.join(photo_ids))
      totals += collections.Counter(
          images=1, texts=len(example['texts']),
          boxes=len(example['objects']),
          crowds=sum(o['is_crowd'] for o in example['objects']))
      labels.update(o['label'] for o in example['objects']
                    if not o['is_crowd'])
      for size in ('height', 'width'):
        index[size].append(example[size])
      for field in ('objects', *units.BY_FIELD):
        index[f'num_{field}'].append(len(example[field]))
      referred = max([referred, *(s.get('second_record', -1)
                                  for s in example['statements'])])
      digest.update(canonical(example))
      self._keep_events(split, k, example['image'])
      # TFDS sorts examples by their 128-bit keys, one bucket of keys at a
      # time: keys spread over the whole range keep the buckets small.
      yield (k << 128) // most, _flat(example)
    progress.close()
    if referred >= totals['images']:
      raise ValueError(f'{self.name} {split}: a statement names record '
                       f'{referred} of {totals["images"]}')
    self.reports[split].update(
        {k: totals[k] for k in ('images', 'texts', 'boxes', 'crowds')},
        classes=self._by_class(labels), records_sha256=digest.hexdigest())
    self._check_losses(split, most)
    self.indexes[split] = {
        k: np.asarray(v, str if k == photos.COLUMN else np.int32)
        for k, v in index.items()}

  def _by_class(self, labels):
    """Boxes of each name of the label space, which may have many others."""
    space = self.label_space()
    known = (*space.classes, *space.class_aliases) if space else ()
    return {name: labels[name] for name in known if labels[name]}

  def _keep_events(self, split, number, image):
    """Adds what was changed in the record with these bytes to `changes`."""
    kept = self.changes.setdefault(split, {})
    found = [event for stored, event in self._events if stored.data is image]
    if found and len(kept) < _NAMED:
      kept[number] = found
    self._events.clear()

  def _check_losses(self, split, most):
    """Says more than a line among others if a split has lost most of it.

    Raises:
      UserError: no image is left, or none of its boxes, or less than half of
        the images and `allow_losses` is not set.
    """
    report = self.reports[split]
    images, lost = report['images'], report['lost']
    why = ''.join(f'; {v["count"]} {reason}, e.g. {v["names"][:1]}'
                  for reason, v in report['skipped'].items())
    if not images:
      raise errors.UserError(
          f'{self.name} {split}: none of {most} images can be used{why}')
    kept = sum(report.get(k, 0) for k in ('boxes', 'phrases', 'expressions'))
    if lost['boxes'] and not kept:
      raise errors.UserError(f'{self.name} {split}: none of {lost["boxes"]} '
                             f'boxes can be used{why}')
    if lost['images'] > images:
      self._lost_most(split, images)
    clipped = report['changed'].get(f'box {_CLIPPED}', 0)
    if 2 * clipped > kept:
      report['warnings'].append(
          f'{clipped} of {kept} boxes stuck out of their images; '
          'are they x, y, width, height in pixels? Look with --show 12')
    if report['boxes'] and report['boxes'] == report['crowds']:
      report['warnings'].append(
          f'all {report["boxes"]} boxes are crowds (iscrowd), which training '
          'leaves out and evaluation ignores')

  def _lost_most(self, split, images):
    """UserError, or a warning, about a split with less than half its images."""
    report = self.reports[split]
    (reason_, count), = self._lost_images[split].most_common(1)
    what = (f'only {images} of {images + report["lost"]["images"]} images can '
            f'be used; the most frequent reason, {count} times: {reason_}, '
            f'e.g. {report["skipped"][reason_]["names"][:1]}')
    if not self.allow_losses:
      raise errors.UserError(
          f'{self.name} {split}: {what}; nothing is written; with '
          '--allow_losses the others are')
    report['warnings'].append(what)


def _empty_report():
  return dict(images=0, texts=0, boxes=0, crowds=0, turned=0, drawn_upright=0,
              skipped={}, changed={}, lost=dict(images=0, boxes=0), warnings=[])


def canonical(example):
  """Bytes that are equal for equal records."""
  def plain(x):
    if isinstance(x, bytes):
      return hashlib.sha256(x).hexdigest()
    if isinstance(x, (np.ndarray, np.generic)):
      return x.tolist()
    raise TypeError(type(x))
  return json.dumps(example, sort_keys=True, default=plain).encode()


def stored_box(box, height=1, width=1):
  """(x0, y0, x1, y1) -> the stored form, float32 [4].

  Args:
    box: in pixels of an image of this height and width, or in [0, 1].
    height, width: pixels.
  """
  x0, y0, x1, y1 = box
  return np.float32(boxes.swap_axes([x0 / width, y0 / height, x1 / width,
                                     y1 / height]))


def held_out(k, total, count):
  """Whether item k of `total` is one of `count` evenly spread items."""
  return (k + 1) * count // total > k * count // total


def clean(text):
  """The text on one line, without space at its ends."""
  return re.sub(r'\s+', ' ', text).strip()


def reason(error, name):
  """An error's text without the file's name, to count equal reasons as one."""
  return re.sub(rf'(?<!\w){re.escape(name)}(?!\w)', 'it',
                str(error).replace(repr(name), 'it'))


def _flat(example):
  """The stored form: complete items, and inner lists joined to a string."""
  def join(items, key):
    for item in items:
      if any('|' in s for s in item[key]):
        raise ValueError(f"'|' in {key} {item[key]}")
    return [{**item, key: '|'.join(item[key])} for item in items]
  example = {**example, **{
      field: [{**defaults, **item} for item in example[field]]
      for field, defaults in records.OPTIONAL.items()}}
  for field in ('phrases', 'refexps'):
    example[field] = [{**item, 'spans': records.write_spans(item['spans'])}
                      for item in example[field]]
  return {**example, 'objects': join(example['objects'], 'attributes'),
          'questions': join(example['questions'], 'answers')}
