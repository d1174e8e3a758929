"""FIBER's claim: fuse image and text in the backbones, not on top of them.

  python -m e2e_vlp_jax.compare --study configs/studies/fusion.py --workdir W

Three arms pre-train the coarse `tiny` on `scenes` for equal steps and are then
fine-tuned for questions:
- in the backbones: the last two layers of either side attend to the other one,
  as in FIBER;
- in the last layer: only one does, as late as fusion can be within them;
- on top: the backbones stay whole and unfused, and two more layers follow on
  either side, which alone attend to the other one, as in METER. This arm has
  more parameters and takes longer.

The paper fuses six of its layers and starts from trained backbones; ours start
from nothing, so new layers on top are not at a disadvantage here. ITC passes
through all layers of either side, without cross-attention, in every arm.

Argument: steps=N of pre-training (3400), tune=N of each fine-tuning (1000),
tasks joined by '+' (answer).
"""
from configs.studies import finetuning

ARMS = {
    'in the backbones': {},
    'in the last layer': {'model.fused_layers': 1},
    # Two layers more than the 4 blocks of Swin's last stage and RoBERTa's 3.
    'on top': {'model.swin.depths': (1, 1, 6), 'model.roberta.depth': 5},
}
_MEASURES = {'matching': 'itm/accuracy',
             # Re-ranked by matching, which is what fusion is for.
             'text of an image R@1': 'retrieval/TR1_itm',
             'image of a text R@1': 'retrieval/IR1_itm',
             'masked words': 'mlm/accuracy'}


def get_study(arg=None):
  return finetuning.of_pretraining(
      'FIBER: fusion in the backbones, or after them', 'fiber', ARMS, arg,
      steps=3400, share_warm_start=False, measures=_MEASURES)
