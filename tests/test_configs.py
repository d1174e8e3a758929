"""Configs: every key is read, old names hold, any task can be fine-tuned."""
import ast
import contextlib
import json
import pathlib
import re
import tarfile

import ml_collections
import pytest

import configs.recipes
from configs import common
from e2e_vlp_jax import cli
from e2e_vlp_jax import errors
from e2e_vlp_jax.evaluation import evaluators as evaluators_lib
from e2e_vlp_jax import models
from e2e_vlp_jax import train
import e2e_vlp_jax.tasks
from e2e_vlp_jax.data import pipeline
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import tokenizer
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import old_names
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import stages
from e2e_vlp_jax.training import workdir as workdir_lib

REPO = pathlib.Path(__file__).resolve().parent.parent
PINS = pathlib.Path(__file__).parent / 'data' / 'pins'

# --- Every key is read -------------------------------------------------------
# Read while a run is under way, which `build` does not do.
UNDER_WAY = (r'(total|log_every|eval_every|max_bad)_steps|tensorboard|'
             r'init_from|early_stop\.\w+|profile\.\w+|checkpoint\.\w+|'
             r'samples\..+|'
             r'evals\.\w+\.(max_examples|examples_during_training)|'
             r'evals\.(retrieval|class_prompts)\.options\.\w+|data\.pp_eval|'
             r'model\.beam_search')
# Of the text side, which DETR leaves off (model.use_text=true turns it on);
# and a checkpoint's model keeps its options, whatever is trained next.
UNUSED = {'e2e_vlp.py:detr': r'model\.(max_text|text_pool|text_types)',
          'finetune.py:guess,system=soho': r'model\..+'}
SMALL = {'model.encoder_layers': 1, 'model.decoder_layers': 1,
         'model.fused_layers': 1, 'model.roberta.depth': 1,
         'model.head.blocks': 1}


@contextlib.contextmanager
def recorded(config):
  """The set of dotted keys of `config` that are read meanwhile."""
  reads, paths, quiet = set(), {}, []
  kept = []  # so that no id is used twice

  def enter(node, path):
    kept.append(node)
    paths[id(node)] = path
    for key in node.keys():
      child = node._fields[key]  # pylint: disable=protected-access
      if isinstance(child, ml_collections.ConfigDict):
        enter(child, f'{path}{key}.')
  enter(config, '')
  plain, frozen = (ml_collections.ConfigDict, ml_collections.FrozenConfigDict)
  get, freeze, as_dict = plain.__getitem__, frozen.__init__, plain.to_dict

  def getitem(self, key):
    if id(self) in paths and not quiet:
      reads.add(paths[id(self)] + str(key))
    return get(self, key)

  def init(self, initial_dictionary=None, **kwargs):
    quiet.append(1)
    freeze(self, initial_dictionary, **kwargs)
    if id(initial_dictionary) in paths:
      enter(self, paths[id(initial_dictionary)])
    quiet.pop()

  def to_dict(self, *args, **kwargs):
    quiet.append(1)
    out = as_dict(self, *args, **kwargs)
    quiet.pop()
    return out
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plain, '__getitem__', getitem)
    patch.setattr(frozen, '__init__', init)
    patch.setattr(plain, 'to_dict', to_dict)
    yield reads


def build(config, workdir):
  """All that a run makes of its config before the first step."""
  mesh = sharding.make_mesh(config.mesh)
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  pipeline.Pipeline(
      config.data, vocabularies=vocabularies, sources=config.data.train,
      pp=config.data.pp_train, seed=config.seed, batch_size=config.batch_size,
      train=True)
  workdir_lib.open_workdir(str(workdir), config)
  model = models.build(config, **vocabularies.sizes)
  assembly = assemble.Assembly(config, model, mesh, synthetic.synthetic_batch(
      config.data, batch_size=1, **vocabularies.sizes))
  for number, stage in enumerate(assembly.stages):
    assembly.schedule(stage)(0)
    assembly.step(number)
  evaluators = evaluators_lib.Evaluators(config, model, vocabularies, mesh)
  evaluators.check_metric('checkpoint.best', config.checkpoint.best)


@pytest.mark.parametrize('spec', [
    'e2e_vlp.py:tiny', 'e2e_vlp.py:r50', 'e2e_vlp.py:detr', 'soho.py:tiny',
    'soho.py:r18', 'fiber.py:tiny', 'fiber.py:base', 'fiber_fine.py:tiny',
    'fiber_fine.py:base', 'finetune.py:guess,system=soho'])
def test_every_key_is_read(spec, tiny_scenes, tmp_path, toy_task):
  config = cli.load_config(f'configs/{spec}')
  source = dict(name='scenes', split='test')
  config.data.dir = str(tiny_scenes)
  config.data.train = (dict(source, weight=1.),)
  for options in (*config.evals.values(), config.samples):
    options.source = source
  config.batch_size = config.eval_batch_size = 8
  if 'warm_start' in config:
    config.warm_start.steps = 1
  flat = old_names.flatten(config.to_dict())
  config.update_from_flattened_dict(
      {k: v for k, v in SMALL.items() if k in flat})
  if spec in ('fiber.py:base', 'fiber_fine.py:base'):
    config.model.swin.depths = (1, 1, 1, 1)
  with recorded(config) as reads:
    build(config, tmp_path)
  unread = {key for key, value in flat.items()
            if key not in reads and value != {}
            and not re.fullmatch(
                f'{UNDER_WAY}|{UNUSED.get(spec, "none")}', key)}
  assert not unread


def test_keys_of_a_run_are_read():
  """Those that only a run reads stand in the package's code."""
  words = set()
  for file in (REPO / 'e2e_vlp_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Attribute):
        words.add(node.attr)
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        words.add(node.value)
      elif isinstance(node, ast.arg):
        words.add(node.arg)
  for spec in ('e2e_vlp.py', 'soho.py', 'fiber.py', 'fiber_fine.py'):
    flat = old_names.flatten(cli.load_config(f'configs/{spec}').to_dict())
    for key in flat:
      if re.fullmatch(UNDER_WAY, key):
        assert key.rpartition('.')[2] in words, key


# --- Arguments ---------------------------------------------------------------
@pytest.mark.parametrize('arg, parts', [
    ('tinny', ["'tinny'", "'tiny'"]), ('tiny,dat=coco', ["'dat'", "'data'"]),
    ('tiny,side=large', ['side', "'large'", 'whole number']),
    ('tiny,data=my set', ["'my set'", 'prepared dataset']),
    ('tiny,data=mine,coco', ["'coco'", "joined by '+'"])])
def test_arguments_that_cannot_be(arg, parts):
  with pytest.raises(ValueError) as e:
    common.parse_argument(arg, ('tiny', 'r50'), 'coco+vg')
  assert all(part in str(e.value) for part in parts)


# --- Stages ------------------------------------------------------------------
def test_a_warm_start_has_its_own_schedule_alone():
  config = cli.load_config('configs/soho.py:tiny')
  first, second = stages.stages(config)
  assert first.schedule.learning_rate == 2e-3 and first.end == 800
  assert second.schedule.learning_rate == 8e-4 and second.end == 4000
  config.warm_start.schedule = dict(config.warm_start.schedule, b1=.5)
  with pytest.raises(errors.UserError, match=r'warm_start\.schedule\.b1'):
    stages.stages(config)


# --- Old names ---------------------------------------------------------------
@pytest.mark.parametrize('spec, old, text, new, value', [
    ('e2e_vlp.py:tiny', 'model.heads', '2', 'model.attention_heads', 2),
    ('e2e_vlp.py:tiny', 'model.text', 'false', 'model.use_text', False),
    ('e2e_vlp.py:tiny', 'evals.itm.training_examples', '7',
     'evals.itm.examples_during_training', 7),
    ('e2e_vlp.py:tiny', 'samples.pp', 'decode|fit', 'data.pp_eval',
     'decode|fit'),
    ('e2e_vlp.py:tiny', 'objectives.cells', '1', 'objectives.grid_classes',
     1.),
    ('e2e_vlp.py:tiny', 'objective_options.cells.nothing', '.5',
     'objective_options.grid_classes.background_weight', .5),
    ('e2e_vlp.py:tiny', 'warm_start.optim.learning_rate', '1',
     'warm_start.schedule.learning_rate', 1.),
    ('e2e_vlp.py:tiny', 'optim.groups', "(('.*', dict(lr=2., wd=0.)),)",
     None, None),
    ('e2e_vlp.py:tiny', 'optim.groups', "(('.*', {'lr': 2., 'wd': 0.}),)",
     'optim.groups', (('.*', {'lr_multiplier': 2., 'weight_decay': 0.}),)),
    ('e2e_vlp.py:tiny', 'data.train',
     "({'name': 'a', 'split': 'b', 'weight': 'texts'},)", 'data.train',
     ({'name': 'a', 'split': 'b', 'weight': 'by_texts'},)),
    ('fiber.py:tiny', 'model.text.scratch', 'false',
     'model.roberta.from_scratch', False),
    ('fiber.py:tiny', 'model.text.width', '16', 'model.roberta.width', 16),
    ('fiber.py:tiny', 'model.fuse', '1', 'model.fused_layers', 1),
    ('fiber.py:tiny', 'model.hardness', '1', 'model.negative_hardness', 1.),
    ('fiber.py:tiny', 'model.beam_rank', 'sum', 'model.beam_search',
     'standard'),
    # What was never read, or is said elsewhere, is refused.
    ('e2e_vlp.py:tiny', 'warm_start.optim.weight_decay', '0', None, None),
    ('e2e_vlp.py:r50', 'model.backbone.frozen_bn', 'false', None, None),
])
def test_old_names_on_the_command_line(spec, old, text, new, value):
  if new is None:
    with pytest.raises(errors.UserError, match=re.escape(old)):
      cli.load_config(f'configs/{spec}', [(old, text)])
    return
  config = cli.load_config(f'configs/{spec}', [(old, text)])
  for part in new.split('.'):
    config = config[part]
  assert config == value


def test_old_names_in_a_sweep(tmp_path):
  (tmp_path / 'old.py').write_text(
      'from configs.fiber import get_config\n'
      'def get_sweep(arg=None):\n  return [{"model.fuse": 1}]\n')
  run, = cli.load_sweep(str(tmp_path / 'old.py'))
  config = cli.load_config(str(tmp_path / 'old.py'), [
      (key, repr(value)) for key, value in run.items()])
  assert config.model.fused_layers == 1


def test_a_stored_key_that_nobody_knows(old_run):
  path = old_run('soho')
  meta = path / 'checkpoints' / '4' / 'meta' / 'metadata'
  for file in (meta, path / 'config.json'):
    held = json.loads(file.read_text())
    held.get('config', held)['model']['zoom'] = 2
    file.write_text(json.dumps(held))
  (path / 'metrics.jsonl').write_text('{}')
  config = cli.load_config('configs/soho.py:tiny')
  for call in (lambda: checkpoint.load(str(path)),
               lambda: workdir_lib.open_workdir(str(path), config)):
    with pytest.raises(errors.UserError, match="key 'model.zoom'"):
      call()
  # A newer config, too, cannot be compared with a key that this one lacks.
  new = old_names.modernise(json.loads(json.dumps(workdir_lib.to_dict(config))))
  new['model']['widht'] = 3
  (path / 'config.json').write_text(json.dumps(new))
  with pytest.raises(errors.UserError, match="model.widht.*'model.width'"):
    workdir_lib.open_workdir(str(path), config)


# --- Fine-tuning -------------------------------------------------------------
TASK = '''
from e2e_vlp_jax.tasks import base

class Task(base.Task):
  requests = {{'joint': ('itm',)}}
  in_samples = False
  finetuning = {finetuning}

  def outputs(self, outputs, batch):
    return outputs['joint']

  def result(self, predictor, arrays, size, texts):
    return base.Result(self.name, *size)
'''
FINETUNING = '''base.Finetuning(
    unit='image', objectives={{'{objective}': 1.}}, train_ops='text|mlm(.3)',
    eval_ops='text|mlm(.3)|itm(.5)', evaluator='mlm', metric='accuracy',
    data='coco', splits={{'scenes': ('train', 'test'),
                          'coco': ('train', 'validation')}}, {more})'''
RECIPES = '''
RECIPES = {('soho', 'scenes'): {'total_steps': 20, 'batch_size': 4,
                                'optim.learning_rate': 3e-4,
                                'optim.schedule': 'step',
                                'optim.decay_steps': (10,),
                                'optim.decay_factor': .5},
           ('fiber', 'published'): {'side': 576, 'data.max_text': 50}}
'''


@pytest.fixture
def toy_task(tmp_path_factory, monkeypatch):
  """New files only: `guess` with a recipe, `tell` that SOHO cannot, `rest`."""
  folder = tmp_path_factory.mktemp('toy')
  for name in ('tasks', 'recipes'):
    (folder / name).mkdir()
  write = lambda name, what: (folder / 'tasks' / f'{name}.py').write_text(
      TASK.format(finetuning=what))
  write('guess', FINETUNING.format(objective='mlm', more=''))
  write('tell', FINETUNING.format(objective='captioning', more=(
      "head=dict(kind='classifier', outputs=3), "
      "answers={'coco': 'yes_no'}")))
  write('rest', 'None')
  (folder / 'recipes' / 'guess.py').write_text(RECIPES)
  for package, name in ((e2e_vlp_jax.tasks, 'tasks'),
                        (configs.recipes, 'recipes')):
    monkeypatch.setattr(package, '__path__',
                        [*package.__path__, str(folder / name)])


@pytest.fixture
def old_run(tmp_path):
  """A function: system -> WORKDIR of the old code, stopped at step 4."""
  def unpack(system):
    with tarfile.open(PINS / f'run_{system}.tar.xz') as f:
      f.extractall(tmp_path / system, filter='data')
    return tmp_path / system
  return unpack


def finetune(arg, *overrides):
  return cli.load_config(f'configs/finetune.py:{arg}', overrides)


def test_a_checkpoint_is_fine_tuned(toy_task, old_run, tiny_scenes, tmp_path,
                                    monkeypatch):
  """An old one, whose vocabulary's files are gone."""
  path = old_run('soho')
  monkeypatch.setattr(tokenizer, 'load_tokenizer', None)
  config = finetune(f'guess,from={path}')
  assert config.model.width == 32 and config.model.name == 'soho'
  assert config.objectives.to_dict() == {'mlm': 1.}
  assert config.init_from == str(path) and 'warm_start' not in config
  assert config.data.pp_train == 'decode|fit|text|mlm(.3)'
  assert config.evals.mlm.pp == 'decode|fit|text|mlm(.3)|itm(.5)'
  assert config.evals.mlm.source.to_dict() == dict(name='scenes',
                                                   split='test')
  assert config.checkpoint.best == 'eval/mlm/accuracy'
  assert config.total_steps == 20 and config.optim.decay_steps == (10,)
  assert 'final_fraction' not in config.optim
  assert config.optim.warmup_steps == 2 and config.batch_size == 4

  config = finetune(f'guess,from={path}', ('total_steps', '2'),
                    ('data.dir', str(tiny_scenes)), ('samples.count', '0'),
                    ('evals.mlm.max_examples', '8'), ('tensorboard', 'false'),
                    ('optim.decay_steps', '(1,)'), ('mesh.tensor', '2'))
  metrics = train.train(config, str(tmp_path / 'w'))
  assert 'eval/mlm/accuracy' in metrics
  report = json.loads((tmp_path / 'w' / 'init_from.json').read_text())
  assert report['loaded'] and not report['missing']
  *_, meta = checkpoint.load(str(tmp_path / 'w'))
  assert meta['labels']['classes'] and meta['tokenizer']
  workdir_lib.open_workdir(str(tmp_path / 'w'), config)  # could be resumed
  config = finetune(f'guess,from={tmp_path / "w"}')  # and fine-tuned again
  assert config.data.vocabularies == str(tmp_path / 'w')


def test_from_scratch_and_on_another_dataset(toy_task, old_run):
  config = finetune('guess,system=fiber,size=base')
  assert config.data.train[0]['name'] == 'coco' and config.init_from is None
  assert config.data.buckets == ((576, 576),) and config.data.max_text == 50
  assert config.model.swin.window == 18
  assert config.data.pp_train == 'decode|squash|text|mlm(.3)'
  config = finetune('guess,system=fiber,size=base,side=384')
  assert config.model.swin.window == 12
  path = old_run('soho')
  config = finetune(f'guess,from={path},data=coco,side=480')
  assert config.data.train[0]['name'] == 'coco'
  assert config.data.pp_train == (
      'decode|fit((800, 480), "opencv")|text|mlm(.3)')
  assert config.total_steps == 20_000  # no published recipe


@pytest.mark.parametrize('arg, parts', [
    ('', ['no task', 'guess', 'tell']),
    ('gues,from=x', ["'gues'", "'guess'"]),
    ('guess', ['from=CHECKPOINT', 'system=NAME']),
    ('guess,from=FOLDER', ['FOLDER', 'none found']),
    ('guess,system=fibre', ["'fibre'", "'fiber'"]),
    ('guess,system=fiber,size=bas', ["'bas'", "'base'"]),
    ('guess,system=fiber,data=nlvr1', ["'nlvr1'", 'scenes']),
    ('guess,system=fiber,sid=3', ["'sid'", "'side'"]),
    ('rest,system=fiber', ['rest', 'cannot', 'guess', 'tell']),
    ('tell,system=soho', ["'tell'", "'captioning'", "'soho'", 'guess']),
    ('tell,system=e2e_vlp,data=coco', ['yes_no']),
])
def test_fine_tuning_that_cannot_be(toy_task, tmp_path, arg, parts):
  with pytest.raises(errors.UserError) as e:
    finetune(arg.replace('FOLDER', str(tmp_path)))
  message = str(e.value).replace(str(tmp_path), 'FOLDER')
  assert all(part in message for part in parts), message


def test_a_dataset_without_the_task_s_labels_is_refused():
  """Objects365 has classes and no phrases; a dataset of one's own may."""
  with pytest.raises(errors.UserError, match="'objects365' is not a dataset"):
    finetune('ground,system=fiber_fine,data=objects365')
  for name in ('grounding', 'mine'):
    config = finetune(f'ground,system=fiber_fine,data={name}')
    assert config.evals.grounding.source.split == 'validation'


@pytest.mark.parametrize('system, evaluator', [
    ('e2e_vlp', 'detection'), ('fiber_fine', 'class_prompts')])
def test_large_detection_data_bring_their_classes(system, evaluator):
  config = finetune(f'detect,system={system},data=lvis')
  assert config.evals[evaluator].source.split == 'minival'
  assert config.data.labels == 'prepared'
  assert finetune(f'detect,system={system},data=coco').data.labels == 'coco'
