"""Official ids of photographs: the same picture in several datasets.

COCO's photographs are also in VQA v2, in Karpathy's splits and, half of them,
in Visual Genome; nearly all come from Flickr. `prepare` stores the official
names of each record's photograph in the split's index, such as 'coco:139' or
'flickr:8024364858'. `config.data.exclude` names splits whose photographs no
training batch may show.
"""
import re

import numpy as np

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import records

COLUMN = 'photo_ids'  # of an index: names with spaces between them
_DATASETS = 'e2e_vlp_jax.data.datasets'
_ADDRESS = re.compile(r'/(\d+)_[0-9a-f]+(_\w+)?\.\w+$')


def in_flickr(address):
  """('flickr:8024364858',) of an image's address at Flickr, () of another."""
  found = _ADDRESS.search(address) if isinstance(address, str) else None
  return (f'flickr:{found[1]}',) if found else ()


def kept(data_dir, splits, exclude):
  """Which records of some splits may be used.

  Args:
    data_dir: folder of the prepared datasets.
    splits: list of `records.Split`.
    exclude: ('dataset/split', ...) whose photographs may not be used.

  Returns:
    ([bool [n]] of the splits, how many are left out, in words).

  Raises:
    UserError: `exclude` is not of that form, a split is not prepared or knows
      no photographs, or nothing is left of a split.
  """
  everything = [np.ones(len(s), bool) for s in splits]
  if not exclude:
    return everything, ''
  banned, names = set(), _names(exclude)
  for name in names:
    found = _ids(records.open_split(data_dir, *name.split('/')))
    if found is None:
      raise errors.UserError(f'data.exclude: {name} has no official ids of '
                             'photographs, by which others could be compared')
    banned.update(i for own in found for i in own)
  counts = []
  for split, mask in zip(splits, everything):
    found, name = _ids(split), f'{split.name}/{split.split}'
    if found is None:
      counts.append(f'{name}: no official ids to compare')
      continue
    mask[:] = [banned.isdisjoint(own) for own in found]
    if not mask.any():
      raise errors.UserError(f'data.exclude: {exclude!r} leaves no image of '
                             f'{name}, which data.train names')
    counts.append(f'{name}: {(~mask).sum():,} of {len(mask):,}')
  return everything, (f'images of {", ".join(names)} left out ('
                      + ', '.join(counts) + ')')


def _names(exclude):
  """`exclude` as a list of 'dataset/split'."""
  names = [exclude] if isinstance(exclude, str) else list(exclude)
  for name in names:
    if not isinstance(name, str) or not re.fullmatch(r'\w+/\w+', name):
      raise errors.UserError(f'data.exclude: {name!r}; expected the names of '
                             "prepared splits, such as ('karpathy/test',)")
  return names


def _ids(split):
  """[names of each record's photograph] of a split; None: it knows none.

  Raises:
    UserError: an earlier version prepared it, without the names.
  """
  if COLUMN in split.index:
    found = [ids.split() for ids in split.index[COLUMN].tolist()]
    return found if any(found) else None
  if split.name in discovery.names(_DATASETS, 'Builder') and discovery.load(
      _DATASETS, split.name, 'Builder', 'data').PHOTOS:
    raise errors.UserError(
        f'data.exclude: {split.name} was prepared by an earlier version, '
        'which did not keep the official ids of its photographs; remove its '
        'folder and prepare it again')
  return None
