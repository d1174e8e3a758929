"""A run of seconds: E2E-VLP `tiny` made smaller still.

A config file like those of configs/: the tests train it in their own process
and, through --config tests/small_run.py, in real ones.
"""
import json
import os

from configs import e2e_vlp


def get_config(arg=None):
  """E2E-VLP in little.

  Args:
    arg: 'evaluated' = with one evaluator of each kind, on 16 images; 'light' =
      two objectives, which compile in a third of the time, no warm start;
      'short' = two steps, no warm start.
  """
  config = e2e_vlp.get_config('tiny')
  config.update_from_flattened_dict({
      'model.width': 32, 'model.ffn': 48, 'model.num_queries': 8,
      'model.encoder_layers': 1, 'model.decoder_layers': 1,
      'model.backbone.stem': 8, 'model.backbone.width': 16,
      'model.backbone.blocks': 1, 'batch_size': 8, 'eval_batch_size': 8,
      'total_steps': 6, 'warm_start.steps': 2, 'eval_every_steps': 0,
      'log_every_steps': 1, 'checkpoint.every_steps': 2, 'samples.count': 0,
      'tensorboard': False})
  config.evals = {k: v for k, v in config.evals.items()
                  if arg == 'evaluated' and not k.endswith('_unseen')}
  for options in config.evals.values():
    options.examples_during_training = 0
  if arg == 'light':
    config.objectives.update(dict(detection=0., captioning=0.))
    config.warm_start.steps = 0
  if arg == 'short':
    config.total_steps, config.warm_start.steps = 2, 0
  return config


def pretend_saved(workdir, step):
  """Makes the folder of a checkpoint, without any arrays."""
  for item in ('params', 'meta'):
    os.makedirs(os.path.join(workdir, 'checkpoints', str(step), item))
  with open(os.path.join(workdir, 'checkpoints', str(step), 'meta',
                         'metadata'), 'w', encoding='utf-8') as f:
    json.dump({'config': {'data': {}, 'model': {}},
               'tokenizer': {'kind': 'wordpiece'},
               'labels': {'classes': []}}, f)


def get_sweep(arg=None):
  """Two seeds."""
  del arg
  return [{'seed': seed} for seed in (0, 1)]
