"""Reads and writes weights files: {tensor name: array}.

Supports safetensors, and torch's .bin, .pth, .pt and .ckpt. The latter are
pickles, which may contain code. torch reads them with `weights_only`, which
accepts only tensors and plain containers and runs no code.
"""
import json
import os
import pickle

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from e2e_vlp_jax import errors

TORCH = ('.bin', '.pth', '.pt', '.ckpt')
# bfloat16 exists in numpy because ml_dtypes registers it.
FLOATS = {str(np.dtype(t)): np.dtype(t)
          for t in (np.float32, np.float16, ml_dtypes.bfloat16)}


def read(path):
  """All tensors of a weights file, with the file's dtypes.

  Raises:
    UserError: no such file, not a weights file, a damaged file, a pickle that
      contains code, or a torch file while torch is not installed.
  """
  if not os.path.isfile(path):
    inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
    near = [f for f in inside if f.endswith(('.safetensors',) + TORCH)]
    raise errors.UserError(
        f'--input: no file {path!r}'
        + (f'; a folder, with {", ".join(near)} in it' if near else ''))
  kind = os.path.splitext(path)[1]
  if kind == '.safetensors':
    return _read_safetensors(path)
  if kind in TORCH:
    return _read_torch(path)
  raise errors.UserError(
      f'--input: {path!r} is not known as a weights file; expected a name '
      f'that ends in .safetensors, {", ".join(TORCH)}')


def _read_safetensors(path):
  try:
    with safetensors.safe_open(path, 'np') as f:
      return {name: f.get_tensor(name) for name in f.keys()}
  except (safetensors.SafetensorError, OSError, TypeError, ValueError) as e:
    raise errors.UserError(
        f'--input: {path!r} is not a complete safetensors file ({e})') from e


def _read_torch(path):
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
        f'--input: {path!r} is refused and nothing in it was run: it is not '
        f'a file of plain tensors ({_first_line(e)})') from e
  except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError,
          TypeError, AttributeError, UnicodeDecodeError) as e:
    raise errors.UserError(f'--input: {path!r} is not a complete torch file '
                           f'({type(e).__name__}: {_first_line(e)})') from e
  # Training scripts wrap the tensors in a dict of their own.
  for key in ('state_dict', 'model'):
    if isinstance(tree, dict) and isinstance(tree.get(key), dict):
      tree = tree[key]
  if not isinstance(tree, dict) or not tree or not all(
      isinstance(k, str) and torch.is_tensor(v) for k, v in tree.items()):
    raise errors.UserError(f'--input: {path!r} does not hold a dict of '
                           'tensors by name')
  return {k: _array(v.detach(), torch) for k, v in tree.items()}


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
