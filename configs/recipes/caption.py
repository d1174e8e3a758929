"""Fine-tuning for captions: FIBER's published recipe, first stage (MLE).

Source: [F] microsoft/FIBER, coarse_grained, commit ca0f36b: fiber/config.py,
task_finetune_caption_mle. Not yet run by us. The other systems have no
published recipe: `_schedule` of configs/finetune.py is used.
"""
_CAPTIONS = 591_753  # in COCO train2017; [F] has Karpathy's split

RECIPES = {('fiber', 'published'): {
    'side': 576,                               # [F]
    'data.max_text': 50,                       # [F]
    # [F] also mirrors half of the images, although texts say left and right.
    'data.pp_train': 'decode|random_crop|squash|randaug|text',
    'batch_size': 512,                         # [F]
    'total_steps': 10 * _CAPTIONS // 512,      # [F] 10 epochs of all captions
    'optim.learning_rate': 5e-5,               # [F]
    'optim.warmup_steps': _CAPTIONS // 512,    # [F] 10 %; linear down to 0
}}
