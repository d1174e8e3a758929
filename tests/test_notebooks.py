"""The notebooks run from top to bottom, and are kept without outputs."""
import pathlib

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')

REPO = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / 'notebooks').glob('*.ipynb'))
SMALL = {
    'model.width': 32, 'model.ffn': 48, 'model.backbone.stem': 8,
    'model.backbone.width': 16, 'model.backbone.blocks': 1,
    'model.num_queries': 8, 'batch_size': 8, 'eval_batch_size': 8,
    'total_steps': 4, 'warm_start.steps': 2, 'eval_every_steps': 0,
    'log_every_steps': 1, 'samples.count': 2, 'tensorboard': False,
    **{f'evals.{name}.max_examples': 8 for name in (
        'detection', 'detection_unseen', 'captioning', 'captioning_unseen',
        'itm', 'itm_unseen', 'mlm', 'mlm_unseen')}}


def run(name, **parameters):
  """Runs a notebook with other values in its cell tagged `parameters`."""
  notebook = nbformat.read(REPO / 'notebooks' / f'{name}.ipynb', 4)
  cell, = [c for c in notebook.cells
           if 'parameters' in c.metadata.get('tags', [])]
  for key in parameters:
    assert key in cell.source, f'{name} has no parameter {key}'
  cell.source += ''.join(f'\n{k} = {v!r}' for k, v in parameters.items())
  nbclient.NotebookClient(
      notebook, timeout=600, kernel_name='python3',
      resources={'metadata': {'path': REPO / 'notebooks'}}).execute()
  return notebook


def pictures_of(notebook):
  return [o for c in notebook.cells if c.cell_type == 'code'
          for o in c.outputs if 'image/png' in o.get('data', {})]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_kept_without_outputs(path):
  for cell in nbformat.read(path, 4).cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
def test_notebooks_run(tmp_path):
  """One trains a very small model, the other looks at what came out."""
  data, workdir = str(tmp_path / 'data'), str(tmp_path / 'run')
  overrides = [(k, str(v)) for k, v in SMALL.items()]
  notebook = run('pretrain_quickstart', DATA_DIR=data, WORKDIR=workdir,
                 NUM_TRAIN=64, NUM_HELD_OUT=16, OVERRIDES=overrides)
  assert len(pictures_of(notebook)) == 2
  notebook = run('evaluate_checkpoint', DATA_DIR=data, CHECKPOINT=workdir,
                 MAX_EXAMPLES=8)
  assert len(pictures_of(notebook)) == 3
