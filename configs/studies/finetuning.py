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
