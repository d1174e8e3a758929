"""Fine-tuning for retrieval: what each system published, and our `scenes` runs.

Sources: [F] microsoft/FIBER, coarse_grained, commit ca0f36b: fiber/config.py
(task_finetune_irtr_*) and the code that it configures; [M] the SOHO paper, from
memory: a classifier of matches on [CLS], of true pairs and of pairs mixed
within the batch; [S] SOHO's released pre-training config; ours = our choice.
E2E-VLP's paper reports Flickr30k, but none of its settings. We have not run the
published recipes.

Every step shows an image with one of its captions, or several, sampled; an
epoch is one over all captions, as in [F].
"""
from configs.recipes import shared

_CAPTIONS = {
    ('karpathy', 'train'): 414_113, ('karpathy', 'restval'): 152_634,
    ('karpathy', 'validation'): 25_010, ('flickr30k', 'train'): 145_000,
    ('flickr30k', 'validation'): 5_070}


def _sources(name, *splits):
  return tuple(dict(name=name, split=split,
                    weight='by_rows' if splits[1:] else 1.)
               for split in splits)


def _steps(epochs, texts, name, *splits):
  """Steps that show every caption `epochs` times, with `texts` a step."""
  return round(epochs * sum(_CAPTIONS[name, s] for s in splits) / texts)


def _evaluation(protocol, **options):
  """The evaluator's options."""
  return {'evals.retrieval.options': {**dict(
      protocol=protocol, texts=5, top_k=128, max_pairs=5_000_000), **options}}


def _e2e_vlp(name, *splits):
  """Ours throughout."""
  steps = _steps(10, 256, name, *splits)
  return {
      **_evaluation('exhaustive'),
      # All pairs of 100 images with 500 texts.
      'evals.retrieval.examples_during_training': 100,
      'evals.retrieval.max_examples': 1000,
      'data.train': _sources(name, *splits),
      # Other sizes, but no crops, which could remove what a text is about.
      'data.pp_train': 'decode|scale_crop(p=0.)|fit|text|itm(.5)',
      'batch_size': 256,
      'total_steps': steps,
      'optim.schedule': 'step',
      'optim.learning_rate': 5e-5,
      'optim.decay_steps': (round(.6 * steps), round(.8 * steps)),
      'optim.decay_factor': .1,
      'optim.warmup_steps': 500,
  }


def _soho(name, *splits):
  steps = _steps(20, 1024, name, *splits)           # ours: 20 epochs
  return {
      **_evaluation('exhaustive'),
      'evals.retrieval.examples_during_training': 100,
      'evals.retrieval.max_examples': 1000,
      'data.train': _sources(name, *splits),
      'data.sentences': 4,                          # [S], each its own draw
      'batch_size': 256,                            # [S], 1,024 pairs
      'total_steps': steps,
      'optim.schedule': 'step',
      'optim.learning_rate': 1e-4,                  # ours, as in [S]
      'optim.decay_steps': (round(.6 * steps), round(.8 * steps)),
      'optim.decay_factor': .1,
      'optim.warmup_steps': 500,                    # [S]
      'optim.warmup_init': 1 / 3,                   # [S]
      # Optimizers, clipping and frozen parameters are as in pre-training [S].
  }


def _fiber(name, *splits):
  """[F] trains ITC at 576 pixels or ITM at 384, one at a time; both, in one
  run with hard negatives, is ours. docs/retrieval.md has the two commands."""
  steps = _steps(10, 1024, name, *splits)           # [F] 10 epochs
  return {
      **_evaluation('reranked', score='logit'),     # [F]: the logit alone
      'objectives.itc': 1.,
      'objective_options.itm.view': 'hard_negative',
      # [F] trains on train and validation, without restval, and selects on
      # test. Ours: the last step counts.
      'data.train': _sources(name, *splits),
      'evals.retrieval.source.split': 'test',
      'checkpoint.best': '',
      'side': 384,                                  # [F] for ITM
      'data.max_text': 50,                          # [F]
      # [F] also mirrors half of the images, although texts say left and right.
      'data.pp_train': 'decode|random_crop|squash|randaug|text|itm(.5)',
      'batch_size': 1024,                           # [F]
      'total_steps': steps,
      'optim.schedule': 'linear',                   # [F], down to 0
      'optim.learning_rate': 2e-5,                  # [F]
      'optim.warmup_steps': steps // 10,            # [F]
  }


def _scenes(protocol, **more):
  """Some minutes on two cores; ours."""
  return {
      **_evaluation(protocol, texts=1, **more),
      'evals.retrieval.max_examples': 128,
      'evals.retrieval.examples_during_training': 64,
      'data.sentences': 2,
      **shared.SCENES,
      'total_steps': 1000,
      'eval_every_steps': 250,
  }


_COCO = ('karpathy', 'train', 'restval')
RECIPES = {
    ('e2e_vlp', 'flickr30k'): _e2e_vlp('flickr30k', 'train'),
    ('e2e_vlp', 'karpathy'): _e2e_vlp(*_COCO),
    ('e2e_vlp', 'scenes'): _scenes('exhaustive'),
    ('soho', 'flickr30k'): _soho('flickr30k', 'train'),
    ('soho', 'karpathy'): _soho(*_COCO),
    ('soho', 'scenes'): _scenes('exhaustive'),
    ('fiber', 'flickr30k'): _fiber('flickr30k', 'train', 'validation'),
    ('fiber', 'karpathy'): _fiber('karpathy', 'train', 'validation'),
    ('fiber', 'scenes'): {
        **_scenes('reranked', top_k=32, itc_weight=.5),
        'objectives.itc': 1., 'objectives.itm': 4.,
        'objective_options.itm.view': 'hard_negative'},
}
