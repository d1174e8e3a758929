"""Turns the official files of a dataset into records that training reads.

  python -m e2e_vlp_jax.prepare scenes --data_dir data
  python -m e2e_vlp_jax.prepare coco --source DIR --data_dir data

Writes data/NAME/1.0.0: TFDS ArrayRecord shards, one index per split, the names
of the objects (labels.json), and prepare_report.json, with counts of images,
texts and boxes, what was skipped and why, and checksums. A second run finds the
data and stops. After an interruption it starts over. One process at a time
prepares a dataset in a folder; another ends and says which.

A split that loses all of its boxes, or more than half of its images, is an
error that names the most frequent reason, and nothing is written. With
--allow_losses the images that are left are written, and a warning on standard
error is the last line.

--show N draws N records with their boxes, labels and texts on one page, and
what was changed or left out. Of a dataset that is prepared already it needs
the name alone:

  python -m e2e_vlp_jax.prepare coco --data_dir data --show 12
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
from e2e_vlp_jax.storage import paths

_DATASETS = 'e2e_vlp_jax.data.datasets'


def main(argv=None):
  argv = list(sys.argv[1:] if argv is None else argv)
  names = _names()
  p = _parser(names)
  if _show_alone(argv, names):
    return
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
  if args.show < 0:
    raise errors.UserError(f'--show {args.show}: expected a number of records')
  paths.check_local('--data_dir', args.data_dir)
  options = {k: getattr(args, k) for k in builder.OPTIONS}
  prepare(builder, args.data_dir, args.source, options, args.allow_losses)
  if args.show:
    _show(args, options.get('name', builder.name))


def _parser(names):
  """The arguments of all datasets."""
  p = cli.parser(__doc__)
  p.add_argument('dataset', metavar='NAME', help=', '.join(names))
  p.add_argument('--data_dir', required=True, help='where to write')
  p.add_argument('--source', help='folder of the official files')
  p.add_argument('--allow_losses', action='store_true',
                 help='write a split even if less than half of its images can '
                 'be used')
  p.add_argument('--show', type=int, metavar='N', default=0,
                 help='draw N records on one page')
  p.add_argument('--show_to', metavar='PNG',
                 help="path of that page; default: in the dataset's folder")
  return p


def _show_alone(argv, names):
  """Whether --show was all that was asked; then it is done.

  The dataset is prepared already, and the command gives its name alone.
  """
  given = {w.partition('=')[0] for w in argv if w.startswith('--')}
  if '--show' not in given or not given <= {'--show', '--show_to', '--name',
                                            '--data_dir'}:
    return False
  p = _parser(names)
  p.add_argument('--name')
  args, _ = cli.parse(p, argv)
  name = args.name or args.dataset
  if args.show < 1 or args.dataset in names and not records.is_prepared(
      args.data_dir, name):
    return False
  _show(args, name)
  return True


def _show(args, name):
  from e2e_vlp_jax.evaluation import records_page  # pylint: disable=g-import-not-at-top
  path = records_page.write_page(args.data_dir, name, args.show, args.show_to)
  _say(f'{args.show} records of {name}: {path}')


def _names():
  return discovery.names(_DATASETS, 'Builder')


def prepare(builder_class, data_dir, source, options, allow_losses=False):
  """Writes one dataset unless it exists already; returns its report.

  Args:
    builder_class: a `datasets.base.RecordBuilder`.
    data_dir: where to write.
    source: folder of the official files, or None.
    options: the values of the builder's OPTIONS.
    allow_losses: see `datasets.base.RecordBuilder`.

  Raises:
    UserError: the files cannot be used, another process is at it, or the
      dataset is there with other options.
  """
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
  if report := _earlier_report(folder, wanted):
    return report
  parent = os.path.dirname(folder)
  files.check_folder('--data_dir', parent)
  with files.lock(os.path.join(parent, '.prepare.lock'), parent):
    # Another process may have finished just now.
    report = _earlier_report(folder, wanted)
    if not report:
      _remove_leftovers(folder, data_dir)
      builder = builder_class(data_dir=data_dir, source=source,
                              allow_losses=allow_losses, **options)
      report = _write(builder, folder, wanted)
  return report


def _write(builder, folder, wanted):
  """Writes the records, the indexes and the report, in this order."""
  start = time.time()
  tfds.disable_progress_bar()  # Our builders have their own.
  _say(f'preparing {builder.name} in {folder}')
  # Hide TFDS's messages about downloads; we download nothing.
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  for split, index in builder.indexes.items():
    np.savez(os.path.join(folder, f'{split}.index.npz'), **index)
  space = builder.label_space()
  if space:
    files.write_json(os.path.join(folder, records.LABELS), space.to_dict())
  files.write_json(os.path.join(folder, records.CHANGES), builder.changes)
  for file, content in builder.side_files().items():
    files.write_json(os.path.join(folder, file), content)
  report = dict(name=builder.name, options=wanted,
                seconds=round(time.time() - start, 1), splits=builder.reports,
                source_sha256={f: _sha256(f)
                               for f in builder.annotation_files()})
  # Written last, so it marks a finished folder.
  files.write_json(os.path.join(folder, records.REPORT), report)
  _print(report, folder)
  return report


def _earlier_report(folder, wanted):
  """The report of an earlier run, or None if there was none that finished.

  Raises:
    UserError: it had other options, or its report cannot be read.
  """
  path = os.path.join(folder, records.REPORT)
  try:
    with open(path, encoding='utf-8') as f:
      report = json.load(f)
    options = dict(report['options'])
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.UserError(f'{path} cannot be read ({type(e).__name__}: {e}); '
                           f'remove {folder} to prepare it again') from e
  for k, v in wanted.items():
    # An option that is newer than the folder had its default value there.
    if k in options and options[k] != v or k not in options and v:
      raise errors.UserError(
          f'{folder} was prepared with {k}={options.get(k)!r}, '
          f'not {v!r}; remove it or choose another --data_dir')
  _say(f'{folder} is prepared already')
  return report


def _remove_leftovers(folder, data_dir):
  """Removes what an interrupted run left; nobody else is at it."""
  parent = os.path.dirname(folder)
  half_done = [folder, *glob.glob(os.path.join(glob.escape(parent),
                                               'incomplete.*'))]
  try:
    for path in filter(os.path.exists, half_done):
      _say(f'removing {path}, which was interrupted')
      shutil.rmtree(path)
  except OSError as e:
    raise errors.UserError(f'--data_dir {data_dir!r}: {e}') from e


def _print(report, folder):
  """Says what was written, left out and changed."""
  for split, r in report['splits'].items():
    crowds = (f', of which {r["crowds"]} crowds, which training leaves out'
              if r['crowds'] else '')
    more = ''.join(f', {r[k]} {k} with boxes'
                   for k in ('phrases', 'expressions') if r.get(k))
    _say(f'{report["name"]} {split}: {r["images"]} images, {r["texts"]} '
         f'texts, {r["boxes"]} boxes{crowds}{more}; records sha256 '
         f'{r["records_sha256"][:16]}')
    for reason, s in r['skipped'].items():
      some = ', '.join(s['names'][:5]) + (', ...' if s['count'] > 5 else '')
      _say(f'  skipped {s["count"]}: {reason} ({some})')
    for what, count in r['changed'].items():
      _say(f'  changed {count}: {what}')
    if r['turned']:
      others = (f', as {r["drawn_upright"]} others were'
                if r['drawn_upright'] else '')
      _say(f'  turned {r["turned"]}: boxes turned with their pictures (EXIF); '
           f'if they were drawn on upright pictures{others}, use --upright')
  for f, digest in report['source_sha256'].items():
    _say(f'  {f}: sha256 {digest[:16]}')
  _say(f'{folder}: {report["seconds"]} s; all of this in {records.REPORT}')
  for split, r in report['splits'].items():
    for what in r['warnings']:
      _say(f'warning: {report["name"]} {split}: {what}', sys.stderr)


def _say(text, stream=None):
  """Prints a line, whatever characters the stream can hold."""
  stream = stream or sys.stdout
  encoding = getattr(stream, 'encoding', None) or 'utf-8'
  print(text.encode(encoding, 'backslashreplace').decode(encoding),
        file=stream)


def _sha256(path):
  digest = hashlib.sha256()
  with open(path, 'rb') as f:
    while block := f.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


if __name__ == '__main__':
  with errors.exit_on_user_error():
    main()
