"""SOHO's claim: the visual dictionary and masked visual modelling help.

  python -m e2e_vlp_jax.compare --study configs/studies/dictionary.py \
      --workdir W

Three arms pre-train `tiny` on `scenes` for equal steps: with both, with the
dictionary alone, with neither. They are fine-tuned for questions and for
statements about two images, as in the paper's ablation (its table 6), which
trains ResNet-18 on photographs. Fine-tuning has no dictionary in the released
code; ours here keeps that of the pre-training, so the arms differ by it.

Argument: steps=N of pre-training (4000), tune=N of each fine-tuning (1000),
tasks joined by '+' (answer+reason).
"""
from configs import common
from configs.studies import finetuning
from e2e_vlp_jax import study

ARMS = {
    'neither': {'model.dictionary.size': 0, 'objectives.mvm': 0.},
    'dictionary': {'objectives.mvm': 0.},
    'dictionary and MVM': {},
}


def get_study(arg=None):
  options = common.parse_options(
      arg.split(',') if arg else [], {'steps': int, 'tune': int, 'tasks': str})
  steps, tune = options.get('steps', 4000), options.get('tune', 1000)
  tasks = options.get('tasks', 'answer+reason').split('+')
  return study.Study(
      title='SOHO: pre-training with and without dictionary and MVM',
      arms={name: {
          'pretrain': study.Step('configs/soho.py:tiny', {
              'total_steps': steps, 'eval_every_steps': 0, **overrides}),
          **{task: study.Step(
              f'configs/finetune.py:{task},from={{pretrain}}',
              {'total_steps': tune, 'eval_every_steps': tune})
             for task in tasks}} for name, overrides in ARMS.items()},
      measures={task: (task, finetuning.measure(task)) for task in tasks})
