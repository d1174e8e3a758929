"""Fine-tuning for detection of own classes; our choice throughout.

No system has published one. A few hundred images give some tens of epochs in
2,000 steps. The parameters of the last 100 steps or so are averaged, because a
small batch makes AP jump from step to step; the best step by AP is kept.
Learning rate and schedule are those of configs/finetune.py without a recipe.
"""
RECIPES = {('e2e_vlp', 'own'): {
    'batch_size': 16,
    'total_steps': 2000,
    'eval_every_steps': 100,
    'checkpoint.every_steps': 100,
    'ema_decay': .99,
}}
