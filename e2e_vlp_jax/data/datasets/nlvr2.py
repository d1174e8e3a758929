"""`nlvr2`: human statements about two photographs (Suhr et al., ACL 2019).

  python -m e2e_vlp_jax.prepare nlvr2 --source DIR --data_dir data

https://github.com/lil-lab/nlvr. --source contains, for each split,
  {train,dev,test1,test2}.json, JSON lines, there or in data/ or nlvr2/data/,
  and the images {dev-850-0-img0,dev-850-0-img1}.png, as folders or .zip:
  images/train, train or train_img, with or without the folders 0 to 99,
  likewise for the other splits.
Splits keep their official names. test2, once the hidden test set, is public
since 2022. Labels may be absent.

A record is one image. Statements belong to the left image (img0) of their pair
and name the number of the right one's record, so no file is stored twice. If an
image of a pair is missing or broken, the pair is left out; the report counts
and names its images and statements, and compares the number of statements with
the published one.
"""
import functools
import itertools
import os
import sys

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import json_lines
from e2e_vlp_jax.data.datasets import values

# Published statements, 107,292 in all. The files of dev, test1 and test2 have
# these numbers; train has the rest.
_SPLITS = {'train': 86_373, 'dev': 6_982, 'test1': 6_967, 'test2': 6_970}
_FOLDERS = ('', 'data', 'nlvr2/data')


class Builder(base.RecordBuilder):
  """Joins statements and images by their identifiers."""
  name = 'nlvr2'
  NEEDS_SOURCE = True
  OPTIONS = {
      'splits': ('', 'which of train,dev,test1,test2; default: those whose '
                 'statements exist'),
      'limit': (0, 'pairs of images to keep per split, the first; 0 keeps all')}

  def annotation_files(self):
    return [self._find(split) for split in self._wanted()]

  def sources(self):
    return {split: self._read(split) for split in self._wanted()}

  def _wanted(self):
    """The splits to write."""
    named = self.named_splits(_SPLITS)
    for split in named:
      if not self._find(split):
        raise errors.UserError(f'no {split}.json in {self.source!r}')
    found = named or [s for s in _SPLITS if self._find(s)]
    if not found:
      raise errors.UserError(
          f'no train.json in {self.source!r} and no other statements of NLVR2; '
          '--source should be the folder that contains them')
    return found

  def _find(self, split):
    """The path of a split's statements, or None."""
    places = [os.path.join(self.source, f, f'{split}.json') for f in _FOLDERS]
    return next(filter(os.path.isfile, places), None)

  def _read(self, split):
    """(number of images, function to iterate over the records)."""
    path = self._find(split)
    rows = json_lines.load(path, functools.partial(_row, split), 'identifier',
                           f'an example of NLVR2 {split}')
    published = _SPLITS[split]
    # On stderr, like the progress bar; stdout is for the report.
    print(f'{self.name} {split}: {len(rows):,} statements'
          + (', as published' if len(rows) == published else
             f'; published: {published:,}'), file=sys.stderr)
    pairs = {}
    for row in rows:
      pairs.setdefault(row['pair'], []).append(row)
    pairs = dict(itertools.islice(pairs.items(),
                                  self.options['limit'] or None))
    images = image_files.ImageFiles(self.source, [
        f'images/{split}', split, f'{split}_img', f'images/{split}_img'])
    return 2 * len(pairs), functools.partial(self._records, split, images,
                                             pairs)

  def _records(self, split, images, pairs):
    report = self.reports[split]
    report.update(statements=0, unlabelled=0)
    names = [rows[0]['folder'] + f'{pair}-img{k}.png'
             for pair, rows in pairs.items() for k in (0, 1)]
    loaded = images.load_all(names)
    number = 0
    for (pair, rows), *found in zip(pairs.items(), loaded, loaded):
      if any(isinstance(f, errors.UserError) for f in found):
        self._leave_out(split, pair, rows, found)
        continue
      statements = [s for s in (self._statement(split, row, number)
                                for row in rows) if s]
      if not statements:
        for k in (0, 1):
          self.skip(split, 'image: no statement left', f'{pair}-img{k}.png',
                    'images')
        continue
      # The right image first: its number is `number`.
      for k, own in ((1, []), (0, statements)):
        self.note_image(split, found[k])
        yield base.record(image=found[k].data, image_id=f'{pair}-img{k}',
                          height=found[k].height, width=found[k].width,
                          statements=own)
      number += 2
      report['statements'] += len(statements)
      report['unlabelled'] += sum(not s['has_label'] for s in statements)

  def _leave_out(self, split, pair, rows, found):
    """Counts a pair of which an image cannot be used."""
    for k, stored in enumerate(found):
      name = f'{pair}-img{k}.png'
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, rows[0]['folder'] + name, name)
      else:
        self.skip(split, 'image: the other one of its pair is left out', name,
                  'images')
    for row in rows:
      self.skip(split, 'statement about an image that is left out',
                row['identifier'])

  def _statement(self, split, row, number):
    """A statement of the record, or None if it is left out and counted."""
    text = base.clean(values.text(row['sentence'], 'sentence',
                                  functools.partial(self.note, split)))
    if not text:
      return self.skip(split, 'statement without words', row['identifier'])
    return dict(second_record=number, statement=text,
                label=bool(row['label']), has_label=row['label'] is not None,
                identifier=row['identifier'], group=row['group'])


def _row(split, row):
  """The fields of an example that are used; raises where one is wrong."""
  identifier = values.text(row['identifier'], 'identifier')
  parts = identifier.split('-')
  if len(parts) != 4:
    raise ValueError(f"identifier {identifier!r}; expected '{split}-SET-PAIR-"
                     "SENTENCE'")
  if parts[0] != split:
    raise ValueError(f'identifier {identifier!r}: the file holds {parts[0]}, '
                     f'and not {split}')
  label = row.get('label')
  folder = str(row['directory']) + '/' if 'directory' in row else ''
  return dict(identifier=identifier, pair='-'.join(parts[:3]), folder=folder,
              # The sentence, whichever pair of its set it is about.
              group='-'.join((*parts[:2], '', parts[3])),
              sentence=values.text(row['sentence'], 'sentence'),
              label=None if label in (None, '') else values.flag(
                  label, 'label'))
