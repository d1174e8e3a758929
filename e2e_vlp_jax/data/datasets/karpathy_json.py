"""Karpathy's split files: captions of COCO and Flickr30k, and their splits.

dataset_coco.json and dataset_flickr30k.json (Karpathy and Fei-Fei, CVPR 2015)
have one layout: 'dataset' names the photographs' collection, and every entry
of 'images' its file, its sentences and its split. `karpathy` and `flickr30k`
share this file; each says where its photographs are.

An entry that cannot be read ends with an error that names it. Images that are
missing or broken, and sentences without words, are left out and counted.
"""
import collections
import functools
import os
import sys

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import values

_NAMES = {'val': 'validation'}  # as all other datasets call it
_FOLDERS = ('', 'annotations', 'karpathy')


class KarpathyRecords(base.RecordBuilder):
  """Yields the records of a split file, in its order.

  A subclass has `name`, `COLLECTION`, `PUBLISHED`, `photographs` and `place`.
  """
  NEEDS_SOURCE = True
  # What 'dataset' of the file must be.
  COLLECTION = ''
  # {split: (images, sentences)} of the published file.
  PUBLISHED = {}
  OPTIONS = {
      'splits': ('', 'which splits to write, such as validation,test; default: '
                 'all of the file'),
      'limit': (0, 'images to keep per split, the first of the file; 0 keeps '
                'all')}

  def photographs(self):
    """The `ImageFiles`."""
    raise NotImplementedError

  def place(self, entry, where):
    """(file name, official id) of an entry of the file."""
    raise NotImplementedError

  def annotation_files(self):
    return [self._path()]

  def sources(self):
    by_split = collections.defaultdict(list)
    path = self._path()
    self._files = self.photographs()
    for entry in self._entries(path):
      by_split[entry['split']].append(entry)
    wanted = self.named_splits(by_split, f'{path} has ') or list(by_split)
    # In the published order, whatever comes first in the file.
    order = [*self.PUBLISHED, *wanted]
    return {split: self._read(split, by_split[split])
            for split in sorted(set(wanted), key=order.index)}

  def _path(self):
    """The path of the split file."""
    name = f'dataset_{self.COLLECTION}.json'
    for folder in _FOLDERS:
      path = os.path.join(self.source, folder, name)
      if os.path.isfile(path):
        return path
    other = [n for f in _FOLDERS
             for n in _listed(os.path.join(self.source, f))
             if n.startswith('dataset_') and n.endswith('.json')]
    raise errors.UserError(
        f'no {name} in {self.source!r}'
        + (f'; it holds {other[0]}, of another dataset' if other else
           '; --source should be the folder that contains it'))

  def _entries(self, path):
    """Dicts of id, file_name, split and sentences, in the file's order.

    Raises:
      UserError: another kind of file, or of another dataset.
    """
    # The tokens of all sentences would take a gigabyte.
    content = values.load_json(path, lambda x: x.get('raw', x))
    if not isinstance(content, dict) or not isinstance(content.get('images'),
                                                       list):
      raise errors.UserError(f"{path}: no list 'images'; is this one of "
                             "Karpathy's split files?")
    images = values.objects(content['images'], f'{path}: images')
    held = content.get('dataset')
    if held != self.COLLECTION:
      raise errors.UserError(
          f"{path}: its 'dataset' is {values.show(held)}, with {len(images):,} "
          f'images; `prepare {self.name}` expected {self.COLLECTION!r}')
    found = []
    for k, image in enumerate(images):
      where = f'{path}: images[{k}]'
      split = values.field(values.text, image, 'split', where)
      name, i = self.place(image, where)
      found.append(dict(
          id=i, file_name=name, split=_NAMES.get(split, split),
          sentences=values.field(_sentences, image, 'sentences', where)))
    return list(values.unique(found, 'id', f'{path}: images',
                              values.identity).values())

  def _read(self, split, entries):
    """(number of images, function to iterate over the records)."""
    self._compare(split, len(entries), sum(len(e['sentences'])
                                           for e in entries))
    most = min(self.options['limit'] or len(entries), len(entries))
    return most, functools.partial(self._records, split, entries, most)

  def _compare(self, split, images, sentences):
    """Prints the file's counts beside the published ones."""
    wanted = self.PUBLISHED.get(split)
    # On stderr, like the progress bar; stdout is for the report.
    print(f'{self.name} {split}: {images:,} images, {sentences:,} sentences'
          + (', as published' if (images, sentences) == wanted else
             '; published: ' + ('no such split' if wanted is None else
                                '{:,} and {:,}'.format(*wanted))),
          file=sys.stderr)

  def _records(self, split, entries, most):
    note = functools.partial(self.note, split)
    written = 0
    names = [e['file_name'] for e in entries]
    for entry, stored in zip(entries, self._files.load_all(names)):
      name = entry['file_name']
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, name)
        continue
      texts = [base.clean(values.text(t, 'raw', note))
               for t in entry['sentences']]
      for t in texts:
        if not t:
          self.skip(split, 'sentence without words', name)
      self.note_image(split, stored)
      yield base.record(image=stored.data, image_id=str(entry['id']),
                        height=stored.height, width=stored.width,
                        texts=[t for t in texts if t])
      written += 1
      if written == most:
        return


def _listed(folder):
  return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _sentences(value, where):
  """A list of texts; half a character is replaced, and counted, later."""
  if not isinstance(value, list):
    raise values.Wrong(value, where, 'a list')
  for k, text in enumerate(value):
    values.text(text, f'{where}[{k}].raw')
  return value
