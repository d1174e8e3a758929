"""Does pre-training help? Fine-tuning from it against training from scratch.

  python -m e2e_vlp_jax.compare --workdir W \
      --study configs/studies/finetuning.py:SYSTEM

Argument: SYSTEM, then key=value
  tasks   tasks joined by '+', by default answer
  from    a finished pre-training for all seeds; without it every seed
          pre-trains `tiny` anew
  steps   steps of each fine-tuning, by default 1000; both arms have the same

All of it on `scenes` with `tiny` models, minutes a run on 2 cores.
"""
import importlib

from configs import common
from e2e_vlp_jax import study
from e2e_vlp_jax.tasks import base


def get_study(arg=None):
  system, *pairs = (arg or 'e2e_vlp').split(',')
  options = common.parse_options(
      pairs, {'tasks': str, 'from': str, 'steps': int})
  tasks = options.get('tasks', 'answer').split('+')
  steps, given = options.get('steps', 1000), options.get('from')

  def finetune(task, start):
    return study.Step(f'configs/finetune.py:{task},{start}', {
        'total_steps': steps, 'eval_every_steps': steps})
  before = {} if given else {
      'pretrain': study.Step(f'configs/{system}.py:tiny')}
  return study.Study(
      title=f'{system}: fine-tuning from pre-training and from scratch',
      arms={
          'pre-trained': {**before, **{
              task: finetune(task, f'from={given or "{pretrain}"}')
              for task in tasks}},
          'from scratch': {
              task: finetune(task, f'system={system},size=tiny')
              for task in tasks}},
      measures={task: (task, measure(task)) for task in tasks})


def measure(task):
  """The metric of a task: 'eval/EVALUATOR/METRIC'."""
  how = base.load(task, 'tasks').finetuning
  if how is None:
    raise ValueError(f'task {task!r} cannot be fine-tuned')
  return f'eval/{how.evaluator}/{how.metric}'


def of_pretraining(title, system, arms, arg, *, steps, tune=1000,
                   tasks='answer', share_warm_start=True, measures=None):
  """A Study of ways to pre-train, each followed by the same fine-tunings.

  Args:
    title: of the study.
    system: whose `tiny` is pre-trained on `scenes`.
    arms: {name: {config key: value}} by which the pre-trainings differ.
    arg: the study's argument, key=value: steps, tune (steps of each
      fine-tuning), tasks joined by '+'.
    steps: of pre-training, including its warm start, if arg does not say.
    tune, tasks: likewise.
    share_warm_start: trains it once for all arms.
    measures: {label: metric} of the pre-training itself. Without any, its own
      evaluation is of one example.
  """
  options = common.parse_options(
      arg.split(',') if arg else [], {'steps': int, 'tune': int, 'tasks': str})
  steps, tune = options.get('steps', steps), options.get('tune', tune)
  tasks = options.get('tasks', tasks).split('+')
  spec, measures = f'configs/{system}.py:tiny', measures or {}
  config = importlib.import_module(f'configs.{system}').get_config('tiny')
  ours = {'eval_every_steps': 0}
  if not measures:
    ours |= {f'evals.{name}.max_examples': 1 for name in config.evals}
  first, before = next(iter(arms)), {}
  if share_warm_start:
    # One step more, without which it would not have all parameters.
    before = {'warm_start': study.Step(spec, {
        **ours, 'total_steps': config.warm_start.steps + 1})}
    ours |= {'warm_start.steps': 0, 'init_from': f'{{{first}/warm_start}}'}
    steps -= config.warm_start.steps
  return study.Study(
      title=title,
      arms={name: {
          **(before if name == first else {}),
          'pretrain': study.Step(spec, {'total_steps': steps, **ours,
                                        **overrides}),
          **{task: study.Step(
              f'configs/finetune.py:{task},from={{pretrain}}',
              {'total_steps': tune, 'eval_every_steps': tune})
             for task in tasks}} for name, overrides in arms.items()},
      measures={**{label: ('pretrain', f'eval/{metric}')
                   for label, metric in measures.items()},
                **{task: (task, measure(task)) for task in tasks}})
