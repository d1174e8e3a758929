"""Fine-tuning for detection of own classes.

Source: [F] microsoft/FIBER, fine_grained, commit ca0f36b, ODinW, with all
classes in one caption; ours = our choice. No other system has published one. A
few hundred images give some tens of epochs in 2,000 steps. The best step by AP
is kept.
"""
_OWN = {
    'batch_size': 16,
    'total_steps': 2000,
    'eval_every_steps': 100,
    'checkpoint.every_steps': 100,
}

RECIPES = {
    # Ours. The parameters of the last 100 steps or so are averaged, because a
    # small batch makes AP jump from step to step. Learning rate and schedule
    # are those of configs/finetune.py without a recipe.
    ('e2e_vlp', 'own'): {**_OWN, 'ema_decay': .99},
    # [F] but for the length: configs/fiber_fine.py says more.
    ('fiber_fine', 'own'): {
        **_OWN,
        'batch_size': 4,
        'optim.schedule': 'step',
        'optim.learning_rate': 1e-4,
        'optim.decay_steps': (1340, 1780),
        'optim.decay_factor': .1,
        'optim.warmup_steps': 0,
        'optim.weight_decay': .05,
    },
}
