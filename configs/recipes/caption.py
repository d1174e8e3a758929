"""Fine-tuning for captions: what each system published, and `scenes` runs.

Source: [F] microsoft/FIBER, coarse_grained, commit ca0f36b: fiber/config.py
(task_finetune_caption_*) and the code that it configures; ours = our choice.
E2E-VLP's paper reports COCO's captions, but none of its settings. Not yet run
by us.

FIBER's run has three stages: cross-entropy, GOLD, CIDEr optimisation
(objectives/self_critical.py). Their steps add up to `total_steps`. A step shows
an image with one of its captions, sampled; an epoch is one over all captions,
as in [F].
"""
from configs.recipes import shared

_CAPTIONS = {'train': 414_113, 'restval': 152_634, 'validation': 25_010}
_EPOCHS = 10


def _sources(*splits):
  return tuple(dict(name='karpathy', split=split, weight='by_rows')
               for split in splits)


def _steps(batch, *splits):
  return round(_EPOCHS * sum(_CAPTIONS[s] for s in splits) / batch)


def _schedule(schedule, learning_rate, warmup_steps):
  decay = {'final_fraction': 0.} if schedule == 'linear' else {}
  return dict(schedule=schedule, learning_rate=learning_rate,
              warmup_steps=warmup_steps, warmup_init=0., **decay)


def _cider(steps, learning_rate, warmup_steps=0, schedule='linear', **options):
  """The last stage; `options` are those of its objective."""
  return {
      'last_stage': dict(
          steps=steps, objectives=dict(self_critical=1.),
          schedule=_schedule(schedule, learning_rate, warmup_steps)),
      'objective_options.self_critical': {**dict(
          samples=5, baseline='others', scale=1., truth=0.), **options}}


_EVALUATOR = {'evals.captioning.options': dict(beams=5, meteor=True)}

# GOLD (objectives/gold.py) instead of plain cross-entropy, off:
# --config.objectives.captioning=0 --config.objectives.gold=1
_GOLD = {'objectives.gold': 0.,
         'objective_options.gold': dict(least=.1, divide_by='tokens')}

# Ours throughout. The published figures are without CIDEr optimisation as far
# as is known: it is off until last_stage.steps is set.
_E2E_VLP = {
    **_EVALUATOR,
    **_GOLD,
    **_cider(0, 5e-6),
    'data.train': _sources('train', 'restval'),
    # Other sizes, but no crops, which could remove what a caption is about.
    'data.pp_train': 'decode|scale_crop(p=0.)|fit|text',
    'batch_size': 256,
    'total_steps': _steps(256, 'train', 'restval'),
    'optim.schedule': 'linear',
    'optim.learning_rate': 5e-5,
    'optim.warmup_steps': _steps(256, 'train', 'restval') // 10,
}

_MLE = _steps(512, 'train', 'validation')
_FIBER = {
    **_EVALUATOR,                              # [F] five beams
    # [F]: first cross-entropy, then GOLD.
    'warm_start': dict(
        steps=_MLE, objectives=dict(captioning=1.),
        schedule=_schedule('linear', 5e-5, _MLE // 10)),
    'objectives.captioning': 0.,
    'objectives.gold': 1.,
    'objective_options.gold': dict(least=.1, divide_by='padding'),
    # [F]: five samples an image, a constant baseline of 1, .3 of the true
    # captions; the samples of an image are added up and CIDEr is counted in
    # percent, hence 500.
    **_cider(_MLE, 1e-6, _MLE // 10, samples=5, baseline='constant', scale=500.,
             truth=.3),
    # [F] trains on train and validation, without restval, and selects on test.
    # Ours: the last step counts.
    'data.train': _sources('train', 'validation'),
    'evals.captioning.source.split': 'test',
    'checkpoint.best': '',
    'side': 576,                               # [F]
    'data.max_text': 50,                       # [F]
    # [F] also mirrors half of the images, although texts say left and right.
    'data.pp_train': 'decode|random_crop|squash|randaug|text',
    'batch_size': 512,                         # [F]
    'total_steps': 3 * _MLE,                   # [F] 10 epochs each
    'optim.schedule': 'linear',                # [F], down to 0
    'optim.learning_rate': 1e-5,               # [F]
    'optim.warmup_steps': _MLE // 10,          # [F]
}

# The first stage alone, on COCO train2017 or other photographs.
_FIBER_OTHERS = {
    **_GOLD,
    'side': 576,                               # [F]
    'data.max_text': 50,                       # [F]
    'data.pp_train': 'decode|random_crop|squash|randaug|text',
    'batch_size': 512,                         # [F]
    'total_steps': _EPOCHS * 591_753 // 512,   # [F] 10 epochs; COCO train2017
    'optim.learning_rate': 5e-5,               # [F]
    'optim.warmup_steps': 591_753 // 512,      # [F] 10 %; linear down to 0
}

# Some minutes on two cores; ours. CIDEr's stage is off until it gets steps.
_SCENES = {
    **_GOLD,
    **_cider(0, 2e-4, schedule='constant'),
    'data.sentences': 2,
    **shared.SCENES,
    'total_steps': 1000,
    'eval_every_steps': 250,
}

RECIPES = {
    ('e2e_vlp', 'karpathy'): _E2E_VLP, ('e2e_vlp', 'scenes'): _SCENES,
    ('fiber', 'karpathy'): _FIBER, ('fiber', 'scenes'): _SCENES,
    ('fiber', 'published'): _FIBER_OTHERS,
}
