"""E2E-VLP's claim: detection and captioning in pre-training help what follows.

  python -m e2e_vlp_jax.compare --study configs/studies/objectives.py \
      --workdir W

Four arms pre-train on `scenes` for equal steps, with neither, either or both
objectives beside masked language modelling and matching, and are fine-tuned for
questions and for statements about two images. The paper's table 4 removes them
from a model of 6 + 6 layers; ours is `tiny`. All arms go on from one warm start
of the CNN, that of configs/e2e_vlp.py, which stands for ImageNet weights.

Argument: steps=N of pre-training (4000, 800 of them the warm start's), tune=N
of each fine-tuning (1000), tasks joined by '+' (answer+reason).
"""
from configs.studies import finetuning

_LEFT_OUT = {'objectives.detection': 0., 'objectives.captioning': 0.}
ARMS = {
    'neither': _LEFT_OUT,
    'detection': {'objectives.captioning': 0.},
    'captioning': {'objectives.detection': 0.},
    'both': {},
}


def get_study(arg=None):
  return finetuning.of_pretraining(
      'E2E-VLP: pre-training with and without detection and captioning',
      'e2e_vlp', ARMS, arg, steps=4000, tasks='answer+reason')
