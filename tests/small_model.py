"""An untrained E2E-VLP of some thousand parameters, for tests that predict."""
import functools

import jax
import numpy as np

from configs import e2e_vlp as config_lib
from e2e_vlp_jax import models
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.training import checkpointer
from e2e_vlp_jax.training import workdir as workdir_lib
from e2e_vlp_jax.training import train_step


def get_config(size='tiny', **model):
  """Config of the small model; `model`: other values of config.model."""
  config = config_lib.get_config(size)
  config.dtype = 'float32'
  config.model.update(dict(width=32, ffn=48, num_queries=5,
                           encoder_layers=1, decoder_layers=1))
  config.model.backbone = dict(name='patch_cnn', stem=8, width=16, blocks=1)
  config.model.update(model)
  config.data.max_text = config.model.max_text = 10
  config.data.sentences = 1
  return config


def build(config, requests=None):
  """(predictor, variables) with random parameters.

  Args:
    config: whole config.
    requests: {view: heads} whose parameters are made; None = all.
  """
  vocabularies = vocabularies_lib.Vocabularies.load(config.data)
  model = models.build(config, **vocabularies.sizes)
  batch = synthetic.synthetic_batch(config.data, batch_size=1,
                                    **vocabularies.sizes)
  batch = {f'second_{k}': batch[k] for k in ('image', 'image_mask')} | batch
  shapes = jax.eval_shape(lambda b: model.init(
      jax.random.key(0), b, requests or model.views), batch)
  # Compiling `init` would take longer than all the rest.
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda x: rng.normal(0, .2, x.shape).astype(x.dtype), dict(shapes))
  return predictor_lib.Predictor(model, config, vocabularies), variables


@functools.cache
def built(data_dir='data'):
  """The same (predictor, variables) for all tests of a process."""
  config = get_config()
  config.data.dir = data_dir
  return build(config)


def save(folder, config, requests=None, step=7):
  """Writes a checkpoint of the model; returns its folder as a string."""
  predictor, variables = build(config, requests)
  variables = dict(variables)
  state = train_step.TrainState(
      step=np.int32(step), params=variables.pop('params'),
      model_state=variables, opt_state=(), ema_params=None,
      rng=jax.random.key(0), bad_steps=np.int32(0))
  saver = checkpointer.Checkpointer(
      str(folder), {'config': workdir_lib.to_dict(config),
                    **predictor.vocabularies.to_dict()}, config.checkpoint)
  saver.save(step, state)
  saver.wait()
  return str(folder)
