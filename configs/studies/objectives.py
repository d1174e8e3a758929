"""E2E-VLP's claim: detection and captioning in pre-training help what follows.

  python -m e2e_vlp_jax.compare --study configs/studies/objectives.py \
      --workdir W

Four arms pre-train on `scenes` for equal steps, with neither, either or both
objectives beside masked language modelling and matching, and are fine-tuned for
questions and for statements about two images. The paper's table 4 removes them
from a model of 6 + 6 layers; ours is `tiny`. All arms start the CNN alike, by
the warm start of configs/e2e_vlp.py, which stands for ImageNet weights.

Argument: steps=N of pre-training (4000), tune=N of each fine-tuning (1000),
tasks joined by '+' (answer+reason).
"""
from configs import common
from configs.studies import finetuning
from e2e_vlp_jax import study

ARMS = {'neither': (0., 0.), 'detection': (1., 0.), 'captioning': (0., 1.),
        'both': (1., 1.)}


def get_study(arg=None):
  options = common.parse_options(
      arg.split(',') if arg else [], {'steps': int, 'tune': int, 'tasks': str})
  steps, tune = options.get('steps', 4000), options.get('tune', 1000)
  tasks = options.get('tasks', 'answer+reason').split('+')

  def arm(detection, captioning):
    pretrain = study.Step('configs/e2e_vlp.py:tiny', {
        'total_steps': steps, 'eval_every_steps': 0,
        **({} if detection else {'objectives.detection': 0.}),
        **({} if captioning else {'objectives.captioning': 0.})})
    return {'pretrain': pretrain, **{
        task: study.Step(f'configs/finetune.py:{task},from={{pretrain}}',
                         {'total_steps': tune, 'eval_every_steps': tune})
        for task in tasks}}
  return study.Study(
      title='E2E-VLP: pre-training with and without detection and captioning',
      arms={name: arm(*on) for name, on in ARMS.items()},
      measures={task: (task, finetuning.measure(task)) for task in tasks})
