"""`coco`: COCO 2017 photographs with boxes and captions.

Official layout under --source:
  annotations/{instances,captions}_{train2017,val2017}.json
  {train2017,val2017}/ or .zip, or the same under images/
The splits are train (train2017) and validation (val2017); one of them may be
absent. Images are sorted by id. COCO has no attributes.

Boxes are clipped to the image. Boxes without area and missing or broken images
are left out; the report counts and names them. `Stored.box` turns boxes along
with images that have an EXIF orientation.
"""
import collections
import functools
import json
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import base

_FOLDERS = {'train': 'train2017', 'validation': 'val2017'}
_TYPES = {'file_name': str, 'name': str, 'caption': str, 'id': int,
          'image_id': int, 'height': int, 'width': int}


class Builder(base.RecordBuilder):
  """Reads the JSON files and checks every box and image."""
  name = 'coco'
  LABELS = 'coco'
  NEEDS_SOURCE = True
  OPTIONS = {
      'limit': (0, 'images to keep per split, the first by id; 0 keeps all'),
      'captioned_only': (
          False, 'keep only images that have boxes and captions')}

  def annotation_files(self):
    return [p for f in self._found() for p in self._files(f)]

  def sources(self):
    found = self._found()
    if not found:
      raise errors.UserError(
          f'neither {self._files("train2017")[0]} nor '
          f'{self._files("val2017")[0]} exists; --source should be the folder '
          'that contains annotations/')
    return {split: self._read(split, folder)
            for split, folder in _FOLDERS.items() if folder in found}

  def _found(self):
    return [f for f in _FOLDERS.values()
            if any(map(os.path.exists, self._files(f)))]

  def _files(self, folder):
    return [os.path.join(self.source, 'annotations', f'{kind}_{folder}.json')
            for kind in ('instances', 'captions')]

  def _read(self, split, folder):
    instances, captions = (_load(p) for p in self._files(folder))
    images = sorted(instances['images'], key=lambda i: i['id'])
    files = image_files.ImageFiles(self.source, [folder, f'images/{folder}'])
    labels = {c['id']: c['name'] for c in instances['categories']}
    boxes, texts = collections.defaultdict(list), collections.defaultdict(list)
    for a in instances['annotations']:
      boxes[a['image_id']].append(a)
    for a in captions['annotations']:
      texts[a['image_id']].append(a['caption'])
    unknown = (boxes.keys() | texts.keys()) - {i['id'] for i in images}
    if self.options['captioned_only']:
      images = [i for i in images if boxes[i['id']] and texts[i['id']]]
    limit = self.options['limit'] or len(images)
    if not images:
      raise errors.UserError(
          f'{self._files(folder)[0]}: no image to keep'
          + (' with boxes and captions (captioned_only)'
             if self.options['captioned_only'] else ''))
    return min(limit, len(images)), functools.partial(
        self._records, split, images, files, boxes, texts, labels, limit,
        unknown)

  def _records(self, split, images, files, boxes, texts, labels, limit,
               unknown):
    for i in sorted(unknown):
      self.skip(split, 'annotations of an image that is not listed', i)
    written = 0
    loaded = files.load_all([i['file_name'] for i in images])
    for image, stored in zip(images, loaded):
      name = image['file_name']
      if isinstance(stored, errors.UserError):
        self.skip(split, f'image: {base.reason(stored, name)}', name)
        continue
      objects = self._objects(split, image, stored, boxes[image['id']],
                              labels)
      captions = [base.clean(t) for t in texts[image['id']]]
      for t in captions:
        if not t:
          self.skip(split, 'empty caption', name)
      captions = [t for t in captions if t]
      if self.options['captioned_only'] and not (objects and captions):
        self.skip(split, 'image: no valid box or caption', name)
        continue
      if stored.changed:
        self.note(split, f'image encoded again: {stored.changed}')
      yield base.record(
          image=stored.data, image_id=str(image['id']), height=stored.height,
          width=stored.width, texts=captions, objects=objects)
      written += 1
      if written == limit:
        return

  def _objects(self, split, image, stored, annotations, labels):
    """Returns the valid objects of an image; counts the others."""
    objects = []
    height, width = image['height'], image['width']
    scale = stored.height * stored.width / (height * width)
    for a in annotations:
      name = f'{image["file_name"]}#{a["id"]}'
      if a.get('category_id') not in labels:
        self.skip(split, f'box: category {a.get("category_id")} is not listed',
                  name)
        continue
      box = self.box(split, 'box', name, a.get('bbox'), stored, height, width)
      if box is None:
        continue
      w, h = map(float, a['bbox'][2:])
      objects.append(dict(
          bbox=base.stored_box(box), label=labels[a['category_id']],
          attributes=[], is_crowd=bool(a.get('iscrowd', 0)),
          area=float(a.get('area') or w * h) * scale, id=int(a['id'])))
    return objects


def _load(path):
  """Loads a COCO JSON file and checks the keys that are used."""
  try:
    with open(path, encoding='utf-8') as f:
      content = json.load(f)
  except FileNotFoundError as e:
    raise errors.UserError(f'no annotation file {path}') from e
  except (OSError, ValueError) as e:
    raise errors.UserError(f'{path} is not readable JSON: {e}') from e
  wanted = {'images': ('id', 'file_name', 'height', 'width'),
            'annotations': ('image_id', 'id')}
  if os.path.basename(path).startswith('instances'):
    wanted['categories'] = ('id', 'name')
  else:
    wanted['annotations'] += ('caption',)
  for key, names in wanted.items():
    if not isinstance(content, dict) or not isinstance(
        content.get(key), list):
      raise errors.UserError(f'{path}: no list {key!r}; is this an official '
                             'COCO file?')
    for k, item in enumerate(content[key]):
      absent = [n for n in names
                if not isinstance(item, dict) or n not in item]
      if absent:
        raise errors.UserError(f'{path}: {key}[{k}] has no {absent[0]!r}')
      for n in names:
        kind = _TYPES[n]
        if not isinstance(item[n], kind) or n in ('height', 'width') and (
            item[n] <= 0):
          raise errors.UserError(
              f'{path}: {key}[{k}].{n} is {item[n]!r}; expected '
              + ('text' if kind is str else 'a positive whole number'))
  return content
