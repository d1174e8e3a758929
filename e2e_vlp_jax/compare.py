"""Compares ways to train: arms, several seeds of each, one table and one plot.

  python -m e2e_vlp_jax.compare --study configs/studies/finetuning.py:e2e_vlp \\
      --workdir W

The study's file says what is compared: its `get_study(ARG)` returns a `Study`.
An arm is a chain of runs of `train`, such as pre-training and then fine-tuning
from it, and is repeated for every seed. --config.a.b=value applies to all runs.

  --mode local  trains what is not finished, one run after the other; the same
                command resumes.
  --mode print  prints the commands.
  --mode table  compares the runs so far.

`local` and `table` write W/study.json, W/study.html and W/study.png: of every
arm and measure the mean of the seeds and their range.
"""
import json
import os
import shlex
import sys

import jinja2
import numpy as np

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import runs as runs_lib
from e2e_vlp_jax import study as study_lib

_COLOURS = ('#1c7ed6', '#e8590c', '#2b8a3e', '#9c36b5', '#5f3dc4', '#e03131')


def runs_of(study, seeds, workdir, common=()):
  """{(arm, step, seed): Run}, in the order in which they run: seed by seed.

  Args:
    study: a Study.
    seeds: list of numbers.
    workdir: folder of the study.
    common: (key, text) pairs for all runs.

  Raises:
    UserError: the study names a step that is not there.
  """
  found = {}
  for seed in seeds:
    folders = {}
    for arm, steps in study.arms.items():
      for name, step in steps.items():
        here = {**folders, **{k.partition('/')[2]: v
                              for k, v in folders.items()
                              if k.partition('/')[0] == arm}}
        fill = lambda text, here=here, step=f'step {name!r} of {arm!r}': (
            _filled(text, here, step) if isinstance(text, str) else text)
        folder = os.path.join(workdir, _plain(arm), name, f'seed={seed}')
        folders[f'{arm}/{name}'] = folder
        found[arm, name, seed] = runs_lib.Run(
            f'{arm}, {name}, seed {seed}', folder, fill(step.spec),
            (('seed', str(seed)), *common,
             *((k, runs_lib.text_of(fill(v)))
               for k, v in step.overrides.items())))
  return found


def _filled(text, folders, step):
  """A text of a step, with the folders of earlier steps in it.

  Args:
    text: with `{name}` for a folder.
    folders: {name: folder} of those that come before.
    step: what an error calls the step.

  Raises:
    UserError: it names another step.
  """
  for name, folder in folders.items():
    text = text.replace('{' + name + '}', folder)
  if '{' in text:
    raise errors.UserError(
        f'--study: {step}: {text!r} names a step that does not come before '
        f'it; before it: {", ".join(folders) or "none"}')
  return text


def _plain(name):
  """`name` as a folder's name."""
  return '_'.join(''.join(c if c.isalnum() or c in '-+=' else ' '
                          for c in name).split())


# --- The table --------------------------------------------------------------
def rows_of(study, runs, seconds):
  """[{'arm', 'measures': {label: {'values', 'mean', 'least', 'most'}},
  'minutes'}].

  Only finished runs count. `minutes` is the mean of the time that the arm's
  runs took, over the seeds of which none was trained elsewhere, or None.

  Args:
    study: a Study.
    runs: from `runs_of`.
    seconds: {workdir of a run: seconds that it took here}.
  """
  rows = []
  for arm, steps in study.arms.items():
    done = {key: run for key, run in runs.items()
            if key[0] == arm and run.finished()}
    measures = {}
    for label, (step, metric) in study.measures.items():
      values = {seed: run.metrics()[1].get(metric)
                for (_, name, seed), run in done.items() if name == step}
      values = {s: v for s, v in values.items() if v is not None}
      if values:
        v = list(values.values())
        measures[label] = {'values': values, 'mean': float(np.mean(v)),
                           'least': min(v), 'most': max(v)}
    times = [sum(seconds.get(done[arm, name, seed].workdir, np.nan)
                 for name in steps)
             for seed in {seed for _, _, seed in done}
             if all((arm, name, seed) in done for name in steps)]
    times = [t for t in times if not np.isnan(t)]
    rows.append({'arm': arm, 'measures': measures,
                 'minutes': float(np.mean(times)) / 60 if times else None})
  return rows


def show(study, rows):
  """The table as text: 'mean (least-most)' of each measure."""
  cells = [['', *study.measures, 'minutes']]
  for row in rows:
    found = [row['measures'].get(label) for label in study.measures]
    cells.append([row['arm'], *map(_cell, found),
                  '-' if row['minutes'] is None else f'{row["minutes"]:.1f}'])
  widths = [max(map(len, column)) for column in zip(*cells)]
  return '\n'.join('  '.join(f'{c:{w}}' for c, w in zip(row, widths)).rstrip()
                   for row in cells)


def _cell(m):
  if m is None:
    return '-'
  if len(m['values']) == 1:
    return f'{m["mean"]:.3f}'
  return f'{m["mean"]:.3f} ({m["least"]:.3f}-{m["most"]:.3f})'


def plot(study, rows):
  """A matplotlib Figure: for each measure a row of arms, dots and ranges."""
  from matplotlib import figure  # pylint: disable=g-import-not-at-top
  labels = [l for l in study.measures
            if any(l in row['measures'] for row in rows)]
  arms = [row['arm'] for row in rows]
  fig = figure.Figure(figsize=(7, 1 + .45 * len(arms) * max(1, len(labels))),
                      layout='constrained')
  axes = np.ravel(fig.subplots(max(1, len(labels)), 1, squeeze=False))
  for ax, label in zip(axes, labels):
    for y, row in enumerate(rows):
      m, colour = row['measures'].get(label), _COLOURS[y % len(_COLOURS)]
      if m is not None:
        ax.hlines(y, m['least'], m['most'], color=colour, linewidth=6,
                  alpha=.25)
        ax.plot(list(m['values'].values()), [y] * len(m['values']), 'o',
                color=colour, markersize=4, alpha=.7)
        ax.plot(m['mean'], y, '|', color=colour, markersize=16,
                markeredgewidth=2)
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - .5, -.5)
    ax.set_title(label, fontsize=10, loc='left')
    ax.grid(True, axis='x', color='#f1f3f5')
    ax.spines[['top', 'right', 'left']].set_visible(False)
  return fig


def write(workdir, spec, study, runs):
  """Writes study.json, study.html and study.png; returns the rows."""
  seconds = _times(workdir)
  rows = rows_of(study, runs, seconds)
  files.write_json(os.path.join(workdir, 'study.json'), {
      'study': spec, 'title': study.title, 'measures': study.measures,
      'rows': rows, 'seconds': seconds,
      'unfinished': [r.name for r in runs.values() if not r.finished()]})
  plot(study, rows).savefig(os.path.join(workdir, 'study.png'), dpi=120)
  page = jinja2.Environment(
      loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
      autoescape=True).get_template('compare.html.j2')
  files.write(os.path.join(workdir, 'study.html'), page.render(
      title=study.title, head=['', *study.measures, 'minutes'],
      rows=[[row['arm'], *(_cell(row['measures'].get(l))
                           for l in study.measures),
             '-' if row['minutes'] is None else f'{row["minutes"]:.1f}']
            for row in rows],
      runs=[(run.name, os.path.relpath(run.workdir, workdir))
            for run in runs.values() if run.finished()]))
  return rows


def _times(workdir):
  """{workdir of a run: seconds} of all starts of this command."""
  try:
    with open(os.path.join(workdir, 'study.json'), encoding='utf-8') as f:
      return json.load(f)['seconds']
  except (OSError, ValueError, KeyError):
    return {}


def _add_time(workdir, run, seconds):
  path = os.path.join(workdir, 'study.json')
  times = _times(workdir)
  times[run.workdir] = times.get(run.workdir, 0.) + seconds
  files.write_json(path, {'seconds': times})


def load(spec):
  """The Study of 'path.py:ARG'.

  Raises:
    UserError: no such file or function, a bad argument, or no Study.
  """
  study = cli.call(spec, 'get_study', '--study', 'configs/studies')
  if not isinstance(study, study_lib.Study):
    raise errors.UserError(f'--study {spec}: get_study returned '
                           f'{type(study).__name__}; expected a Study')
  return study


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, workdir=True)
    parser.add_argument('--study', required=True, metavar='S.py:ARG',
                        help='file of the study, and its argument')
    parser.add_argument('--seeds', type=int, metavar='N',
                        help='number of seeds, 0 to N-1')
    parser.add_argument('--mode', default='local',
                        choices=('local', 'print', 'table'))
    args, _ = cli.parse(parser, argv)
    study = load(args.study)
    seeds = args.seeds if args.seeds is not None else study.seeds
    if seeds < 1:
      raise errors.UserError(f'--seeds: {seeds}; expected 1 or more')
    if '://' in args.workdir:
      raise errors.UserError(f'--workdir {args.workdir}: expected a folder of '
                             'the file system')
    workdir = os.path.abspath(args.workdir)
    if set(workdir) & set(',{}'):
      raise errors.UserError(f'--workdir {workdir}: a study\'s folder may not '
                             'contain , { or }')
    runs = runs_of(study, range(seeds), workdir, args.overrides)
    if args.mode == 'print':
      for run in runs.values():
        print(shlex.join([*runs_lib.TRAIN, *run.arguments]))
      return
    code = 0
    files.check_folder('--workdir', workdir)
    if args.mode == 'local':
      def after(run, seconds):
        _add_time(workdir, run, seconds)
        write(workdir, args.study, study, runs)
      with files.lock(os.path.join(workdir, '.lock'), f'--workdir {workdir}'):
        code = runs_lib.run_here(runs.values(), after)
    print(show(study, write(workdir, args.study, study, runs)))
    print(f'written: {os.path.join(workdir, "study.html")}, study.json, '
          'study.png')
  sys.exit(code)


if __name__ == '__main__':
  main()
