"""`flickr30k_entities`: five captions an image, their phrases with boxes.

  python -m e2e_vlp_jax.prepare flickr30k_entities --source DIR --data_dir data

Flickr30k Entities (Plummer et al., ICCV 2015),
https://github.com/BryanPlummer/flickr30k_entities. DIR holds, as there,
  Annotations/ID.xml  Sentences/ID.txt  train.txt val.txt test.txt
(annotations.zip unpacked, also inside a folder Flickr30kEntities/ or the like)
and the images of Flickr30k (https://shannon.cs.illinois.edu/DenotationGraph),
flickr30k-images/ID.jpg or flickr30k_images/, as a folder or .zip.

A phrase is an item of `phrases` for each of its boxes, with the number of its
caption, its characters, the entity's id and its kind ('people',
'people/clothing', ...). Phrases without a box (scenes, things that are not
visible) are counted and left out, as the official recall leaves them out.
"""
import functools
import os
import re
import sys
import xml.etree.ElementTree

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import grounded
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import values

# split: (list of its ids, published images).
_SPLITS = {'train': ('train.txt', 29_783), 'validation': ('val.txt', 1000),
           'test': ('test.txt', 1000)}
_FOLDERS = ('', 'Flickr30kEntities', 'flickr30k_entities', 'annotations')
_IMAGES = ('flickr30k-images', 'flickr30k_images', 'images')
_PHRASE = re.compile(r'\[/EN#(\d+)((?:/[^/\s\]]+)+) ([^\]]*)\]')


class Builder(grounded.GroundedRecords):
  """Joins sentences, boxes and images by the image's id."""
  name = 'flickr30k_entities'
  NEEDS_SOURCE = True
  OPTIONS = {'limit': (0, 'images to keep per split, the first of its list; '
                       '0 keeps all')}

  def annotation_files(self):
    return [path for name, _ in _SPLITS.values() if (path := self._find(name))]

  def sources(self):
    splits = {split: self._find(name) for split, (name, _) in _SPLITS.items()}
    if not any(splits.values()) or not self._find('Sentences'):
      lacking = 'Sentences/' if any(splits.values()) else 'train.txt'
      raise errors.UserError(
          f'no {lacking} in {self.source!r}; --source should hold Sentences/, '
          'Annotations/ and train.txt, val.txt or test.txt of Flickr30k '
          'Entities')
    files = image_files.ImageFiles(self.source, _IMAGES)
    found = {}
    for split, path in splits.items():
      if path:
        with open(path, encoding='utf-8') as f:
          ids = f.read().split()
        published = _SPLITS[split][1]
        print(f'{self.name} {split}: {len(ids):,} images'
              + (', as published' if len(ids) == published else
                 f'; published: {published:,}'), file=sys.stderr)
        if not ids:
          raise errors.UserError(f'{path}: no ids of images')
        most = min(self.options['limit'] or len(ids), len(ids))
        found[split] = most, functools.partial(self._records, split, ids,
                                               files, most)
    return found

  def _find(self, name):
    """The path of an official file or folder, or None."""
    places = [os.path.join(self.source, f, name) for f in _FOLDERS]
    return next(filter(os.path.exists, places), None)

  def _records(self, split, ids, files, most):
    sentences, annotations = self._find('Sentences'), self._find('Annotations')
    images = []
    for i in ids:
      try:
        with open(os.path.join(sentences, f'{i}.txt'), encoding='utf-8') as f:
          lines = [s for s in f.read().splitlines() if s.strip()]
      except (OSError, UnicodeDecodeError):
        self.skip(split, 'image: no readable sentences', i, 'images')
        continue
      path = os.path.join(annotations or '', f'{i}.xml')
      height, width, boxes = read_boxes(path)
      image = grounded.Image(f'{i}.jpg', i, height, width)
      for k, line in enumerate(lines):
        text, phrases = read_sentence(line)
        image.captions.append((text, self._phrases(
            split, phrases, boxes, f'{i}#{k}')))
      images.append(image)
    yield from self.grounded_records(split, images, files, most)

  def _phrases(self, split, phrases, boxes, name):
    """One `grounded.Phrase` for each box of each phrase."""
    found = []
    for entity, kind, span, text in phrases:
      if entity not in boxes:
        self.note(split, 'phrase without a box, left out')
      found += [grounded.Phrase(xywh, f'{name} {text!r}', [span], text, entity,
                                kind) for xywh in boxes.get(entity, ())]
    return found


def read_sentence(line):
  """'[/EN#1/people A man] walks' -> ('A man walks', [(1, 'people', (0, 5),
  'A man')])."""
  text, at, phrases = '', 0, []
  for m in _PHRASE.finditer(line):
    text += line[at:m.start()]
    phrases.append((int(m[1]), m[2][1:], (len(text), len(text) + len(m[3])),
                    m[3]))
    text += m[3]
    at = m.end()
  return text + line[at:], phrases


def read_boxes(path):
  """(height, width, {entity: [x, y, w, h]}) of an image's XML file.

  The files count pixels from 1; the official recall subtracts 1 from every
  coordinate, as is done here.

  Raises:
    UserError: no such file, or one that is not of this form.
  """
  try:
    root = xml.etree.ElementTree.parse(path).getroot()
    size = [int(root.find(f'size/{k}').text) for k in ('height', 'width')]
    boxes = {}
    for item in root.findall('object'):
      corners = item.find('bndbox')
      if corners is None:
        continue
      x0, y0, x1, y1 = (values.number(corners.find(k).text, k) for k in (
          'xmin', 'ymin', 'xmax', 'ymax'))
      for name in item.findall('name'):
        boxes.setdefault(int(name.text), []).append(
            [x0 - 1, y0 - 1, x1 - x0, y1 - y0])
  except (OSError, AttributeError, ValueError, TypeError, errors.UserError,
          xml.etree.ElementTree.ParseError) as e:
    raise errors.UserError(f'{path} is no readable XML file of Flickr30k '
                           f'Entities: {e}') from e
  return (*size, boxes)
