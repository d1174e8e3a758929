"""Reads and writes weights files.

Supports safetensors, and torch's .bin, .pth, .pt and .ckpt, whole or in shards
(shards.py). The latter are pickles, which may contain code. torch reads them
with `weights_only`, which accepts only tensors and plain containers and runs
no code.
"""
import contextlib
import json
import os
import pickle
import re

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from e2e_vlp_jax import errors
from e2e_vlp_jax.weights import shards

TORCH = ('.bin', '.pth', '.pt', '.ckpt')
_ENDINGS = ('.safetensors',) + TORCH
# bfloat16 exists in numpy because ml_dtypes registers it.
FLOATS = {str(np.dtype(t)): np.dtype(t)
          for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
# Keys of dicts around the tensors of a set.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'module', 'params',
             'shadow')


def find(path):
  """The file that `path`, a file or a folder, stands for; see `shards`."""
  return shards.find(path, _ENDINGS)


def read(path):
  """All tensors of a weights file or of an index's shards.

  Args:
    path: from `find`.

  Returns:
    {name of a set: {tensor name: array of the file's dtype}}; see sets.py.
    The name is '' if the file holds tensors and nothing else.

  Raises:
    UserError: not a weights file, a damaged file, a pickle that contains code,
      or a torch file while torch is not installed.
  """
  if path.endswith(shards.INDEX):
    return {'': shards.read(path, _read_shard)}
  kind = os.path.splitext(path)[1]
  if kind == '.safetensors':
    return {'': _read_safetensors(path)}
  if kind in TORCH:
    return _read_torch(path)
  raise errors.UserError(
      f'--input: {path!r} is not known as a weights file; expected a folder, '
      f'or a name that ends in {", ".join(_ENDINGS)} or {shards.INDEX}')


def _read_shard(path):
  found = read(path)
  if list(found) != ['']:
    raise errors.UserError(f'--input: {path!r} is no shard: it holds dicts of '
                           'tensors, ' + ', '.join(found))
  return found['']


def _read_safetensors(path):
  try:
    with safetensors.safe_open(path, 'np') as f:
      return {name: f.get_tensor(name) for name in f.keys()}
  except (safetensors.SafetensorError, OSError, TypeError, ValueError) as e:
    raise errors.UserError(
        f'--input: {path!r} is not a complete safetensors file ({e})') from e


def _read_torch(path):
  """{name of a set: {tensor name: array}} of a torch file."""
  try:
    import torch  # pylint: disable=g-import-not-at-top
  except ImportError as e:
    raise errors.UserError(
        f'--input: {path!r} is a torch file and torch is not installed; '
        'install the extra [torch], or use the .safetensors of the same '
        'weights') from e
  try:
    tree = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as e:
    raise errors.UserError(
        f'--input: {path!r} is refused and nothing in it was run: '
        + _why_refused(path, torch, e)) from e
  except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError,
          TypeError, AttributeError, UnicodeDecodeError) as e:
    raise errors.UserError(f'--input: {path!r} is not a complete torch file '
                           f'({type(e).__name__}: {_first_line(e)})') from e
  found = dict(_sets(tree, torch))
  if not found:
    raise errors.UserError(f'--input: {path!r} does not hold a dict of '
                           'tensors by name' + _odd_one(tree, torch))
  return {name: {k: _array(v.detach(), torch) for k, v in tensors.items()}
          for name, tensors in found.items()}


def _sets(tree, torch, name=''):
  """Yields (name, dict of tensors): dicts in the dicts of training scripts."""
  if not isinstance(tree, dict) or not tree:
    return
  if all(isinstance(k, str) and torch.is_tensor(v) for k, v in tree.items()):
    yield name, tree
    return
  for key, node in tree.items():
    if isinstance(key, str) and (not name or key in _WRAPPERS):
      yield from _sets(node, torch, f'{name}.{key}' if name else key)


def _odd_one(tree, torch):
  """Names what else is among the tensors of the largest dict, or ''."""
  nodes = [tree, *tree.values()] if isinstance(tree, dict) else []
  nodes = [n for n in nodes if isinstance(n, dict)]
  tensors = lambda n: sum(map(torch.is_tensor, n.values()))
  largest = max(nodes, key=tensors, default={})
  if not tensors(largest):
    return ''
  key, odd = next((k, v) for k, v in largest.items()
                  if not (isinstance(k, str) and torch.is_tensor(v)))
  return (f': {tensors(largest)} tensors, but also {key!r}, '
          f'{type(odd).__name__}')


def _why_refused(path, torch, error):
  """What is not plain in a torch file: names all its other classes."""
  classes = set(re.findall(r'GLOBAL (\S+)', str(error)))
  with contextlib.suppress(Exception):  # It reads only torch's zip files.
    classes |= set(
        torch.serialization.get_unsafe_globals_in_checkpoint(path))
  if classes:  # A name from the file might hold anything.
    names = sorted(re.sub(r'[^\w.]', '?', name) for name in classes)
    return (f'besides tensors it holds {", ".join(names)}; expected a file of '
            'tensors alone, such as torch.save(model.state_dict(), ...) '
            'writes, or .safetensors of the same weights')
  text = ' '.join(str(error).rpartition('error: ')[2].split())
  return ('it is not a file of plain tensors '
          f'({text.partition(". Please")[0][:200]})')


def _array(tensor, torch):
  if tensor.dtype == torch.bfloat16:  # numpy() does not support bfloat16
    return tensor.float().numpy().astype(ml_dtypes.bfloat16)
  return tensor.numpy()


def _first_line(e):
  return str(e).strip().split('\n')[0][:200]


def read_config(path):
  """Hugging Face's config.json in the folder of a weights file, or {}."""
  file = os.path.join(os.path.dirname(os.path.abspath(path)), 'config.json')
  try:
    with open(file, encoding='utf-8') as f:
      found = json.load(f)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as e:
    raise errors.UserError(f'{file}, beside --input, cannot be read: {e}'
                           ) from e
  return found if isinstance(found, dict) else {}


def write(path, tensors):
  """Writes a safetensors file, whole or not at all."""
  # 'pt' tells transformers that the layouts are torch's.
  tensors = {k: np.asarray(v, order='C') for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, path + '.tmp', {'format': 'pt'})
  os.replace(path + '.tmp', path)
