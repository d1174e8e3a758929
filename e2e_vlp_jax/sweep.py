"""Trains one config several times with different values: a sweep.

  python -m e2e_vlp_jax.sweep --config configs/e2e_vlp.py:tiny --workdir W

The config file's `get_sweep(ARG)` returns one dict {config key: value} per
run; ARG is that of `get_config`. --config.a.b=value applies to all runs. Each
run trains in its own folder W/NAME, named after its values.

  --mode local  trains one run after the other. The same command skips finished
                runs and resumes interrupted ones. If a run fails, the others
                still run; it is named at the end (exit code 1).
  --mode slurm  writes W/sweep.sbatch, a job array with one task per run that
                works like launch/slurm.sbatch, and prints how to submit it.
  --mode print  prints the commands.
  --mode table  compares the runs so far.

`local` and `table` write W/sweep.json and W/sweep.html: values and latest
metrics of every run, the best by --metric first.
"""
import functools
import os
import re
import shlex
import sys
import zlib

import jinja2

from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax import runs as runs_lib
from e2e_vlp_jax.storage import bucket_lock
from e2e_vlp_jax.storage import paths
from e2e_vlp_jax.storage import staging

SLURM = os.path.join('launch', 'slurm.sbatch')
_LONGEST = 120  # characters of a run's name; file systems allow 255 bytes


def runs_of(spec, common, workdir):
  """The runs of a sweep, each with a valid config.

  Args:
    spec: 'path.py:ARG'.
    common: (key, text) pairs for all runs.
    workdir: folder of the sweep.

  Raises:
    UserError: an unknown key, a value of another type, two equal runs.
  """
  sweep = cli.load_sweep(spec)
  today = functools.partial(cli.current_key, cli.load_config(spec))
  out, seen = [], {}
  for number, overrides in enumerate(sweep, 1):
    sets = {today(key): value for key, value in overrides.items()}
    for key, _ in common:
      if today(key) in sets:
        raise errors.UserError(f'--config.{key}: the sweep itself sets it, to '
                               f'{sets[today(key)]!r} in run {number}')
    texts = [(key, runs_lib.text_of(value)) for key, value in overrides.items()]
    try:
      cli.load_config(spec, [*common, *texts])
    except errors.UserError as e:
      raise errors.UserError(f'get_sweep of {spec}, run {number}: {e}') from e
    name = _name(overrides, sweep)
    if name in seen:
      raise errors.UserError(f'get_sweep of {spec}: runs {seen[name]} and '
                             f'{number} have the same name {name!r}')
    seen[name] = number
    out.append(runs_lib.Run(name, os.path.join(workdir, name), spec,
                            (*common, *texts), overrides))
  return out


def _name(overrides, sweep):
  """'learning_rate=0.001,seed=1'; full keys where short ones are ambiguous."""
  keys = {key for run in sweep for key in run}
  last = lambda key: key.rpartition('.')[2]
  alone = lambda key: sum(last(k) == last(key) for k in keys) == 1
  name = ','.join(f'{last(k) if alone(k) else k}={runs_lib.text_of(v)}'
                  for k, v in overrides.items()) or 'base'
  plain = re.sub(r'[^-\w.=,+]+', '_', name, flags=re.ASCII)
  if plain != name or len(plain) > _LONGEST:  # A checksum keeps names unique.
    plain = f'{plain[:_LONGEST]}-{zlib.crc32(name.encode()):08x}'
  return plain


# --- The table --------------------------------------------------------------
def table(runs, metric=None):
  """[{'name', 'overrides', 'workdir', 'step', 'finished', 'metrics'}].

  `metrics` has the latest value of each eval/ metric and of the loss. The best
  row by `metric` comes first: the largest value, or the smallest loss.
  """
  rows = []
  for run in runs:
    step, metrics = run.metrics()
    rows.append({'name': run.name, 'overrides': run.overrides,
                 'workdir': run.workdir, 'step': step,
                 'finished': run.finished(), 'metrics': metrics})
  sign = 1 if metric and 'loss' in metric else -1
  return sorted(rows, key=lambda row: sign * row['metrics'][metric]
                if metric in row['metrics'] else float('inf'))


def write_table(workdir, spec, runs, metric=None):
  """Writes W/sweep.json and W/sweep.html; returns the rows of `table`."""
  rows = table(runs, metric)
  names = sorted({k for row in rows for k in row['metrics']},
                 key=lambda k: (k != metric, k))
  keys = list(dict.fromkeys(k for row in rows for k in row['overrides']))
  cells = [([row['name'],
             *(runs_lib.text_of(row['overrides'].get(k, '')) for k in keys),
             row['step'] if row['finished'] else f'{row["step"]}, not done',
             *(f'{row["metrics"][k]:.4f}' if k in row['metrics'] else ''
               for k in names)], f'{row["name"]}/report.html') for row in rows]
  files.write_json(os.path.join(workdir, 'sweep.json'),
                   {'config': spec, 'metric': metric, 'runs': rows})
  files.write(os.path.join(workdir, 'sweep.html'), _render(
      'sweep.html.j2', title=f'Sweep of {spec}', rows=cells,
      head=['run', *keys, 'step', *names]))
  return rows


def _render(template, **values):
  """A template of this folder; values are escaped in HTML alone."""
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
      autoescape=template.endswith('.html.j2'), keep_trailing_newline=True)
  return environment.get_template(template).render(**values)


def show(rows, metric):
  """Prints the rows: name, step, and `metric` or the first few metrics."""
  names = [metric] if metric else sorted(
      {k for row in rows for k in row['metrics']})[:4]
  cells = [['run', 'step', *names]] + [
      [row['name'], f'{row["step"]}{"" if row["finished"] else ", not done"}',
       *(f'{row["metrics"][k]:.4f}' if k in row['metrics'] else '-'
         for k in names)] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  for row in cells:
    print('  '.join(f'{cell:{w}}' for cell, w in zip(row, widths)).rstrip())


# --- The modes --------------------------------------------------------------
def write_slurm(runs, workdir):
  """Writes W/sweep.sbatch; returns the command that submits it."""
  if paths.in_bucket(workdir):
    raise errors.UserError(f'--mode slurm: --workdir {workdir}: sbatch reads '
                           'the job array from a folder that all nodes see')
  try:
    with open(SLURM, encoding='utf-8') as f:
      options = [line.rstrip() for line in f if line.startswith('#SBATCH')]
  except FileNotFoundError:
    raise errors.UserError(f'--mode slurm: no {SLURM} in {os.getcwd()!r}; run '
                           'it in the repository\'s root') from None
  path = os.path.join(workdir, 'sweep.sbatch')
  files.write(path, _render(
      'sweep.sbatch.j2', options=options, script=SLURM,
      here=shlex.quote(os.getcwd()),
      runs=[shlex.join(run.arguments) for run in runs]))
  return shlex.join(['sbatch', path])


def check_metric(metric, config):
  """UserError unless an evaluator of `config` can report this metric."""
  names = [f'eval/{name}/' for name in config.evals]
  if metric != 'train/loss' and not any(map(metric.startswith, names)):
    raise errors.UserError(
        f'--metric: {metric!r} belongs to no evaluator of the config'
        + (errors.nearest('/'.join(metric.split('/')[:2]) + '/', names)
           or f'; expected one that begins with {names[0]}'))


def _only_sweep(workdir):
  """Lets one `local` sweep at a time use a folder; a context manager."""
  if paths.in_bucket(workdir):
    return bucket_lock.lock(workdir, f'--workdir {workdir}')
  return files.lock(os.path.join(workdir, '.lock'), f'--workdir {workdir}')


def main(argv=None):
  with errors.exit_on_user_error():
    parser = cli.parser(__doc__, config='required', workdir=True)
    parser.add_argument('--mode', default='local',
                        choices=('local', 'slurm', 'print', 'table'))
    parser.add_argument('--metric', metavar='eval/NAME/METRIC',
                        help='metric by which the table is sorted')
    args, config = cli.parse(parser, argv)
    if args.metric:
      check_metric(args.metric, config)
    workdir = paths.absolute(args.workdir)
    runs = runs_of(args.config, args.overrides, workdir)
    code = 0
    if args.mode == 'print':
      for run in runs:
        print(shlex.join([*runs_lib.TRAIN, *run.arguments]))
    elif args.mode == 'slurm':
      print(write_slurm(runs, workdir))
    else:
      with staging.opened(workdir) as folder:
        collect = lambda: write_table(folder, args.config, runs, args.metric)
        collect()  # Fails early if the folder cannot be written.
        if args.mode == 'local':
          with _only_sweep(workdir):
            code = runs_lib.run_here(runs, lambda *_: collect())
        show(collect(), args.metric)
      print(f'written: {os.path.join(workdir, "sweep.html")}, sweep.json')
  sys.exit(code)


if __name__ == '__main__':
  main()
