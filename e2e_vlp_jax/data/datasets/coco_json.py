"""COCO's JSON layout: images, objects with boxes, and captions.

`CocoJson` reads and joins the files of one split; `CocoRecords` turns them and
the images into records. `coco` and other datasets of this layout share them.

An image's or a category's id must be unique, unless its entries are equal in
all keys. Ids of annotations may repeat. An image, a category or an id that
cannot be read ends with an error that names the entry; an object or a caption
that cannot be read is left out and counted.
"""
import collections

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import label_space
from e2e_vlp_jax.data import photos
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import values


class CocoJson:
  """The entries of a split, from one file or several, joined by image.

  Attributes:
    images: dicts with id, file_name, height, width and flickr_url, sorted by
      id. The last three are None where the files give none.
    labels: {category id: name}, in the order of the files.
    objects: {image id: [(k, annotation)]}, k its position in the file.
    captions: {image id: [text]}.
  """

  def __init__(self, paths, skip, note, contents=None):
    """Reads the files.

    Args:
      paths: of the JSON files. An annotation with a `caption` is a caption,
        one with a `bbox` or `category_id` an object; it may be both.
      skip: function (reason, name, lost) that counts what is left out, as
        `RecordBuilder.skip` does for a split.
      note: function (what) that counts what is changed.
      contents: {path: content} of files that are loaded already.

    Raises:
      UserError: a file cannot be read, or contradicts itself or another one.
    """
    self._skip, self._note = skip, note
    self.labels, images = {}, {}
    self.objects = collections.defaultdict(list)
    self.captions = collections.defaultdict(list)
    for path in paths:
      content = _checked(path, (contents or {}).get(path)
                         or values.load_json(path))
      self._add_images(path, content['images'], images)
      self._add_labels(path, content.get('categories'))
      for k, a in enumerate(content['annotations']):
        self._add(k, a)
      if 'categories' not in content and any(
          map(_is_object, content['annotations'])):
        raise errors.UserError(f"{path}: no list 'categories'; is this an "
                               'official COCO file?')
    self.images = sorted(images.values(), key=lambda i: (
        isinstance(i['id'], str), i['id']))
    names = collections.Counter(i['file_name'] for i in self.images)
    for _ in range(len(self.images) - len(names)):
      note('image whose file another image names too')
    self._check_numbering(paths)
    unknown = (self.objects.keys() | self.captions.keys()) - images.keys()
    for i in sorted(unknown, key=str):
      skip('annotations of an image that is not listed', i,
           'boxes' if i in self.objects else None)

  def _add_images(self, path, entries, images):
    values.unique(entries, 'id', f'{path}: images', values.identity)
    for k, entry in enumerate(entries):
      where = f'{path}: images[{k}]'
      i = values.identity(entry['id'], where)
      image = dict(id=i, file_name=values.field(
          _file_name, entry, 'file_name', where))
      for key in ('height', 'width'):
        size = entry.get(key)
        image[key] = None if size is None else values.integer(
            size, f'{where}.{key}', 1)
      image['flickr_url'] = entry.get('flickr_url')
      before = images.setdefault(i, image)
      if before['file_name'] != image['file_name']:
        raise errors.UserError(
            f'{where} is {image["file_name"]!r}, but {before["file_name"]!r} '
            f'has the same id {i!r} in the other file')
      images[i] = {k: image[k] if v is None else v for k, v in before.items()}

  def _add_labels(self, path, entries):
    if entries is None:
      return
    where = f'{path}: categories'
    values.unique(values.objects(entries, where), 'id', where,
                  values.identity)
    for k, entry in enumerate(entries):
      place = f'{where}[{k}]'
      i = values.identity(entry['id'], place)
      name = values.field(values.text, entry, 'name', place, self._note)
      if self.labels.setdefault(i, name) != name:
        raise errors.UserError(f'{place} is {name!r}, but {self.labels[i]!r} '
                               f'has the same id {i!r} in the other file')

  def _check_numbering(self, paths):
    """UserError if COCO's 80 classes are numbered in two ways.

    The official ids are 1 to 90 with gaps, others' are 0 or 1 to 80 without.
    Boxes of one file with the categories of another have wrong names, and
    only some have an id that is not listed.
    """
    if set(self.labels.values()) != set(label_space.LabelSpace.load(
        'coco').classes):
      return
    used = {i for some in self.objects.values() for _, a in some
            if isinstance(i := a.get('category_id'), int)}
    unknown = sorted(used - self.labels.keys())
    if unknown and max(unknown) <= 90:
      ids = sorted(self.labels)
      raise errors.UserError(
          f"{', '.join(paths)}: the boxes' category_id {unknown[0]} is not "
          f"among the categories, COCO's 80 classes with the ids {ids[0]} to "
          f'{ids[-1]}; are the boxes numbered '
          + ('1 to 90, with gaps?' if ids[-1] <= 80 else
             'without gaps, 0 or 1 to 80?'))

  def _add(self, k, a):
    """Adds annotation k of a file to those of its image."""
    is_object, where = _is_object(a), f'annotations[{k}]'
    what = 'box' if is_object else 'caption'
    if not is_object and 'caption' not in a:
      return self._skip('annotation without a box or a caption', where, None)
    try:
      i = values.identity(a.get('image_id'), 'image_id')
      if 'caption' in a:
        what = 'caption'
        self.captions[i] += values.texts(a['caption'], 'caption', self._note)
    except values.Wrong as e:
      self._skip(f'{what}: {e.reason}', f'{where} ({e.found})',
                 'boxes' if e.reason.startswith('image_id') and is_object
                 else None)
      if e.reason.startswith('image_id'):
        return None
    if is_object:
      self.objects[i].append((k, a))
    return None


class CocoRecords(base.RecordBuilder):
  """Yields the records of a `CocoJson`.

  A subclass may have the options `captioned_only` and `upright`.
  """

  def coco_records(self, split, found, images, files, limit):
    """Records of images.

    Args:
      split: name of the split.
      found: a `CocoJson`.
      images: those of `found.images` that are wanted.
      files: `image_files.ImageFiles`.
      limit: most records to yield.
    """
    written = 0
    loaded = files.load_all(*([i['file_name'] for i in some]
                              for some in (images, found.images)))
    for image, stored in zip(images, loaded):
      name = image['file_name']
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, name)
        continue
      objects = self._objects(split, image, stored, found)
      captions = [base.clean(t) for t in found.captions[image['id']]]
      for t in captions:
        if not t:
          self.skip(split, 'empty caption', name)
      captions = [t for t in captions if t]
      if self.options.get('captioned_only') and not (objects and captions):
        self.skip(split, 'image: no valid box or caption', name)
        continue
      self.note_image(split, stored)
      yield base.record(
          image=stored.data, image_id=str(image['id']), height=stored.height,
          width=stored.width, texts=captions, objects=objects,
          photo_ids=photos.in_flickr(image['flickr_url']))
      written += 1
      if written == limit:
        return

  def _objects(self, split, image, stored, found):
    """Returns the valid objects of an image; counts the others."""
    objects = []
    size = image['height'], image['width']
    if None in size and found.objects[image['id']]:
      self.note(split, 'size of the image taken from its file')
    if None in size:
      size = stored.size_in_file
    for k, a in found.objects[image['id']]:
      name = f'{image["file_name"]}#{a.get("id", f"annotations[{k}]")}'
      try:
        category = values.identity(a.get('category_id'), 'category_id')
        crowd = a.get('iscrowd')
        crowd = crowd is not None and values.flag(crowd, 'iscrowd')
      except values.Wrong as e:
        self.skip(split, f'box: {e.reason}', f'{name} ({e.found})', 'boxes')
        continue
      if category not in found.labels:
        self.skip(split, f'box: category {category} is not listed', name,
                  'boxes')
        continue
      xywh = a.get('bbox')
      box = self.box(split, 'box', name, xywh, stored, *size)
      if box is None:
        continue
      try:
        number = values.integer(a.get('id'), 'id')
      except values.Wrong:
        self.note(split, 'box without a number of its own, which became -1')
        number = -1
      objects.append(dict(
          bbox=base.stored_box(box), label=found.labels[category],
          attributes=[], is_crowd=crowd, id=number,
          area=self.area(split, a.get('area'), xywh, box, stored, *size)))
    return objects


def _checked(path, content):
  """The content of a COCO JSON file, its lists checked."""
  for key in ('images', 'annotations'):
    if not isinstance(content, dict) or not isinstance(
        content.get(key), list):
      raise errors.UserError(f'{path}: no list {key!r}; is this an official '
                             'COCO file?')
    values.objects(content[key], f'{path}: {key}')
  return content


def _file_name(value, where):
  """A file name as it stands there: half a character may be half a byte."""
  values.text(value, where)
  if not value.strip():
    raise values.Wrong(value, where, 'a file name')
  return value


def _is_object(annotation):
  return 'bbox' in annotation or 'category_id' in annotation
