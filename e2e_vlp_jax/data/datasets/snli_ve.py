"""`snli_ve`: texts that follow from a photograph, or do not (Xie et al. 2019).

  python -m e2e_vlp_jax.prepare snli_ve --source DIR --data_dir data

https://github.com/necla-ml/SNLI-VE. --source contains
  snli_ve_{train,dev,test}.jsonl, there or in annotations/, data/ or snli_ve/,
  and Flickr30k's images, flickr30k-images/1000092795.jpg and so on, as a folder
  or .zip; the folder may also be called flickr30k_images or images.
Splits keep their official names.

A record is an image with its hypotheses, sentence2 of the files; `label` is
their gold_label. Hypotheses without a gold label, or whose image is missing or
broken, are left out; the report counts and names them, and compares the numbers
of hypotheses and images with the published ones. A file that holds another
split than its name says is refused.
"""
import collections
import functools
import itertools
import os
import sys

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import ops_entailment
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import json_lines
from e2e_vlp_jax.data.datasets import values

# split: published hypotheses and images.
_SPLITS = {'train': (529_527, 29_783), 'dev': (17_858, 1_000),
           'test': (17_901, 1_000)}
_FOLDERS = ('', 'annotations', 'data', 'snli_ve')
_IMAGES = ('flickr30k-images', 'flickr30k_images', 'images')


class Builder(base.RecordBuilder):
  """Joins hypotheses and images by Flickr's ids."""
  name = 'snli_ve'
  NEEDS_SOURCE = True
  OPTIONS = {'limit': (0, 'images to keep per split, the first by id; 0 keeps '
                          'all')}

  def annotation_files(self):
    return list(filter(None, map(self._find, _SPLITS)))

  def sources(self):
    rows = {split: self._rows(split) for split in _SPLITS
            if self._find(split)}
    if not rows:
      raise errors.UserError(
          f'no {_name("train")} in {self.source!r} and no other hypotheses of '
          'SNLI-VE; --source should be the folder that contains them')
    for one, other in itertools.combinations(rows, 2):
      shared = rows[one].keys() & rows[other].keys()
      if shared:
        raise errors.UserError(
            f'{self._find(one)} and {self._find(other)} share {len(shared)} '
            f'image(s), such as {min(shared)}; expected none, so one of them '
            'holds another split than its name says')
    images = image_files.ImageFiles(self.source, _IMAGES)
    found = {}
    for split, by_image in rows.items():
      kept = dict(itertools.islice(sorted(by_image.items()),
                                   self.options['limit'] or None))
      found[split] = len(kept), functools.partial(self._records, split, images,
                                                  kept)
    return found

  def _find(self, split):
    """The path of a split's hypotheses, or None."""
    places = [os.path.join(self.source, f, _name(split)) for f in _FOLDERS]
    return next(filter(os.path.isfile, places), None)

  def _rows(self, split):
    """{id of an image: its rows}, their numbers compared with the published."""
    path = self._find(split)
    rows = json_lines.load(path, _row, 'pair', 'an example of SNLI-VE')
    by_image = collections.defaultdict(list)
    for row in rows:
      by_image[row['image']].append(row)
    counts = len(rows), len(by_image)
    for other, published in _SPLITS.items():
      if counts == published and other != split:
        raise errors.UserError(
            f'{path}: it holds {other} ({counts[0]:,} hypotheses about '
            f'{counts[1]:,} images), and not {split}')
    same = counts == _SPLITS[split]
    # On stderr, like the progress bar; stdout is for the report.
    print(f'{self.name} {split}: {counts[0]:,} hypotheses, {counts[1]:,} images'
          + (', as published' if same else
             '; published: {:,} and {:,}'.format(*_SPLITS[split])),
          file=sys.stderr)
    return by_image

  def _records(self, split, images, by_image):
    report = self.reports[split]
    report.update(hypotheses=0)
    names = [f'{i}.jpg' for i in by_image]
    for (i, rows), name, stored in zip(by_image.items(), names,
                                       images.load_all(names)):
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, name)
        for row in rows:
          self.skip(split, 'hypothesis about an image that is left out',
                    row['pair'])
        continue
      found = [h for h in (self._hypothesis(split, row) for row in rows) if h]
      if not found:
        self.skip(split, 'image: no hypothesis left', name, 'images')
        continue
      self.note_image(split, stored)
      report['hypotheses'] += len(found)
      yield base.record(image=stored.data, image_id=i, height=stored.height,
                        width=stored.width, entailment=found)

  def _hypothesis(self, split, row):
    """A text of the record, or None if it is left out and counted."""
    text = base.clean(values.text(row['text'], 'sentence2',
                                  functools.partial(self.note, split)))
    if not text:
      return self.skip(split, 'hypothesis without words', row['pair'])
    if row['label'] == '-':  # The annotators did not agree (SNLI).
      return self.skip(split, 'hypothesis without a gold label', row['pair'])
    return dict(text=text, label=row['label'])


def _name(split):
  return f'snli_ve_{split}.jsonl'


def _row(row):
  """The fields of an example that are used; raises where one is wrong."""
  label = values.text(row['gold_label'], 'gold_label')
  if label not in (*ops_entailment.LABELS, '-'):
    raise ValueError(f'gold_label {label!r}'
                     + errors.nearest(label, ops_entailment.LABELS))
  image = row['Flickr30K_ID']
  if not isinstance(image, str):
    image = str(values.integer(image, 'Flickr30K_ID'))
  return dict(pair=values.text(row['pairID'], 'pairID'),
              image=values.text(image, 'Flickr30K_ID'),
              text=values.text(row['sentence2'], 'sentence2'), label=label)
