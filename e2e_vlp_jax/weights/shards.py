"""Weights in several files: an index and its shards, as on model hubs.

The index, such as model.safetensors.index.json, says which tensor is in which
shard: {"weight_map": {tensor name: file name}}. All shards are in its folder.
"""
import json
import os
import re

from e2e_vlp_jax import errors

INDEX = '.index.json'
_SHARD = r'(.*)-\d+-of-(\d+)(\.\w+)'


def find(path, endings):
  """The weights file, or the index of several, that `path` stands for.

  Args:
    path: of a file, or of a folder with one model in it.
    endings: of weights files, the preferred one first.

  Raises:
    UserError: no such file, a folder with none or with several, or a single
      shard.
  """
  if '://' in path:
    raise errors.UserError(f'--input: {path!r}; weights files are read from '
                           'the file system, to which gcloud storage cp copies '
                           'them')
  if os.path.isdir(path):
    return _inside(path, endings)
  if not os.path.isfile(path):
    raise errors.UserError(f'--input: no file {path!r}')
  shard = re.fullmatch(_SHARD, os.path.basename(path))
  if shard:
    raise errors.UserError(
        f'--input: {path!r} is one of {int(shard[2])} shards; expected their '
        f'folder, or {shard[1]}{shard[3]}{INDEX} in it')
  return path


def _inside(folder, endings):
  try:
    names = sorted(os.listdir(folder))
  except OSError as e:
    raise errors.UserError(f'--input: {folder!r} cannot be read '
                           f'({e.strerror})') from e
  for ending in endings:
    found = [n for n in names if n.endswith(ending + INDEX)]
    whole = [n for n in names if n.endswith(ending)
             and not re.fullmatch(_SHARD, n)]
    if len(found + whole) == 1:
      return os.path.join(folder, (found + whole)[0])
    if found + whole:
      break
  near = [n for n in names if n.endswith(tuple(endings) + (INDEX,))]
  shards = near and all(re.fullmatch(_SHARD, n) for n in near)
  raise errors.UserError(
      f'--input: no file {folder!r}; a folder, with '
      + (', '.join(near) if near else 'no weights file') + ' in it'
      + (f', but no index (...{INDEX}) of these shards' if shards else ''))


def read(path, read_file):
  """All tensors of the shards of an index.

  Args:
    path: of the index.
    read_file: function path -> {tensor name: array} of one shard.

  Raises:
    UserError: not an index; shards are missing, or do not have the tensors
      that the index says, or two have the same tensor.
  """
  places = _weight_map(path)
  folder = os.path.dirname(os.path.abspath(path))
  shards = sorted(set(places.values()))
  missing = [s for s in shards if not os.path.isfile(os.path.join(folder, s))]
  if missing:
    raise errors.UserError(
        f'--input: {path!r} is not whole: {len(missing)} of {len(shards)} '
        'shards are not in its folder: ' + _some(missing))
  tensors, origin = {}, {}
  for shard in shards:
    found = read_file(os.path.join(folder, shard))
    lacking = [t for t, s in places.items() if s == shard and t not in found]
    if lacking:
      raise errors.UserError(f'--input: {os.path.join(folder, shard)!r} lacks '
                             f'tensors of its index: {_some(lacking)}')
    twice = [t for t in found if t in tensors]
    if twice:
      raise errors.UserError(
          f'--input: {path!r} has the tensor {twice[0]!r} twice, in '
          f'{origin[twice[0]]} and {shard}')
    tensors |= found
    origin |= dict.fromkeys(found, shard)
  return tensors


def _weight_map(path):
  """{tensor name: file name} of an index."""
  try:
    with open(path, encoding='utf-8') as f:
      places = json.load(f)['weight_map']
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    raise errors.UserError(f'--input: {path!r} is not an index with a '
                           f'weight_map ({type(e).__name__}: {e})') from e
  if not isinstance(places, dict) or not places or not all(
      isinstance(shard, str) for shard in places.values()):
    raise errors.UserError(f'--input: {path!r}: weight_map is not a table of '
                           'tensor names and file names')
  for shard in places.values():
    if os.path.basename(shard) != shard or shard in ('', '.', '..'):
      raise errors.UserError(f'--input: {path!r}: weight_map names the file '
                             f'{shard!r}; expected one in the same folder')
  return places


def _some(items):
  """The first three items and the number of others."""
  more = f' and {len(items) - 3} more' if len(items) > 3 else ''
  return ', '.join(items[:3]) + more
