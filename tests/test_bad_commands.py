"""What people type wrongly: exit code 2 and one line, from every command.

The table is the documentation of these lines. Files that are damaged have
tables of their own: checkpoints in test_damaged.py, weights in
test_weight_files.py.
"""
import importlib
import pathlib

from PIL import Image
import pytest

from tests import small_model

REPO = pathlib.Path(__file__).resolve().parent.parent
PREDICT = ['predict', '--checkpoint', '{run}', '--image', '{photo}', '--task']
EVALUATE = ['evaluate', '--checkpoint', '{run}', '--data_dir', '{folder}',
            '--workdir', '{folder}/out']
CONVERT = ['convert', '--format', 'hf_detr', '--config',
           'configs/e2e_vlp.py:detr', '--output', '{folder}/out', '--input']
EXPORT = ['convert', '--export', '--input', '{run}', '--output',
          '{folder}/x.safetensors', '--format']
TRAIN = ['train', '--config', 'tests/small_run.py:light', '--workdir',
         '{folder}/out', '--config.data.dir={data}']
OWN = ['train', '--workdir', '{folder}/out', '--config']

# [(arguments, what the line says)]
TABLE = [
    ([*PREDICT[:3], '--task', 'detect', '--image', '{folder}/empty.png'],
     "empty.png' is not an image"),
    ([*PREDICT[:3], '--task', 'detect', '--image', '{folder}/cut.png'],
     "cut.png' is not a readable image"),
    ([*PREDICT[:3], '--task', 'detect', '--image', '{folder}'],
     "no image file '{folder}'"),
    ([*PREDICT, 'detekt'], "--task: no task 'detekt'; did you mean 'detect'?"),
    ([*PREDICT, 'embed', '--text', 'a'], 'this checkpoint has no itc head'),
    # The task's head is trained by a command, which the line says.
    ([*PREDICT, 'answer', '--text', 'a ?'],
     "this checkpoint has no answer head, which task 'answer' needs; its "
     'tasks: caption, detect, match, retrieve; train it with: python -m '
     'e2e_vlp_jax.train --config configs/finetune.py:answer,from={run} '
     '--workdir W'),
    ([*EVALUATE, '--tasks', 'answer'],
     'train it with: python -m e2e_vlp_jax.train --config '
     'configs/finetune.py:answer,from={run} --workdir W'),
    ([*EVALUATE, '--tasks', 'embed'],
     "the config has no evaluator for 'embed'; it has captioning"),
    ([*PREDICT, 'detect', '--image', '{photo}', '--text', 'a'],
     "task 'detect' takes no text"),
    ([*PREDICT, 'match'], "task 'match' needs a text (--text)"),
    ([*PREDICT, 'match', '--text', ' '], "task 'match' needs a text"),
    ([*PREDICT, 'caption', '--text', 'a'], "task 'caption' takes no text"),
    ([*PREDICT, 'detect', '--threshold', 'nan'],
     '--threshold: nan; expected 0 to 1'),
    ([*PREDICT, 'detect', '--threshold', '2'],
     '--threshold: 2.0; expected 0 to 1'),
    ([*PREDICT, 'detect', '--threshold', 'x'],
     "argument --threshold: invalid float value: 'x'"),
    ([*PREDICT, 'caption', '--beams', '100000000'],
     '--beams: 100000000; expected 1 to 100'),
    ([*PREDICT, 'detect', '--beams', '2'],
     "--beams: task 'detect' has no such option"),
    ([*PREDICT, 'detect', '--json', '{folder}'],
     "--json: '{folder}' cannot be written (Is a directory)"),
    ([*PREDICT, 'detect', '--picture', '{folder}/o.txt'],
     'not a picture file; expected a name that ends in .png'),
    (['predict', '--image', '{photo}', '--task', 'detect', '--checkpoint',
      's3://bucket/run'], 'a path of the file system, or gs://BUCKET/NAME'),
    (['predict', '--image', '{photo}', '--task', 'detect', '--checkpoint',
      '{folder}'], "none found at '{folder}'; expected a WORKDIR"),
    ([*EVALUATE, '--limit', '0'], '--limit: 0; expected at least 1'),
    ([*EVALUATE, '--tasks', 'detectoin'],
     "no evaluator or task 'detectoin'; did you mean 'detection'?"),
    ([*EVALUATE[:3], '--workdir', '{folder}/out', '--data_dir', '{photo}'],
     "data.dir: no folder '{photo}'"),
    ([*CONVERT, '{folder}'], 'a folder, with no weights file in it'),
    ([*CONVERT, '{folder}/none.safetensors'], 'no file'),
    ([*CONVERT, '{photo}'], 'is not known as a weights file'),
    ([*EXPORT, 'hf_detr'], "another model than --format hf_detr describes: its "
     "config of e2e_vlp has no 'depth'"),
    ([*EXPORT, 'fiber_coarse'], "its config of e2e_vlp has no 'swin'"),
    ([*OWN, '{folder}/none.py'], "no config file '{folder}/none.py'"),
    ([*OWN, '{folder}/syntax.py'],
     "syntax.py: line 1: SyntaxError: '(' was never closed"),
    ([*OWN, '{folder}/raises.py:x'],
     'raises.py:x: line 3: ZeroDivisionError: division by zero'),
    ([*OWN, '{folder}/dict.py'],
     'get_config returned dict; expected a ConfigDict'),
    ([*OWN, '{folder}/empty.py'], "empty.py' has no function get_config"),
    ([*TRAIN, '--config.batch_sise=4'], "did you mean 'batch_size'"),
    ([*TRAIN, '--config.batch_size=four'], 'batch_size'),
    ([*TRAIN, '--config.batch_size=-4'], 'batch_size: -4'),
    ([*TRAIN, '--config.total_steps=0'], 'total_steps: 0'),
    ([*TRAIN, '--config.mesh.data=3'], 'mesh'),
    ([*TRAIN, '--config.log_every_steps=0'],
     'log_every_steps: 0; expected at least 1'),
    ([*TRAIN, '--config.accumulate=0'], 'accumulate: 0; expected at least 1'),
    ([*TRAIN, '--config.checkpoint.keep=-1'],
     'checkpoint.keep: -1; expected at least 0'),
    ([*TRAIN, '--config.optim.learning_rate=nan'],
     'optim.learning_rate: nan; expected a finite number'),
    ([*TRAIN, '--config.objectives.mlm=inf'],
     'objectives.mlm: inf; expected a finite number'),
    ([*TRAIN, '--config.model.width=0'], 'model.width: 0; expected at least'),
    ([*TRAIN, '--config.seed=99999999999999999999'], 'expected at most'),
    ([*TRAIN, '--config.dtype=flaot32'], "dtype: 'flaot32'; did you mean"),
    ([*TRAIN, '--config.data.sentences=0'], 'data.sentences: 0 is less than'),
    ([*TRAIN, '--config.init_from={folder}'], 'checkpoint: none found at'),
    (['sweep', '--config', 'tests/small_run.py', '--workdir', '{photo}'],
     'cannot be written'),
    (['sweep', '--config', 'tests/small_run.py', '--workdir', '{folder}/out',
      '--metric', 'x'], "--metric: 'x' belongs to no evaluator"),
]


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """{name in braces: path}."""
  folder = tmp_path_factory.mktemp('bad')
  Image.new('RGB', (9, 9)).save(folder / 'photo.png')
  photo = (folder / 'photo.png').read_bytes()
  for name, content in {
      'empty.png': b'', 'cut.png': photo[:45], 'empty.py': b'',
      'syntax.py': b'def get_config(\n',
      'raises.py': b'\ndef get_config(arg):\n  return 1 / 0\n',
      'dict.py': b'def get_config(arg=None):\n  return {}\n'}.items():
    (folder / name).write_bytes(content)
  run = small_model.save(tmp_path_factory.mktemp('run'),
                         small_model.get_config())
  return {'folder': str(folder), 'photo': str(folder / 'photo.png'),
          'run': run}


@pytest.mark.parametrize('arguments,says', TABLE,
                         ids=[f'{a[0]}-{a[-1]}' for a, _ in TABLE])
def test_one_line(arguments, says, places, tiny_scenes, capsys, monkeypatch):
  monkeypatch.chdir(REPO)
  places = {**places, 'data': str(tiny_scenes)}
  command, *rest = [a.format(**places) for a in arguments]
  main = importlib.import_module(f'e2e_vlp_jax.{command}').main
  with pytest.raises(SystemExit) as e:
    main(rest)
  error = capsys.readouterr().err
  assert e.value.code == 2
  assert error.startswith('error: ') and error.count('\n') == 1, error
  assert says.format(**places) in error
