"""Parts of several recipes."""

# Ours: minutes on two cores, on 20,000 drawn scenes.
SCENES = {
    'batch_size': 32,
    'total_steps': 2000,
    'optim.schedule': 'cosine',
    'optim.learning_rate': 5e-4,
    'optim.warmup_steps': 100,
    'eval_every_steps': 500,
}

_FUSING = r'(image|text)_(projection|pooler)|(swin|text)/.*/cross'


def scenes_classifier(task):
  """`SCENES` with a small head; ours."""
  return {
      f'model.heads.{task}.hidden': 256,
      f'model.heads.{task}.act': 'gelu',
      f'model.heads.{task}.norm': True,
      **SCENES}


def fiber_groups(task, head=50.):
  """FIBER's `optim.groups` for a task with a head of its own.

  Modules that fuse the two trunks have five times their learning rate, the head
  `head` times, as published fifty. Decay depends on names: biases and the
  trunks' norms have none, the gain of the head's norm does decay
  (microsoft/FIBER, coarse_grained, commit ca0f36b).
  """
  return (
      (rf'heads_{task}/.*bias', dict(lr_multiplier=head, weight_decay=0.)),
      (rf'heads_{task}/.*', dict(lr_multiplier=head)),
      (rf'({_FUSING})(/.*)?/bias', dict(lr_multiplier=5., weight_decay=0.)),
      (rf'({_FUSING})(/.*)?', dict(lr_multiplier=5.)),
      (r'.*(bias|/scale)', dict(weight_decay=0.)),
      (r'.*', dict()))


def fiber_scenes(task):
  """`scenes_classifier` for FIBER; ours: the published order of rates.

  With 5e-4 throughout, 300 steps from pre-training end below those from scratch
  (`answer`, docs/fiber.md).
  """
  return {
      **scenes_classifier(task),
      'optim.learning_rate': 1e-4,
      'optim.groups': fiber_groups(task, head=10.)}
