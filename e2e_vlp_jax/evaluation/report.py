"""WORKDIR/report.html: a run's settings, curves and results on one page.

It is self-contained (pictures and curves are embedded) and made from those of
these files that exist: config.json, metrics.jsonl, eval.json, samples/*.png,
labels/*.png, details/*.
"""
import base64
import collections
import glob
import importlib
import io
import json
import os

import jinja2
import numpy as np
from PIL import Image

from e2e_vlp_jax import discovery
from e2e_vlp_jax import files
from e2e_vlp_jax.evaluation import details

_EVALUATORS, _MODELS = 'e2e_vlp_jax.evaluation', 'e2e_vlp_jax.models'
_POINTS = 300        # points of a curve; more are averaged
_LARGEST_PNG = 200_000  # bytes; larger pictures are embedded as JPEG
_COLOURS = ('#2563eb', '#e8590c', '#2f9e44', '#9c36b5')


def write_report(workdir):
  """Writes WORKDIR/report.html from the results so far; returns its path.

  Raises:
    UserError: the folder does not exist or cannot be written.
  """
  config = _read_json(os.path.join(workdir, 'config.json'))
  series = _read_metrics(os.path.join(workdir, 'metrics.jsonl'))
  warm = _dig(config, ('warm_start', 'steps')) or 0
  described = _dig(config, ('evals',)) or {}
  splits = {name: _dig(e, ('source', 'split')) or 'held out'
            for name, e in described.items()}
  # Without a config, an evaluator's name is taken for its type.
  kinds = {name: _dig(e, ('type',)) for name, e in described.items()}
  evals = _evals(series, _read_json(os.path.join(workdir, 'eval.json')))
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
      autoescape=True, trim_blocks=True, lstrip_blocks=True)
  html = environment.get_template('report.html.j2').render(
      name=os.path.basename(os.path.abspath(workdir)),
      facts=_facts(config, series),
      headlines=_headlines(evals, kinds),
      tables=_tables(evals, splits),
      curves=[('Held-out metrics', _eval_curves(series, splits, kinds)),
              ('Training', _curves(series, 'train/', warm)),
              ('Speed', _curves(series, 'perf/', 0))],
      samples=_pictures(workdir, 'samples'),
      labels=_pictures(workdir, 'labels'),
      details=_details(workdir),
      config=json.dumps(config, indent=1) if config else '')
  path = os.path.join(workdir, 'report.html')
  files.write(path, html)
  return path


def _read_json(path):
  """The dict of a file; {} if it is absent or half written."""
  try:
    with open(path, encoding='utf-8') as f:
      found = json.load(f)
    return found if isinstance(found, dict) else {}
  except (OSError, ValueError):
    return {}


def _read_metrics(path):
  """{name: {step: value}}; the last value written for a step counts."""
  series = collections.defaultdict(dict)
  if not os.path.exists(path):
    return series
  with open(path, encoding='utf-8') as f:
    for line in f:
      try:
        row = json.loads(line)
        step = int(row.pop('step'))
      except (ValueError, KeyError, AttributeError, TypeError):
        continue  # Not ours, or cut off by an interruption.
      for name, value in row.items():
        if isinstance(value, (int, float)) and np.isfinite(value):
          series[name][step] = float(value)
  return series


def _evals(series, written):
  """{'detection/AP50': (value, step)}: the newest of each metric."""
  found = {}
  for name, points in series.items():
    if name.startswith('eval/'):
      step = max(points)
      found[name[len('eval/'):]] = points[step], step
  for name, value in written.items():
    key = name[len('eval/'):]
    if name.startswith('eval/') and isinstance(value, (int, float)) and (
        written.get('step', 0) >= found.get(key, (0, -1))[1]):
      found[key] = float(value), written.get('step', 0)
  return found


def _shown(kind):
  """(HEADLINES, NO_CURVE) of an evaluator's file."""
  if kind not in discovery.names(_EVALUATORS, 'evaluate'):
    return {}, ()
  module = importlib.import_module(f'{_EVALUATORS}.{kind}')
  return getattr(module, 'HEADLINES', {}), getattr(module, 'NO_CURVE', ())


def _headlines(evals, kinds):
  """[(title, (value, step))]: the figures shown large at the top."""
  names = dict.fromkeys(key.partition('/')[0] for key in evals)
  found = []
  for name in [n for n in names if _base(n, names) == n]:
    kind = kinds.get(name) or name
    for metric, title in _shown(kind)[0].items():
      if f'{name}/{metric}' in evals:
        found.append((title if name == kind else f'{name}: {title}',
                      evals[f'{name}/{metric}']))
  return found


def _base(name, names):
  """'detection_unseen' -> 'detection', if that is an evaluator too."""
  return next((other for other in sorted(names, key=len)
               if name.startswith(other + '_')), name)


def _tables(evals, splits):
  """[(evaluator, step, columns, [(metric, [value or None])])]."""
  names = dict.fromkeys(key.partition('/')[0] for key in evals)
  groups = collections.defaultdict(list)
  for name in names:
    groups[_base(name, names)].append(name)
  tables = []
  for base, members in groups.items():
    metrics = dict.fromkeys(key.partition('/')[2] for name in members
                            for key in evals if key.startswith(name + '/'))
    rows = [(m, [evals.get(f'{name}/{m}', (None, 0))[0] for name in members])
            for m in metrics]
    step = max(evals[k][1] for k in evals if k.partition('/')[0] in members)
    tables.append((base, step, [splits.get(m, m) for m in members], rows))
  return tables


def _facts(config, series):
  """The run in short: [(name, text)]."""
  facts = []
  get = lambda *path: _dig(config, path)
  steps = [max(points) for name, points in series.items()
           if name.startswith('train/')]
  if steps or get('total_steps'):
    total = get('total_steps')
    facts.append(('steps', f'{max(steps, default=0):,}'
                  + (f' of {total:,}' if total else '')))
  if get('model', 'name'):
    facts.append(('model', _describe(get('model'))))
  if get('data', 'train'):
    facts.append(('trained on', _sources(get('data', 'train'))))
  if get('objectives'):
    facts.append(('objectives', ', '.join(
        f'{k} {v:g}' for k, v in get('objectives').items() if v)))
  for key in ('batch_size', 'seed', 'dtype'):
    if get(key) is not None:
      facts.append((key.replace('_', ' '), str(get(key))))
  if get('optim', 'learning_rate'):
    facts.append(('learning rate', f'{get("optim", "learning_rate"):g} '
                                   f'({get("optim", "schedule")})'))
  for key, title, form in (('perf/images_per_s', 'images/s', '{:,.0f}'),
                           ('perf/data_wait', 'waiting for data', '{:.0%}')):
    if series.get(key):
      facts.append((title, form.format(series[key][max(series[key])])))
  return facts


def _describe(model):
  """One line about `config.model`: the model file's own `describe`, if any."""
  name = model['name']
  if name in discovery.names(_MODELS, 'describe'):
    text = discovery.load(_MODELS, name, 'describe', 'model.name')(model)
    return f'{name}: {text}'
  return name + (f', width {model["width"]}' if 'width' in model else '')


def _sources(sources):
  """'coco/train x 2, scenes/train x by_rows': sources and their weights."""
  shown = []
  for source in sources:
    weight = source.get('weight', 1.)
    weight = weight if isinstance(weight, str) else f'{weight:g}'
    shown.append(f'{source["name"]}/{source["split"]}'
                 + (f' x {weight}' if len(sources) > 1 else ''))
  return ', '.join(shown)


def _dig(tree, path):
  for key in path:
    tree = tree.get(key) if isinstance(tree, dict) else None
  return tree


def _eval_curves(series, splits, kinds):
  """[(title, image)] of the metrics; an evaluator's splits share an axis."""
  names = dict.fromkeys(k.split('/')[1] for k in series
                        if k.startswith('eval/'))
  plots = collections.defaultdict(dict)
  for key, points in series.items():
    if not key.startswith('eval/'):
      continue
    _, name, metric = key.split('/', 2)
    if metric not in _shown(kinds.get(name) or name)[1]:
      title = f'{_base(name, names)}/{metric}'
      plots[title][splits.get(name, name)] = points
  return [(title, _plot(lines, marker='o', zero=True))
          for title, lines in plots.items() if any(
              len(p) > 1 for p in lines.values())]


def _curves(series, prefix, stage):
  """[(title, image)] of all metrics that start with `prefix`."""
  return [(name[len(prefix):], _plot({'': points}, stage=stage))
          for name, points in series.items()
          if name.startswith(prefix) and len(points) > 1
          and any(points.values())]


def _plot(lines, marker=None, stage=0, zero=False):
  """A small chart as a data URI.

  Args:
    lines: {label: {step: value}}.
    marker: of the points.
    stage: a step to mark with a vertical line, 0 = none.
    zero: the axis starts at 0.
  """
  # Not pyplot: it keeps figures and chooses a display.
  from matplotlib import figure, rc_context  # pylint: disable=g-import-not-at-top
  with rc_context({'svg.fonttype': 'none', 'font.size': 9,
                   'font.family': 'sans-serif', 'axes.edgecolor': '#adb5bd',
                   'xtick.color': '#495057', 'ytick.color': '#495057'}):
    fig = figure.Figure(figsize=(3.4, 2.0), layout='constrained')
    ax = fig.add_subplot()
    for (label, points), colour in zip(lines.items(), _COLOURS):
      steps, values = _thin(points)
      ax.plot(steps, values, color=colour, linewidth=1.4, marker=marker,
              markersize=3.5, label=label)
    if stage and stage < max(max(p) for p in lines.values()):
      ax.axvline(stage, color='#adb5bd', linewidth=1, linestyle=':')
    if zero:
      ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    if len(lines) > 1:
      ax.legend(frameon=False, fontsize=8)
    ax.grid(True, color='#f1f3f5')
    ax.spines[['top', 'right']].set_visible(False)
    ax.locator_params(nbins=4)
    out = io.StringIO()
    fig.savefig(out, format='svg')
  return _data_uri('image/svg+xml', out.getvalue().encode())


def _thin(points):
  """Sorted (steps, values) of {step: value}, at most _POINTS of them."""
  steps = np.array(sorted(points))
  values = np.array([points[s] for s in steps])
  if len(steps) <= _POINTS:
    return steps, values
  parts = np.array_split(np.arange(len(steps)), _POINTS)
  return (np.array([steps[p].mean() for p in parts]),
          np.array([values[p].mean() for p in parts]))


def _pictures(workdir, folder):
  """[(name, data URI)] of the PNGs in a folder of WORKDIR."""
  return [_embed(path) for path in sorted(glob.glob(os.path.join(
      glob.escape(workdir), folder, '*.png')))]


def _details(workdir):
  """What evaluators show besides numbers, with pictures as data URIs."""
  found = []
  for name, step, sections in details.read(workdir):
    for section in sections:
      found.append({**section, 'evaluator': name, 'step': step, 'charts': [
          (title, _data_uri('image/svg+xml', svg.encode()))
          for title, svg in section['charts']], 'pictures': [
              (title, _embed(path)[1]) for title, path in section['pictures']
              if os.path.exists(path)]})
  return found


def _embed(path):
  """A sample picture as (name, data URI)."""
  with open(path, 'rb') as f:
    data, kind = f.read(), 'image/png'
  if len(data) > _LARGEST_PNG:
    out, kind = io.BytesIO(), 'image/jpeg'
    Image.open(io.BytesIO(data)).convert('RGB').save(out, 'JPEG', quality=88)
    data = out.getvalue()
  return os.path.splitext(os.path.basename(path))[0], _data_uri(kind, data)


def _data_uri(kind, data):
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'
