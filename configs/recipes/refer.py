"""Fine-tuning for referring expressions on E2E-VLP's decoder.

No system published this recipe: the papers of E2E-VLP and SOHO do not report
the task, and FIBER's is of its fine stage. Ours throughout; the published one
borrows the length, batch and learning rates of MDETR's fine-tuning for
RefCOCO (5 epochs, 32 to 64 images, 5e-5 and 1e-5 for the trunk; from memory).
Texts say left and right, so no image is mirrored. Not yet run on RefCOCO.
"""
from configs.recipes import shared

_EXPRESSIONS = 120_624  # RefCOCO's training split

_PUBLISHED = {
    'model.heads.refer.hidden': 256,
    'batch_size': 64,
    'total_steps': 10 * _EXPRESSIONS // 64,
    'optim.schedule': 'step',
    'optim.learning_rate': 5e-5,
    'optim.decay_steps': (7 * _EXPRESSIONS // 64,),
    'optim.decay_factor': .1,
    'optim.warmup_steps': 500,
}

# 54,000 expressions about 20,000 drawn scenes.
_SCENES = {
    'model.heads.refer.hidden': 128,
    **shared.SCENES,
}

RECIPES = {('e2e_vlp', 'published'): _PUBLISHED,
           ('e2e_vlp', 'scenes'): _SCENES}
