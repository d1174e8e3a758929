"""Fine-tuning for VQA: what each system published, and our `scenes` runs.

Sources: [S] researchmm/soho, configs/VQA/soho_res18_vqa.py, and its head,
SOHO/models/heads/soho_downstream_vqa_head.py; [F] microsoft/FIBER,
coarse_grained, commit ca0f36b: fiber/config.py (task_finetune_vqa) and the code
that it configures; ours = our choice. We have not run the published recipes.

All three publish test-dev and test-std figures of models that were trained on
train2014 and val2014 together. These recipes do the same, so the accuracy on
`validation` is measured on training questions. For a held-out accuracy, train
on `train` only (docs/vqa.md has the command).
"""
from configs.recipes import shared

_QUESTIONS = 443_757 + 214_354  # in train2014 and val2014
_TRAIN = tuple(dict(name='vqav2', split=split, weight='by_rows')
               for split in ('train', 'validation'))
_OPS = "text('questions')|answers"


def _steps(epochs, batch):
  return round(epochs * _QUESTIONS / batch)


# The paper does not describe its fine-tuning. Our choice: SOHO's length, batch
# and schedule, with the optimizer of the paper's pre-training.
_E2E_VLP = {
    'data.train': _TRAIN,
    # Other sizes, but no crops, which could remove what a question is about.
    'data.pp_train': f'decode|scale_crop(p=0.)|fit|{_OPS}',
    'model.heads.answer.hidden': 1024,
    'model.heads.answer.act': 'gelu',
    'model.heads.answer.norm': True,
    'batch_size': 512,
    'total_steps': _steps(20, 512),
    'optim.schedule': 'step',
    'optim.learning_rate': 1e-4,
    'optim.decay_steps': (_steps(12, 512), _steps(16, 512)),
    'optim.decay_factor': .1,
    'optim.warmup_steps': 500,
}

# [S]
_SOHO_EVAL = "decode|fit((1000, 600), 'opencv')|text('questions')"
_SOHO = {
    'dtype': 'float32',                             # [S], apex O0
    'data.train': _TRAIN,                           # [S]
    'data.max_text': 16,                            # [S]
    # [S]: the shorter side is any number of pixels from 400 to 800, the
    # longer one at most 1333; ours: multiples of 16.
    'side': 800,
    'data.pp_train': (f'decode|scale_crop({tuple(range(400, 801, 16))}, p=0.)'
                      f"|fit((1333, 800), 'opencv')|{_OPS}"),
    'data.pp_eval': _SOHO_EVAL,
    'evals.vqa.pp': _SOHO_EVAL,
    'model.dictionary.size': 0,                     # [S]: no dictionary
    # [S]: on [CLS]; Linear, ReLU, Dropout, Linear, Kaiming-normal.
    'model.heads.answer.hidden': 3072,
    'model.heads.answer.act': 'relu',
    'model.heads.answer.dropout': .5,
    'model.heads.answer.init': 'kaiming',
    'batch_size': 512,         # [S]: 32 on 8 GPUs, 2 batches per update
    'total_steps': _steps(20, 512),                 # [S]
    'optim.schedule': 'step',
    'optim.learning_rate': 1e-4,                    # [S]
    'optim.decay_steps': (_steps(12, 512), _steps(16, 512)),  # [S]
    'optim.decay_factor': .1,                       # [S]
    # [S]: 1,000 batches, two per update.
    'optim.warmup_steps': 500,
    'optim.warmup_init': 1 / 3,                     # [S]
    # Optimizers and frozen parameters are as in pre-training [S].
    'optim.clip_norm': 4.,                          # [S]
}

_FIBER = {
    'data.train': _TRAIN,                           # [F]
    'side': 576,                                    # [F], with windows of 18
    'data.max_text': 50,                            # [F]
    # [F] also mirrors half of the images, although texts mention left and
    # right; ours: none.
    'data.pp_train': f'decode|random_crop|squash|randaug|{_OPS}',
    # [F]: Linear, LayerNorm, GELU, Linear on text and image side by side.
    'model.heads.answer.hidden': 1536,
    'model.heads.answer.norm': True,
    'model.heads.answer.act': 'gelu',
    'model.heads.answer.init': 'bert',
    'batch_size': 512,                              # [F]
    'total_steps': _steps(10, 512),                 # [F]
    'optim.schedule': 'linear',                     # [F], down to 0
    'optim.learning_rate': 2e-5,                    # [F]
    'optim.warmup_steps': _steps(10, 512) // 10,    # [F]
    'optim.groups': shared.fiber_groups('answer'),   # [F]
}

# 71,549 questions about 20,000 drawn scenes; ours.
_SCENES = shared.scenes_classifier('answer')

RECIPES = {
    ('e2e_vlp', 'published'): _E2E_VLP, ('e2e_vlp', 'scenes'): _SCENES,
    ('soho', 'published'): _SOHO, ('soho', 'scenes'): _SCENES,
    ('fiber', 'published'): _FIBER,
    ('fiber', 'scenes'): shared.fiber_scenes('answer'),
}
