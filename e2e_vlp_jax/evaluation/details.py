"""What an evaluator shows besides its numbers: tables, charts and pictures.

An evaluator that has an argument `details` gets a list and appends `Section`s.
They are kept in WORKDIR/details, from where the report takes them.
"""
import dataclasses
import glob
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from e2e_vlp_jax import files

FOLDER = 'details'


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the report with a heading.

  Attributes:
    title: the heading.
    note: one or two sentences below it.
    columns, rows: of a table; rows are lists of strings.
    charts: [(name, SVG as text)].
    pictures: [(name, PIL image)].
  """
  title: str
  note: str = ''
  columns: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  charts: Sequence[tuple[str, str]] = ()
  pictures: Sequence[tuple[str, Any]] = ()


def figure(draw, size=(3.4, 2.6)):
  """A chart as SVG text.

  Args:
    draw: function that draws on a matplotlib Axes.
    size: width and height in inches.
  """
  # Not pyplot: it keeps figures and chooses a display.
  from matplotlib import figure as figures, rc_context  # pylint: disable=g-import-not-at-top
  # A fixed salt gives equal charts equal bytes.
  with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'e2e',
                   'font.size': 9,
                   'font.family': 'sans-serif', 'axes.edgecolor': '#adb5bd',
                   'xtick.color': '#495057', 'ytick.color': '#495057'}):
    fig = figures.Figure(figsize=size, layout='constrained')
    draw(fig.add_subplot())
    out = io.StringIO()
    fig.savefig(out, format='svg', metadata={'Date': None})
  return out.getvalue()


def write(workdir, step, found):
  """Writes an evaluation's sections over those of an earlier one.

  Args:
    workdir: folder of the run or of the evaluation.
    step: step of the evaluated checkpoint.
    found: {name of an evaluator: [Section]}.
  """
  folder = os.path.join(workdir, FOLDER)
  for name, sections in found.items():
    os.makedirs(folder, exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(folder), f'{name}_*.png')):
      os.remove(path)
    kept = []
    for i, section in enumerate(sections):
      pictures = []
      for k, (title, image) in enumerate(section.pictures):
        file = f'{name}_{i}_{k:02d}.png'
        image.save(os.path.join(folder, file))
        pictures.append((title, file))
      kept.append({**{f: getattr(section, f) for f in (
          'title', 'note', 'columns', 'rows', 'charts')},
                   'pictures': pictures})
    files.write_json(os.path.join(folder, f'{name}.json'),
                     {'step': int(step), 'sections': kept})


def read(workdir):
  """[(evaluator, step, [dict of a Section's fields])] of the files there are.

  Pictures are [name, path].
  """
  found = []
  folder = os.path.join(workdir, FOLDER)
  for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.json'))):
    try:
      with open(path, encoding='utf-8') as f:
        held = json.load(f)
      sections = [{**s, 'pictures': [
          (title, os.path.join(folder, os.path.basename(file)))
          for title, file in s['pictures']]} for s in held['sections']]
      found.append((os.path.basename(path).removesuffix('.json'),
                    held['step'], sections))
    except (OSError, ValueError, KeyError, TypeError):
      continue  # Not ours, or half written.
  return found
