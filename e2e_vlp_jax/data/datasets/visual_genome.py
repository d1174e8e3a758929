"""`visual_genome`: photographs with objects, attributes and region phrases.

Official layout (visualgenome.org, 1.2 or 1.4) under --source; unzip all files
except the images:
  objects.json
  region_descriptions.json, or region_graphs.json, which has the same phrases
  attributes.json   without it, objects have no attributes
  image_data.json   without it, boxes refer to the pixels as stored
  VG_100K/, VG_100K_2/, or .zip, or images.zip and images2.zip

A record's `texts` are the distinct phrases of its regions, as in the released
FIBER. Its `phrases` are all phrases with their boxes.

An object's class is its first name, cleaned as in bottom-up attention
(data/genome/setup_vg.py there): lower case, without a final full stop.
Adjectives in front of a name, such as colours, become attributes. Attributes
are split at 'and'. Names are mapped to those of the label space; names that it
lacks are left out, and the report counts and lists them.

All images are training images, as in SOHO and FIBER, unless --splits names the
folder of bottom-up attention's train.txt, val.txt and test.txt (data/genome
there), or --num_validation holds out some (our choice: spread evenly over the
ids). Some 51,000 of the images are also in COCO; image_data.json says which.
`config.data.exclude` leaves those on which a model will be evaluated out of
training; --exclude_coco does not even store them, such as the images of
instances_val2017.json. The splits of bottom-up attention already agree with
COCO's Karpathy splits.

Memory: the offsets of the items in the JSON files and one image's items, some
100 MB (our estimate). Each file is read twice.
"""
import collections
import functools
import os
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import json_list
from e2e_vlp_jax.data.datasets import values

_SPLITS = {'train': 'train', 'validation': 'val', 'test': 'test'}
_REGIONS = ('region_descriptions.json', 'region_graphs.json')
_FOLDERS = ['VG_100K', 'VG_100K_2', 'images', 'images2', 'images/VG_100K',
            'images/VG_100K_2']
_LISTED = 200  # unknown names in the report, the most frequent first
# Attributes when they stand before a name, as in bottom-up attention.
_ADJECTIVES = frozenset(
    'black blue brown dark gray green grey large long metal orange pink red '
    'silver small tall white wooden yellow'.split())


class Builder(base.RecordBuilder):
  """Joins the annotations of the files by image."""
  name = 'visual_genome'
  PHOTOS = 'visual_genome'
  NEEDS_SOURCE = True
  OPTIONS = {
      'limit': (0, 'images to keep per split, the first by id; 0 keeps all'),
      'labels': ('joint', 'label space: keeps the objects and attributes that '
                 'it names, under its names'),
      'num_validation': (0, 'images held out as split validation'),
      'splits': ('', "folder of bottom-up attention's train.txt, val.txt, "
                 'test.txt'),
      'exclude_coco': ('', 'images to leave out: a COCO JSON file, or a text '
                       'file with one COCO image id or file name per line'),
      **base.UPRIGHT}

  def label_space(self):
    return label_space.LabelSpace.load(self.options['labels'])

  def annotation_files(self):
    return [p for n in ('image_data.json', 'objects.json', 'attributes.json',
                        self._regions_name())
            if os.path.exists(p := self._file(n))]

  def sources(self):
    space = label_space.LabelSpace.load(self.options['labels'])
    own = lambda names: {n: n for n in names}
    self._classes = space.class_aliases | own(space.classes)
    self._attributes = space.attribute_aliases | own(space.attributes)
    self._objects = self._list('objects.json', 'objects')
    self._regions = self._list(self._regions_name(), 'regions')
    self._described = self._list('attributes.json', 'attributes', True)
    self._images = self._list('image_data.json', None, True)
    self._excluded = (_ids(self.options['exclude_coco'])
                      if self.options['exclude_coco'] else set())
    if self._excluded and not self._images:
      raise errors.UserError('no annotation file '
                             f'{self._file("image_data.json")}, which '
                             'exclude_coco needs')
    files = image_files.ImageFiles(self.source, _FOLDERS)
    ids = sorted(self._objects.ids() | self._regions.ids()
                 | (self._images.ids() if self._images else set()))
    found = {}
    for split, members in self._split(ids).items():
      if not members:
        raise errors.UserError(f'visual_genome: no image for split {split}')
      limit = min(self.options['limit'] or len(members), len(members))
      found[split] = limit, functools.partial(
          self._records, split, members, files, limit)
    return found

  def _file(self, name):
    return os.path.join(self.source, name)

  def _regions_name(self):
    existing = [n for n in _REGIONS if os.path.exists(self._file(n))]
    return (existing or _REGIONS)[0]

  def _list(self, name, key, optional=False):
    path = self._file(name)
    if not os.path.exists(path):
      zipped = [p for p in (path + '.zip', path[:-5] + '.zip')
                if os.path.exists(p)]
      if zipped:
        raise errors.UserError(f'no {path}; unzip {zipped[0]} first')
      if optional:
        return None
    return json_list.JsonList(path, ('image_id', 'id'), key)

  def _split(self, ids):
    """{split: ids}."""
    count, folder = self.options['num_validation'], self.options['splits']
    if count and folder:
      raise errors.UserError('visual_genome: num_validation and splits '
                             'exclude each other')
    if folder:
      lists = {s: os.path.join(folder, f'{n}.txt') for s, n in _SPLITS.items()}
      lists = {s: _ids(p) for s, p in lists.items() if os.path.exists(p)}
      if not lists:
        raise errors.UserError(f'splits: no train.txt, val.txt or test.txt in '
                               f'{folder!r}')
      return {s: [i for i in ids if i in members]
              for s, members in lists.items()}
    if count >= len(ids):
      raise errors.UserError(f'num_validation: {count} of {len(ids)} images '
                             'leave none for training')
    held = [base.held_out(k, len(ids), count) for k in range(len(ids))]
    splits = {'train': [i for i, h in zip(ids, held) if not h]}
    if count:
      splits['validation'] = [i for i, h in zip(ids, held) if h]
    return splits

  def _records(self, split, ids, files, limit):
    unknown = collections.defaultdict(collections.Counter)
    if self._excluded:
      kept = [i for i in ids
              if _whole((self._images.get(i) or {}).get('coco_id'))
              not in self._excluded]
      for i in sorted(set(ids) - set(kept)):
        self.skip(split, 'image: excluded, it is COCO\'s', i)
      ids = kept
    written = 0
    names = [f'{i}.jpg' for i in ids]
    for i, name, stored in zip(ids, names, files.load_all(names)):
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, name)
        continue
      self.note_image(split, stored)
      if not self._described:
        self.note(split, 'record without attributes: no attributes.json')
      image = (self._images and self._images.get(i)) or {}
      try:
        size = [values.integer(image.get(k), k, 1) for k in ('height',
                                                             'width')]
      except values.Wrong:
        size = stored.height, stored.width
        if image:
          self.note(split, 'size of the image taken from its file')
      texts, phrases = self._phrases(split, i, stored, size)
      yield base.record(
          image=stored.data, image_id=str(i), height=stored.height,
          width=stored.width, texts=texts, phrases=phrases,
          objects=self._image_objects(split, i, stored, size, unknown),
          has_attributes=bool(self._described), photo_ids=[
              f'{k}:{n}' for k in ('coco', 'flickr')
              if (n := _whole(image.get(f'{k}_id'))) is not None])
      written += 1
      if written == limit:
        break
    for what, names in unknown.items():
      self.reports[split]['skipped'][f'{what} outside of the label space'] = {
          'count': names.total(),
          'names': [f'{n!r} {c}x' for n, c in names.most_common(_LISTED)]}

  def _phrases(self, split, i, stored, size):
    """(texts, phrases) of an image."""
    texts, phrases = {}, []
    for r in (self._regions.get(i) or {}).get('regions', ()):
      name = f'{i}#{r.get("region_id")}'
      try:
        text = base.clean(self._text(split, r.get('phrase'), 'phrase'))
      except values.Wrong:
        text = ''
      if not text:
        self.skip(split, 'phrase: empty', name)
        continue
      texts[text] = True
      box = self.box(split, 'phrase', name,
                     [r.get(k) for k in ('x', 'y', 'width', 'height')],
                     stored, *size)
      if box is not None:
        phrases.append(dict(bbox=base.stored_box(box), text=text))
    return list(texts), phrases

  def _image_objects(self, split, i, stored, size, unknown):
    """The objects of an image; counts names outside the label space."""
    attributes_of = collections.defaultdict(list)  # by object id
    if self._described:
      for a in (self._described.get(i) or {}).get('attributes', ()):
        attributes_of[_whole(a.get('object_id'))] += self._attributes_in(
            split, a.get('attributes'), f'{i}#{a.get("object_id")}')
    objects = []
    for o in (self._objects.get(i) or {}).get('objects', ()):
      name = f'{i}#{o.get("object_id")}'
      number = _whole(o.get('object_id'))
      merged = o.get('merged_object_ids')
      # Attributes refer to merged objects by their old ids.
      numbers = {number: 0, **{_whole(m): 0 for m in (
          merged if isinstance(merged, list) else ())}}
      numbers.pop(None, None)
      attributes = [a for k in numbers for a in attributes_of.pop(k, ())]
      given = o.get('names') or o.get('name')
      try:
        given = self._text(split, given[0] if isinstance(given, list)
                           else given, 'name')
      except values.Wrong:
        self.skip(split, 'box: no name', name, 'boxes')
        continue
      label, adjectives = self._read_name(given)
      if label not in self._classes:
        unknown['object'][label] += 1
        self.reports[split]['lost']['boxes'] += 1
        continue
      xywh = [o.get(k) for k in 'xywh']
      box = self.box(split, 'box', name, xywh, stored, *size)
      if box is None:
        continue
      known = {}
      for a in adjectives + [b for a in attributes for b in _split_and(a)]:
        if a in self._attributes:
          known[self._attributes[a]] = True
        elif a:
          unknown['attribute'][a] += 1
      objects.append(dict(
          bbox=base.stored_box(box), label=self._classes[label],
          attributes=list(known), is_crowd=False, id=number or 0,
          area=self.area(split, None, xywh, box, stored, *size)))
    for _ in (k for k, v in attributes_of.items() if v):
      self.note(split, 'attributes of an object that is not listed left out')
    return objects

  def _attributes_in(self, split, given, name):
    """The texts of an object's `attributes`, which may be anything."""
    found = []
    for a in given if isinstance(given, list) else [given] * bool(given):
      try:
        found.append(self._text(split, a, 'attribute'))
      except values.Wrong as e:
        self.skip(split, e.reason, name)
    return found

  def _text(self, split, value, where):
    return values.text(value, where, functools.partial(self.note, split))

  def _read_name(self, name):
    """'White  shirt.' -> ('shirt', ['white'])."""
    name = _tidy(name)
    *front, last = name.split() or ['']
    if name not in self._classes and front and _ADJECTIVES.issuperset(front):
      return last, front
    return name, []


def _split_and(attribute):
  """'Tall and green' -> ['tall', 'green']."""
  name = _tidy(attribute)
  return [name] if name == 'black and white' else [
      part.strip() for part in name.split(' and ')]


def _tidy(name):
  return base.clean(name).lower().removesuffix('.').strip()


def _whole(value):
  """An id as a number, or None where it is none."""
  try:
    return values.integer(value, 'id')
  except values.Wrong:
    return None


def _ids(path):
  """Image ids from a COCO JSON file, or from a list of ids or file names."""
  try:
    if path.endswith('.json'):
      return {values.integer(i['id'], 'id')
              for i in values.load_json(path)['images']}
    with open(path, encoding='utf-8-sig') as f:
      words = [line.split()[0] for line in f if line.strip()]
  except (OSError, ValueError, KeyError, TypeError, values.Wrong) as e:
    raise errors.UserError(f'{path}: not a list of image ids: '
                           f'{type(e).__name__} {e}') from e
  found = [re.search(r'(\d+)(\.\w+)?$', w) for w in words]
  if not all(found) or not found:
    wrong = [w for w, m in zip(words, found) if not m]
    raise errors.UserError(f'{path}: not a list of image ids, one per line: '
                           f'{wrong[0] if wrong else "it is empty"!r}')
  return {int(m[1]) for m in found}
