"""Turns the official files of a dataset into records that training reads.

  python -m e2e_vlp_jax.prepare scenes --data_dir data
  python -m e2e_vlp_jax.prepare coco --source DIR --data_dir data

Writes data/NAME/1.0.0: TFDS ArrayRecord shards, one index per split, the
names of the objects (labels.json), and prepare_report.json, with counts of
images, texts and boxes, what was skipped and why, and checksums. A second run finds the data and stops. After an
interruption it starts over.
"""
import contextlib
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time

import numpy as np
import tensorflow_datasets as tfds

from e2e_vlp_jax import cli
from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.data import records

_DATASETS = 'e2e_vlp_jax.data.datasets'


def main(argv=None):
  argv = list(sys.argv[1:] if argv is None else argv)
  names = _names()
  p = cli.parser(__doc__)
  p.add_argument('dataset', metavar='NAME', help=', '.join(names))
  p.add_argument('--data_dir', required=True, help='where to write')
  p.add_argument('--source', help='folder of the official files')
  plain = [a for a in argv if a not in ('-h', '--help')]
  if plain:
    # The options depend on the dataset.
    builder = discovery.load(
        _DATASETS, p.parse_known_args(plain + ['--data_dir', ''])[0].dataset,
        'Builder', 'prepare NAME')
    for option, (default, text) in builder.OPTIONS.items():
      if isinstance(default, bool):
        p.add_argument(f'--{option}', action='store_true', help=text)
      else:
        p.add_argument(f'--{option}', type=type(default), default=default,
                       help=f'{text} (default {default!r})')
  args, _ = cli.parse(p, argv)
  prepare(builder, args.data_dir, args.source,
          {k: getattr(args, k) for k in builder.OPTIONS})


def _names():
  return discovery.names(_DATASETS, 'Builder')


def prepare(builder_class, data_dir, source, options):
  """Writes one dataset unless it exists already; returns its report."""
  name = options.get('name', builder_class.name)
  others = set(_names()) - {builder_class.name}
  if not re.fullmatch('[a-z][a-z0-9_]*', name) or name in others:
    raise errors.UserError(
        f'name: {name!r}; expected small letters, digits and _, and not the '
        f'name of another dataset ({", ".join(sorted(others))})')
  folder = records.dataset_folder(data_dir, name)
  wanted = dict(options)
  if source:
    wanted['source'] = os.path.abspath(source)
  path = os.path.join(folder, records.REPORT)
  if os.path.exists(path):  # Written last, so it marks a finished folder.
    return _earlier_report(path, folder, wanted)
  _make_room(folder, data_dir)
  start = time.time()
  tfds.disable_progress_bar()  # Our builders have their own.
  builder = builder_class(data_dir=data_dir, source=source, **options)
  print(f'preparing {name} in {folder}')
  # Hide TFDS's messages about downloads; we download nothing.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  for split, index in builder.indexes.items():
    np.savez(os.path.join(folder, f'{split}.index.npz'), **index)
  space = builder.label_space()
  if space:
    files.write_json(os.path.join(folder, records.LABELS), space.to_dict())
  report = dict(name=name, options=wanted,
                seconds=round(time.time() - start, 1), splits=builder.reports,
                source_sha256={f: _sha256(f)
                               for f in builder.annotation_files()})
  files.write_json(path, report)
  _print(report, folder)
  return report


def _earlier_report(path, folder, wanted):
  """The report of an earlier run with the same options; else UserError."""
  with open(path, encoding='utf-8') as f:
    report = json.load(f)
  for k, v in wanted.items():
    if report['options'].get(k) != v:
      raise errors.UserError(
          f'{folder} was prepared with {k}={report["options"].get(k)!r}, '
          f'not {v!r}; remove it or choose another --data_dir')
  print(f'{folder} is prepared already')
  return report


def _make_room(folder, data_dir):
  """Removes leftovers of an interrupted run; checks that we may write."""
  parent = os.path.dirname(folder)
  half_done = [folder, *glob.glob(os.path.join(glob.escape(parent),
                                               'incomplete.*'))]
  try:
    os.makedirs(parent, exist_ok=True)
    for path in filter(os.path.exists, half_done):
      print(f'removing {path}, which was interrupted')
      shutil.rmtree(path)
    if not os.access(parent, os.W_OK):
      raise PermissionError(f'{parent} is not writable')
  except OSError as e:
    raise errors.UserError(f'--data_dir {data_dir!r}: {e}') from e


def _print(report, folder):
  for split, r in report['splits'].items():
    print(f'{report["name"]} {split}: {r["images"]} images, {r["texts"]} '
          f'texts, {r["boxes"]} boxes; records sha256 '
          f'{r["records_sha256"][:16]}')
    for reason, s in r['skipped'].items():
      some = ', '.join(s['names'][:5]) + (', ...' if s['count'] > 5 else '')
      print(f'  skipped {s["count"]}: {reason} ({some})')
    for what, count in r['changed'].items():
      print(f'  changed {count}: {what}')
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
