"""Turns the official files of a dataset into records that training reads.

  python -m e2e_vlp_jax.prepare scenes --data_dir data
  python -m e2e_vlp_jax.prepare coco --source DIR --data_dir data

Writes data/NAME/1.0.0: TFDS ArrayRecord shards, an index a split, and
prepare_report.json: images, texts, boxes, what was skipped and why, and
checksums. Run again, it says that all is there; interrupted, it starts anew.
"""
import hashlib
import importlib
import json
import os
import shutil
import sys
import time

import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax.data import records

_DATASETS = os.path.join(os.path.dirname(__file__), 'data', 'datasets')


def main(argv=None):
  argv = list(sys.argv[1:] if argv is None else argv)
  names = sorted(f[:-3] for f in os.listdir(_DATASETS)
                 if f.endswith('.py') and f not in ('__init__.py', 'base.py'))
  # Which options there are depends on the dataset, so its name comes first.
  name = next((a for a in argv if not a.startswith('-')), None)
  if name not in names and not {'-h', '--help'} & set(argv):
    raise errors.UserError(f'prepare {name or "needs a dataset"}: no such '
                           'dataset' + errors.nearest(name, names))
  p = cli.parser(__doc__)
  p.add_argument('name', choices=names)
  p.add_argument('--data_dir', required=True, help='where to write')
  p.add_argument('--source', help='folder of the official files')
  options = {}
  if name in names:
    module = importlib.import_module(f'e2e_vlp_jax.data.datasets.{name}')
    options = module.Builder.OPTIONS
  for option, (default, text) in options.items():
    if isinstance(default, bool):
      p.add_argument(f'--{option}', action='store_true', help=text)
    else:
      p.add_argument(f'--{option}', type=type(default), default=default,
                     help=f'{text} (default {default})')
  args, _ = cli.parse(p, argv)
  prepare(module.Builder, args.data_dir, args.source,
          {k: getattr(args, k) for k in options})


def prepare(builder_class, data_dir, source, options):
  """Writes one dataset unless it is there already; returns its report."""
  name = builder_class.name
  folder = records.dataset_folder(data_dir, name)
  wanted = dict(options, source=source and os.path.abspath(source))
  path = os.path.join(folder, records.REPORT)
  if os.path.exists(path):
    with open(path, encoding='utf-8') as f:
      report = json.load(f)
    if report['options'] != wanted:
      differ = next(k for k in wanted if report['options'].get(k) != wanted[k])
      raise errors.UserError(
          f'{folder} was prepared with {differ}='
          f'{report["options"].get(differ)!r}, not {wanted[differ]!r}; remove '
          'it or choose another --data_dir')
    print(f'{folder} is prepared already')
    return report
  # The report is written last: without it, whatever lies here is half done.
  parent = os.path.dirname(folder)
  try:
    shutil.rmtree(parent, ignore_errors=True)
    os.makedirs(parent)
  except OSError as e:
    raise errors.UserError(f'--data_dir {data_dir!r}: {e}') from e
  start = time.time()
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top
  tfds.disable_progress_bar()
  builder = builder_class(data_dir=data_dir, source=source, **options)
  builder.download_and_prepare()
  for split, index in builder.indexes.items():
    np.savez(os.path.join(folder, f'{split}.index.npz'), **index)
  report = dict(name=name, options=wanted, seconds=round(time.time() - start, 1),
                splits=builder.reports,
                source_sha256={f: _sha256(f)
                               for f in builder.annotation_files()})
  with open(path + '.part', 'w', encoding='utf-8') as f:
    json.dump(report, f, indent=2)
  os.replace(path + '.part', path)
  _print(report, folder)
  return report


def _print(report, folder):
  for split, r in report['splits'].items():
    print(f'{report["name"]} {split}: {r["images"]} images, {r["texts"]} '
          f'texts, {r["boxes"]} boxes; records sha256 '
          f'{r["records_sha256"][:16]}')
    for reason, s in r['skipped'].items():
      some = ', '.join(s['names'][:5]) + (', ...' if s['count'] > 5 else '')
      print(f'  skipped {s["count"]}: {reason} ({some})')
  for f, digest in report['source_sha256'].items():
    print(f'  {f}: sha256 {digest[:16]}')
  print(f'{folder}: {report["seconds"]} s; all of this in {records.REPORT}')


def _sha256(path):
  digest = hashlib.sha256()
  with open(path, 'rb') as f:
    while block := f.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


if __name__ == '__main__':
  with errors.exit_on_user_error():
    main()
