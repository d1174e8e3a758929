"""Evaluation of a model on a config's `evals`, during training and after.

An evaluator is one file with a function
`evaluate(predictor, variables, pipeline, *, max_examples, progress, ...) ->
{metric: value}`; what else it takes are the config's `evals.<name>.options`.
"""
import importlib
import inspect
import json
import os
import tempfile

import numpy as np
import tqdm

from e2e_vlp_jax import errors

_KEYS = ('type', 'source', 'pp', 'max_examples', 'examples_during_training',
         'options')


class Evaluators:
  """The evaluators of a config, ready to run on any parameters.

  `config.evals.<name>`: type (evaluator's file), source (name, split), pp,
  max_examples (0 = all), examples_during_training (how many at
  eval_every_steps; 0 = none), options (the evaluator's own; may be left out).
  """

  def __init__(self, config, model, vocabularies, mesh=None):
    from e2e_vlp_jax.evaluation import predictor  # pylint: disable=g-import-not-at-top
    from e2e_vlp_jax.training import sharding  # pylint: disable=g-import-not-at-top
    if mesh is not None:
      sharding.check_batch_size(config.eval_batch_size, mesh,
                                key='eval_batch_size')
    self._config = config
    self._vocabularies = vocabularies
    self._mesh = mesh
    self.predictor = predictor.Predictor(model, config, vocabularies,
                                         mesh=mesh)
    self._functions = {}
    self._pipelines = {}
    for name, options in config.evals.items():
      try:
        module = importlib.import_module(
            f'e2e_vlp_jax.evaluation.{options.type}')
        self._functions[name] = module.evaluate
      except (ModuleNotFoundError, AttributeError) as e:
        raise errors.UserError(
            f'evals.{name}.type: no evaluator {options.type!r}'
            + errors.nearest(options.type, ['detection', 'captioning', 'itm',
                                            'mlm', 'retrieval'])) from e
      for key in options:
        if key not in _KEYS:
          raise errors.UserError(
              f'evals.{name}.{key}: no such key'
              + errors.nearest(key, _KEYS) + "; the evaluator's own options "
              f'are evals.{name}.options')
      takes = inspect.signature(module.evaluate).parameters
      for key in options.get('options', {}):
        if key not in takes:
          raise errors.UserError(f'evals.{name}.options.{key}: no such option'
                                 + errors.nearest(key, list(takes)[5:]))
      # Opened now, so that a missing split fails before the training.
      self._pipelines[name] = self._open(options.source, options.pp)

  def _open(self, source, pp):
    from e2e_vlp_jax.data import pipeline  # pylint: disable=g-import-not-at-top
    from e2e_vlp_jax.training import sharding  # pylint: disable=g-import-not-at-top
    config = self._config
    rows = None if self._mesh is None else sharding.host_rows(
        self._mesh, config.eval_batch_size)
    return pipeline.Pipeline(
        config.data, sources=(dict(source, weight=1.),), pp=pp,
        seed=config.seed, batch_size=config.eval_batch_size, train=False,
        rows=rows, vocabularies=self._vocabularies)

  def check_metric(self, key, metric):
    """UserError unless `metric` is '' or of an evaluation during training.

    Args:
      key: the config's, for the message.
      metric: 'eval/<name>/<metric>'.
    """
    names = [n for n, o in self._config.evals.items()
             if o.examples_during_training]
    parts = metric.split('/', 2)
    if metric and (len(parts) != 3 or parts[0] != 'eval'
                   or parts[1] not in names):
      raise errors.UserError(
          f"{key}: {metric!r}; expected 'eval/<name>/<metric>' of an "
          f'evaluation during training ({", ".join(names) or "there is none"})')

  def run(self, variables, final=True, bar=False):
    """All evaluators.

    Args:
      variables: {'params': ..., **model_state}.
      final: on all of `max_examples`; else on `examples_during_training`.
      bar: show how far each evaluator is.

    Returns:
      ({'eval/<name>/<metric>': value}, {picture name: PIL image}).
    """
    from e2e_vlp_jax.evaluation import pictures  # pylint: disable=g-import-not-at-top
    scores = {}
    for name, options in self._config.evals.items():
      count = (options.max_examples if final
               else options.examples_during_training)
      if not final and not count:
        continue
      pipeline = self._pipelines[name]
      with tqdm.tqdm(total=min(count or np.inf, pipeline.num_examples),
                     desc=name, unit='image', leave=False,
                     disable=not bar) as shown:
        found = self._functions[name](
            self.predictor, variables, pipeline, max_examples=count or None,
            progress=lambda done, bar=shown: bar.update(done - bar.n),
            **options.get('options', {}))
      scores.update({f'eval/{name}/{k}': v for k, v in found.items()})
    samples = self._config.samples
    sheet = {}
    if samples.count:
      images = pictures.sample_sheet(
          self.predictor, variables, self._open(samples.source,
                                                self._config.data.pp_eval),
          samples.count)
      sheet = {f'sample_{i:02d}': image for i, image in enumerate(images)}
    return scores, sheet


def check_writable(workdir):
  """UserError unless files can be made in `workdir` (created if missing)."""
  try:
    os.makedirs(workdir, exist_ok=True)
    tempfile.TemporaryFile(dir=workdir).close()
  except OSError as e:
    raise errors.UserError(f'--workdir {workdir}: cannot be written '
                           f'({e.strerror})') from e


def write(workdir, step, scores, images):
  """Writes WORKDIR/eval.json, samples/*.png and report.html.

  Args:
    workdir: folder, made if it is not there.
    step: of the checkpoint that was evaluated.
    scores: {'eval/<name>/<metric>': value}.
    images: {picture name: PIL image}; the newest wins.
  """
  from e2e_vlp_jax.evaluation import report  # pylint: disable=g-import-not-at-top
  path = os.path.join(workdir, 'eval.json')
  os.makedirs(os.path.join(workdir, 'samples'), exist_ok=True)
  for name, image in images.items():
    image.save(os.path.join(workdir, 'samples', f'{name}.png'))
  with open(path + '.tmp', 'w') as f:
    json.dump({'step': int(step), **scores}, f, indent=1)
  os.replace(path + '.tmp', path)
  report.write_report(workdir)
