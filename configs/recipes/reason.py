"""Fine-tuning for NLVR2: what each system published, and our smaller runs.

Sources: [F] microsoft/FIBER, coarse_grained, commit ca0f36b: fiber/config.py
(task_finetune_nlvr2) and the code that it configures; [M] the SOHO paper, from
memory: two texts with an image each, both [CLS] states side by side, two
classes; ours = our choice. E2E-VLP and SOHO published neither code nor values
for this task. We have not run the published recipes.
"""
from configs.recipes import shared

_STATEMENTS = 86_373  # in the train split
_OPS = "second_image|text('statements')|statement_labels"


def _steps(epochs, batch):
  return round(epochs * _STATEMENTS / batch)


# The second image is shown whole, so the first one is, too: without crops and
# without other sizes.
_TRAIN = f'decode|fit|{_OPS}'

# Ours throughout, as for VQA: SOHO's schedule there, with the optimizer of the
# paper's pre-training.
_E2E_VLP = {
    'data.pp_train': _TRAIN,
    'model.heads.reason.hidden': 1024,
    'model.heads.reason.act': 'gelu',
    'model.heads.reason.norm': True,
    'batch_size': 256,
    'total_steps': _steps(20, 256),
    'optim.schedule': 'step',
    'optim.learning_rate': 1e-4,
    'optim.decay_steps': (_steps(12, 256), _steps(16, 256)),
    'optim.decay_factor': .1,
    'optim.warmup_steps': 500,
}

# View and state of the head are [M]; all the rest is ours, taken from SOHO's
# released recipe for VQA (configs/recipes/answer.py).
_FIT = "decode|fit((1000, 600), 'opencv')"
_SOHO = {
    'dtype': 'float32',
    'data.max_text': 40,  # ours; sentences are longer than questions
    'side': 600,
    'data.pp_train': f'{_FIT}|{_OPS}',
    'data.pp_eval': f"{_FIT}|second_image|text('statements')",
    'evals.nlvr2.pp': f"{_FIT}|second_image|text('statements')",
    'model.dictionary.size': 0,
    'model.heads.reason.hidden': 3072,
    'model.heads.reason.act': 'relu',
    'model.heads.reason.dropout': .5,
    'model.heads.reason.init': 'kaiming',
    'batch_size': 256,
    'total_steps': _steps(20, 256),
    'optim.schedule': 'step',
    'optim.learning_rate': 1e-4,
    'optim.decay_steps': (_steps(12, 256), _steps(16, 256)),
    'optim.decay_factor': .1,
    'optim.warmup_steps': 500,
    'optim.warmup_init': 1 / 3,
    'optim.clip_norm': 4.,
}

_FIBER = {
    'side': 384,                                    # [F]
    'data.max_text': 50,                            # [F]
    # [F] crops, mirrors and distorts (RandAugment) both images; ours: none,
    # since sentences say left and right and the second image is shown whole.
    'data.pp_train': f'decode|squash|{_OPS}',
    # [F]: Linear, LayerNorm, GELU, Linear on text and image of the first pair
    # and of the second, side by side.
    'model.heads.reason.hidden': 1536,
    'model.heads.reason.norm': True,
    'model.heads.reason.act': 'gelu',
    'model.heads.reason.init': 'bert',
    'batch_size': 256,                              # [F]
    'total_steps': _steps(5, 256),                  # [F]
    'optim.schedule': 'linear',                     # [F], down to 0
    'optim.learning_rate': 2e-5,                    # [F]
    'optim.warmup_steps': _steps(5, 256) // 10,     # [F]
    'optim.groups': shared.fiber_groups('reason'),   # [F]
}

# 20,000 statements about two drawn scenes each; ours.
_SCENES = shared.scenes_classifier('reason')

# NLVR v1 in its one-image form: 989 sentences of dev, some 15 epochs; ours.
_NLVR1 = {**_SCENES, 'side': 192, 'total_steps': 500, 'eval_every_steps': 100,
          'optim.warmup_steps': 50}

RECIPES = {
    ('e2e_vlp', 'published'): _E2E_VLP, ('e2e_vlp', 'scenes'): _SCENES,
    ('e2e_vlp', 'nlvr1'): _NLVR1,
    ('soho', 'published'): _SOHO, ('soho', 'scenes'): _SCENES,
    ('soho', 'nlvr1'): _NLVR1,
    ('fiber', 'published'): _FIBER,
    ('fiber', 'scenes'): shared.fiber_scenes('reason'),
    ('fiber', 'nlvr1'): _NLVR1,
}
