"""SOHO's claim: the visual dictionary and masked visual modelling help.

  python -m e2e_vlp_jax.compare --study configs/studies/dictionary.py \
      --workdir W

Three arms pre-train `tiny` on `scenes` for equal steps: with both, with the
dictionary alone, with neither. They are fine-tuned for questions and for
statements about two images, as in the paper's ablation (its table 6), which
trains ResNet-18 on photographs. Fine-tuning has no dictionary in the released
code; ours here keeps that of the pre-training, so the arms differ by it. All
arms go on from one warm start of the CNN.

Argument: steps=N of pre-training (4000, 800 of them the warm start's), tune=N
of each fine-tuning (1000), tasks joined by '+' (answer+reason).
"""
from configs.studies import finetuning

ARMS = {
    'neither': {'model.dictionary.size': 0, 'objectives.mvm': 0.},
    'dictionary': {'objectives.mvm': 0.},
    'dictionary and MVM': {},
}


def get_study(arg=None):
  return finetuning.of_pretraining(
      'SOHO: pre-training with and without dictionary and MVM', 'soho', ARMS,
      arg, steps=4000, tasks='answer+reason')
