"""Writes tests/data/parity_*.npz with transformers and the seeded weights.

  python -m tests.make_parity_data

Needs the extra [torch]. Of large arrays some random values are kept, and of
every gradient its largest magnitude.
"""
import numpy as np

from tests import parity
from tests import parity_torch


def write(name, results):
  kept = {}
  for key, x in results.items():
    gradient = key.startswith('grad/')
    count = 48 if gradient else 256
    kept[key] = x if x.size <= count else parity.pick(key, x, count)
    if gradient:
      kept['max/' + key] = np.abs(x).max()
  path = parity.DATA / f'parity_{name}.npz'
  np.savez_compressed(path, **kept)
  print(f'{path.name}: {len(kept)} arrays, {path.stat().st_size:,} bytes')


def main():
  parity.DATA.mkdir(exist_ok=True)
  for name, case in parity.DETR.items():
    model = parity_torch.detr(case)
    write(f'detr_{name}', parity_torch.detr_results(case, True, model))
    if name != 'published':
      write(f'detr_{name}_no_aux',
            parity_torch.detr_results(case, False, model))
      write(f'detr_{name}_alone', parity_torch.detr_alone(case))
  for depth in parity.RESNETS:
    write(f'resnet_{depth}', parity_torch.resnet_results(depth))
  for name, case in parity.BERT.items():
    write(f'bert_{name}', parity_torch.bert_results(case))


if __name__ == '__main__':
  main()
