"""`nlvr1`: NLVR v1, drawn scenes with human sentences (Suhr et al. 2017).

Official layout under --source, for each of train, dev and test that exists:
SPLIT/SPLIT.json (JSON lines) and its images in SPLIT/images/ or
SPLIT/images.zip. NLVR shows each example in six permutations of its three
boxes; we read the first.

Objects and their attributes come from `structured_rep` and are exact. Every
sentence becomes a statement about one image, without a second one. Sentences
that are labelled true also become texts of the image. Use the label space
`joint`.
"""
import functools
import os

from e2e_vlp_jax import errors
from e2e_vlp_jax.data.datasets import base
from e2e_vlp_jax.data.datasets import image_files
from e2e_vlp_jax.data.datasets import json_lines
from e2e_vlp_jax.data.datasets import values

_SPLITS = ('train', 'dev', 'test')
_HEIGHT, _WIDTH, _SLOT = 100, 400, 150      # a box is 100 wide, then a gap
_COLOURS = {'#0099ff': 'blue', 'yellow': 'yellow', 'black': 'black'}
_SIZES = {10: 'small', 20: 'medium', 30: 'large'}


class Builder(base.RecordBuilder):
  """Yields one record per example: a sentence and its image."""
  name = 'nlvr1'
  LABELS = 'joint'
  NEEDS_SOURCE = True
  OPTIONS = {
      'limit': (0, 'examples to keep per split, the first; 0 keeps all')}

  def annotation_files(self):
    return [p for s in _SPLITS if os.path.exists(p := self._file(s))]

  def sources(self):
    if not self.annotation_files():
      raise errors.UserError(f'no {self._file("dev")}; --source should be the '
                             'folder that contains dev/ and test/')
    found = {}
    for split in _SPLITS:
      if os.path.exists(self._file(split)):
        rows = json_lines.load(
            self._file(split), _row, 'identifier',
            'an NLVR example')[:self.options['limit'] or None]
        files = image_files.ImageFiles(self.source, [f'{split}/images'])
        found[split] = len(rows), functools.partial(self._records, split,
                                                    rows, files)
    return found

  def _file(self, split):
    return os.path.join(self.source, split, f'{split}.json')

  def _records(self, split, rows, files):
    names = [f'{split}-{r["identifier"]}-0.png' for r in rows]
    paths = [f'{r["directory"]}/{n}' for r, n in zip(rows, names)]
    for k, (row, name, stored) in enumerate(
        zip(rows, names, files.load_all(paths))):
      if isinstance(stored, errors.UserError):
        self.skip_image(split, stored, paths[k])
        continue
      self.note_image(split, stored)
      sentence = base.clean(values.text(row['sentence'], 'sentence',
                                        functools.partial(self.note, split)))
      true = values.flag(row['label'], 'label')
      if not sentence:
        self.skip(split, 'empty sentence', name)
      yield base.record(
          image=stored.data, image_id=name[:-len('.png')],
          height=stored.height, width=stored.width,
          texts=[sentence] if true and sentence else [],
          objects=_objects(row['structured_rep'], k),
          statements=[dict(
              statement=sentence, label=true, identifier=row['identifier'],
              group=row['identifier'].partition('-')[0])] if sentence else [],
          has_attributes=True)


def _objects(slots, k):
  objects = []
  for slot, items in enumerate(slots):
    for o in items:
      x, y = (values.number(o[key], key) for key in ('x_loc', 'y_loc'))
      size, x = values.integer(o['size'], 'size'), _SLOT * slot + x
      if not (0 <= x <= _WIDTH - size and 0 <= y <= _HEIGHT - size):
        raise ValueError(f'an object at {x}, {y} is outside of the image')
      objects.append(dict(
          bbox=base.stored_box((x, y, x + size, y + size), _HEIGHT, _WIDTH),
          label=values.text(o['type'], 'type'),
          attributes=[_COLOURS[o['color'].lower()], _SIZES[size]],
          is_crowd=False, area=float(size * size),
          id=k * 100 + len(objects) + 1))
  return objects


def _row(row):
  """The fields of an example that are used; raises where one is wrong."""
  _objects(row['structured_rep'], 0)
  values.text(row['sentence'], 'sentence')
  values.flag(row['label'], 'label')
  return dict(
      {k: values.text(str(row[k]), k) for k in ('identifier', 'directory')},
      **{k: row[k] for k in ('sentence', 'label', 'structured_rep')})
