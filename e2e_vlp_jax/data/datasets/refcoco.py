"""`refcoco`: referring expressions about COCO's photographs.

  python -m e2e_vlp_jax.prepare refcoco --source DIR --data_dir data

RefCOCO and RefCOCO+ (Yu et al., ECCV 2016), RefCOCOg (Mao et al., CVPR 2016).
DIR holds COCO's images of 2014 or 2017, and expressions in one of these forms:

  finetune_refcoco_{train,val,testA,testB}.json   MDETR's, also refcoco+ and
      refcocog; they mark the noun of the object
  google_refexp_{train,val}_201511_coco_aligned.json   Google's RefCOCOg
  refs*.json   the official refs as JSON: a list of {image_id, ann_id, split,
      sentences: [{raw, sent_id}]}, with the boxes in instances.json or in
      annotations/instances_{train2014,train2017,val2017}.json
  *refcoco*.json   a list of {image_id, bbox, sentence, split}

The official refs(...).p are pickles. A pickle can run any code, so it is not
read; where you trust it, export it once:

  python -c "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1],
  'rb')), open('refs.json', 'w'))" 'refs(unc).p'

One --name for each of the three: --name refcocog --expressions
'finetune_refcocog_*.json'. A record is an image with its expressions; splits
are train, validation, testA, testB and test.
"""
import collections
import fnmatch
import functools
import os
import re

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import grounded
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import mdetr_json
from e2e_vlp_jax.data.datasets import values

_FOLDERS = ('', 'annotations', 'refcoco', 'OpenSource')
_PATTERNS = ('finetune_refcoco*.json', 'google_refexp*.json', 'refs*.json',
             '*refcoco*.json')
_INSTANCES = ('instances.json', 'annotations/instances_train2014.json',
              'annotations/instances_train2017.json',
              'annotations/instances_val2017.json')
_IMAGES = [f'{p}{f}' for p in ('', 'images/') for f in (
    'train2014', 'train2017', 'val2017', 'val2014')]
_SPLIT = {'train': 'train', 'val': 'validation', 'validation': 'validation',
          'google-val': 'validation', 'google-train': 'train', 'test': 'test',
          'testA': 'testA', 'testB': 'testB'}
_ORDER = ('train', 'validation', 'test', 'testA', 'testB')


class Builder(grounded.GroundedRecords):
  """Reads the expressions of each split and finds their images."""
  name = 'refcoco'
  NEEDS_SOURCE = True
  OPTIONS = {
      'name': ('refcoco', 'name of the dataset, for data=NAME'),
      'expressions': ('', 'files of --source to read, a pattern such as '
                      "'finetune_refcocog_*.json'; default: those found"),
      'limit': (0, 'images to keep per split, the first; 0 keeps all'),
      'upright': (False, 'boxes were drawn on upright pictures: turn none by '
                  'EXIF')}

  def annotation_files(self):
    return self._paths

  def sources(self):
    self._paths = self._files()
    found = collections.defaultdict(list)
    for path in self._paths:
      for split, image in self._read(path):
        found[split].append(image)
    files = image_files.ImageFiles(self.source, _IMAGES)
    splits = {}
    for split in _ORDER:
      if found[split]:
        images = [_named(i, files) for i in _joined(found[split])]
        most = min(self.options['limit'] or len(images), len(images))
        splits[split] = most, functools.partial(
            self.grounded_records, split, images, files, most)
    return splits

  def _files(self):
    """Paths of the files with expressions, of one form and one dataset."""
    if not os.path.isdir(self.source):
      raise errors.UserError(f'--source: no folder {self.source!r}')
    there = {n: os.path.join(self.source, f, n) for f in reversed(_FOLDERS)
             if os.path.isdir(os.path.join(self.source, f))
             for n in sorted(os.listdir(os.path.join(self.source, f)))}
    wanted = self.options['expressions']
    for pattern in [wanted] if wanted else _PATTERNS:
      names = sorted(fnmatch.filter(there, pattern))
      sets = {re.sub(r'_(train|val|test[AB]?)\b.*', '', n) for n in names}
      if len(sets) > 1:
        raise errors.UserError(
            f'{self.source!r} has the expressions of {", ".join(sorted(sets))}'
            '; choose those of one with --expressions and --name')
      if names:
        return [there[n] for n in names]
    pickles = fnmatch.filter(there, '*.p') + fnmatch.filter(there, '*.pkl')
    if pickles:
      raise errors.UserError(
          f'{there[pickles[0]]} is a pickle, which can run any code and is not '
          'read; export it to refs.json where you trust it: `prepare refcoco '
          '--help` has the command')
    raise errors.UserError(
        f'no {wanted or ", ".join(_PATTERNS)} in {self.source!r}; see `prepare '
        'refcoco --help`')

  def _read(self, path):
    """[(split, `grounded.Image`)] of a file."""
    content = values.load_json(path)
    if mdetr_json.is_mdetr(content):
      name = os.path.basename(path)
      split = re.search(r'_(train|val|test[AB]?)\b', name)
      if not split:
        raise errors.UserError(f'{path}: its name has no split; expected '
                               'finetune_refcoco_train.json or the like')
      return [(_SPLIT[split[1]], i)
              for i in mdetr_json.read(path, content, expressions=True)]
    if isinstance(content, dict) and 'refexps' in content:
      return _google(path, content)
    if isinstance(content, list):
      return self._list(path, content)
    raise errors.UserError(f'{path} is no file of expressions; see `prepare '
                           'refcoco --help`')

  def _list(self, path, content):
    """Of a list of refs, or of single expressions with their boxes."""
    boxes = None
    for k, ref in enumerate(values.objects(content, path)):
      where = f'{path}: [{k}]'
      split = values.field(values.text, ref, 'split', where)
      if split not in _SPLIT:
        raise errors.UserError(f'{where}.split is {split!r}'
                               + errors.nearest(split, _SPLIT))
      number = values.field(values.integer, ref, 'image_id', where)
      xywh = ref.get('bbox')
      if xywh is None:
        if boxes is None:
          boxes = self._boxes()
        i = values.field(values.integer, ref, 'ann_id', where)
        if i not in boxes:
          raise errors.UserError(f'{where}.ann_id is {i}, which no annotation '
                                 'of the instances has')
        xywh = boxes[i]
      said = ref.get('sentences', [ref])
      for sentence in values.objects(said, f'{where}.sentences'):
        text = next((sentence[key] for key in ('raw', 'sent', 'sentence')
                     if sentence.get(key)), None)
        text = values.text(text, f'{where}.sentences')
        yield _SPLIT[split], _expression(
            ref.get('file_name') or '', number, text, xywh,
            f'{number}#{ref.get("ann_id", k)}', sentence.get('sent_id', -1))

  def _boxes(self):
    """{annotation id: bbox} of the instances that are there."""
    found = {}
    for name in _INSTANCES:
      path = os.path.join(self.source, name)
      if os.path.isfile(path):
        content = values.load_json(path)
        if not isinstance(content, dict):
          raise values.Wrong(content, path, "an object with 'annotations'")
        for a in values.objects(content.get('annotations'),
                                f'{path}: annotations'):
          found[a.get('id')] = a.get('bbox')
    if not found:
      raise errors.UserError(
          f'the refs have no boxes, and {self.source!r} has none of '
          + ', '.join(_INSTANCES))
    return found


def _google(path, content):
  """Of Google's file: annotations name their refexps."""
  table = lambda key: {
      values.integer(k, f'{path}: {key}'): v
      for k, v in content.get(key, {}).items()} if isinstance(
          content.get(key), dict) else {
              values.integer(v.get(f'{key[:-1]}_id', v.get('id')), key): v
              for v in values.objects(content.get(key), f'{path}: {key}')}
  refexps = table('refexps')
  name = os.path.basename(path)
  split = 'train' if '_train' in name else 'validation'
  for i, a in table('annotations').items():
    where = f'{path}: annotations[{i}]'
    if 'bbox' not in a:
      raise errors.UserError(
          f"{where} has no 'bbox'; expected the file that Google's toolbox "
          'aligns with COCO, google_refexp_*_coco_aligned.json')
    number = values.field(values.integer, a, 'image_id', where)
    for r in a.get('refexp_ids', ()):
      if r not in refexps:
        raise errors.UserError(f'{where}: no refexp {r}')
      yield split, _expression(
          '', number, values.field(values.text, refexps[r], 'raw',
                                   f'{path}: refexps[{r}]'), a['bbox'],
          f'{number}#{i}', r)


def _expression(file_name, number, text, xywh, name, i):
  """An image with one expression."""
  return grounded.Image(_plain(file_name), number, expressions=[
      (text, grounded.Phrase(xywh, name, id=i if isinstance(i, int) else -1))])


def _plain(file_name):
  """COCO_train2014_000000581857_16.jpg -> without the number of the ref."""
  return re.sub(r'(COCO_\w+?_\d{12})_\d+\.jpg$', r'\1.jpg', file_name)


def _joined(images):
  """One image for each id, with the expressions of all of its entries."""
  found = {}
  for image in images:
    first = found.setdefault(image.id, image)
    if first is not image:
      first.expressions += image.expressions
  return list(found.values())


def _named(image, files):
  """The image under the first of COCO's names that is there."""
  number = image.id
  if not isinstance(number, int):
    digits = re.search(r'(\d{12})', image.file_name)
    number = int(digits[1]) if digits else None
  names = [image.file_name] if image.file_name else []
  if number is not None:
    names += [f'COCO_train2014_{number:012d}.jpg', f'{number:012d}.jpg',
              f'COCO_val2014_{number:012d}.jpg']
  image.file_name = next(filter(files.has, names), names[0] if names else '')
  return image
