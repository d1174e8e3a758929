"""Fine-tuning for image-text matching: FIBER's published recipe.

Source: [F] microsoft/FIBER, coarse_grained, commit ca0f36b: fiber/config.py,
task_finetune_irtr_itm_coco. Not yet run by us. The other systems have no
published recipe: `_schedule` of configs/finetune.py is used.
"""
_CAPTIONS = 591_753  # in COCO train2017; [F] has Karpathy's split

RECIPES = {('fiber', 'published'): {
    'side': 384,                               # [F]
    'data.max_text': 50,                       # [F]
    # [F] also mirrors half of the images, although texts say left and right.
    'data.pp_train': 'decode|random_crop|squash|randaug|text|itm(.5)',
    # [F]: half of the pairs are swapped at random; no hard negatives.
    'objective_options.itm.view': 'joint_masked',
    'batch_size': 1024,                        # [F]
    'total_steps': 10 * _CAPTIONS // 1024,     # [F] 10 epochs of all captions
    'optim.learning_rate': 2e-5,               # [F]
    'optim.warmup_steps': _CAPTIONS // 1024,   # [F] 10 %; linear down to 0
}}
