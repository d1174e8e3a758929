"""FIBER's fine-grained checkpoints: there and back, and refusals."""
import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

from e2e_vlp_jax.training import checkpoint
from tests import parity
from tests.test_convert import refused, run, save

REPO = pathlib.Path(__file__).resolve().parent.parent
# The reference's sizes.
SIZES = {'model.swin.width': 8, 'model.swin.heads': '(1,2,4,8)',
         'model.swin.window': 4, 'model.roberta.width': 48,
         'model.roberta.heads': 4, 'model.roberta.ffn': 96,
         'model.roberta.positions': 40, 'model.head.width': 32,
         'model.head.blocks': 2, 'model.remat': 'none', 'dtype': 'float32',
         'data.tokenizer.kind': 'wordpiece', 'data.buckets': '((64,96),)',
         'data.max_text': 12}
SURPLUS = (r'.*relative_position_index|.*position_ids|rpn\.head\.cls_logits\..*'
           r'|rpn\.anchor_generator\..*')


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'v.txt'
  path.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
                             *(f'w{i}' for i in range(95))]))
  return str(path)


def options(vocabulary, output, variant, **changes):
  """Command line of a config."""
  changes = {**SIZES, 'data.tokenizer.path': vocabulary, **changes}
  return ['--format', 'fiber_fine', '--output', output, '--config',
          f'{REPO}/configs/fiber_fine.py:base,fusion={variant},data=coco'] + [
              f'--config.{k}={v}' for k, v in changes.items()]


@pytest.fixture(scope='module')
def tensors(shared):
  """{variant: {published name: array}}, all that a checkpoint holds."""
  folder, out = shared / 'reference' / 'fiber_fine', {}
  for variant in ('v2', 'v3'):
    with np.load(folder / f'tiny_end_to_end_fusion_{variant}.npz') as f:
      out[variant] = {**out.get('v2', {}),
                      **{k.removeprefix('param/'): f[k] for k in f.files
                         if k.startswith('param/')}}
  return out


@pytest.mark.parametrize('variant, prefix', [('v2', ''), ('v3', 'module.')])
def test_there_and_back_is_equal_to_the_bit(variant, prefix, tensors,
                                            vocabulary, tmp_path, capsys):
  a = {prefix + k: x for k, x in tensors[variant].items()}
  path = save(tmp_path / 'a.safetensors', a)
  run('--input', path, *options(vocabulary, tmp_path / 'ckpt', variant))
  out = capsys.readouterr().out
  assert 'unknown' not in out and 'missing' not in out
  run('--export', '--input', tmp_path / 'ckpt', '--output',
      tmp_path / 'back.safetensors')
  b = safetensors.numpy.load_file(tmp_path / 'back.safetensors')
  record = json.loads((tmp_path / 'ckpt/conversion.json').read_text())
  # Every tensor of the file comes back, or is accounted for.
  assert set(a) == set(b) | set(record['surplus'])
  assert not set(b) & set(record['surplus']) and not record['missing']
  for key in record['surplus']:
    assert re.fullmatch(SURPLUS, key.removeprefix(prefix)), key
  for key, x in b.items():
    assert x.dtype == a[key].dtype and x.tobytes() == a[key].tobytes(), key
  params = parity.flat(checkpoint.load(str(tmp_path / 'ckpt'))[0])
  norms = [k for k in params if '/cross/norm/' in k]
  assert len(norms) == (12 if variant == 'v3' else 0)


@pytest.mark.parametrize('changes, fits', [
    ({}, r'model\.swin\.fusion is v2, the file has v3.*'
     r'--config\.model\.swin\.fusion=v3'),
    ({'model.swin.fusion': 'v3', 'model.swin.window': 6},
     r'window is 6, the file has 4.*--config\.model\.swin\.window=4'),
    ({'model.swin.fusion': 'v3', 'model.head.blocks': 6},
     r'blocks is 6, the file has 2.*--config\.model\.head\.blocks=2'),
    ({'model.swin.fusion': 'v3', 'model.head.width': 64},
     r'--config\.model\.head\.width=32')])
def test_of_another_kind(changes, fits, tensors, vocabulary, tmp_path, capsys):
  path = save(tmp_path / 'a.safetensors', tensors['v3'])
  error = refused(capsys, '--input', path, *options(
      vocabulary, tmp_path / 'ckpt', 'v2', **changes))
  assert re.search(fits, error), error


def test_a_file_without_a_block(tensors, vocabulary, tmp_path, capsys):
  lost = 'rpn.head.dyhead_tower.1.offset.bias'
  path = save(tmp_path / 'a.safetensors', {
      k: x for k, x in tensors['v2'].items() if k != lost})
  error = refused(capsys, '--input', path, *options(
      vocabulary, tmp_path / 'ckpt', 'v2'))
  assert 'not whole: it lacks' in error and lost in error
