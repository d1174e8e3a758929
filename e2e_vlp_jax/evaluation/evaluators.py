"""Runs the evaluators of a config's `evals`, during training and after."""
import dataclasses
import fnmatch
import importlib
import inspect
import os
import warnings

import numpy as np
import tqdm

from e2e_vlp_jax import discovery
from e2e_vlp_jax import errors
from e2e_vlp_jax import files
from e2e_vlp_jax.data import pipeline as pipeline_lib
from e2e_vlp_jax.data import pp as pp_lib
from e2e_vlp_jax.data import records
from e2e_vlp_jax.evaluation import details as details_lib
from e2e_vlp_jax.evaluation import pictures
from e2e_vlp_jax.evaluation import predictor as predictor_lib
from e2e_vlp_jax.evaluation import report
from e2e_vlp_jax.training import sharding

_PACKAGE = 'e2e_vlp_jax.evaluation'
_KEYS = ('type', 'source', 'pp', 'unit', 'max_examples',
         'examples_during_training', 'options')
# Arguments of every `evaluate`; any further ones are the evaluator's options.
_COMMON = ('predictor', 'variables', 'pipeline', 'max_examples', 'progress',
           'details')
_ALSO = {float: (float, int), tuple: (tuple, list)}  # types of a like default


def names():
  """Types of evaluators, sorted."""
  return discovery.names(_PACKAGE, 'evaluate')


class Evaluators:
  """The evaluators of a config, ready to run on any parameters.

  `config.evals.<name>`: type (file of the evaluator), source (name, split),
  pp, unit (by default `data.unit`), max_examples (0 = all),
  examples_during_training (how many at eval_every_steps; 0 = none), options (of
  the evaluator; may be left out).

  Args:
    config: whole config.
    model: from `models.build`.
    vocabularies: a `data.vocabularies.Vocabularies`.
    mesh, path: see Predictor.

  Raises:
    UserError: an unknown evaluator, key or option, or missing data.
  """

  def __init__(self, config, model, vocabularies, mesh=None,
               path='CHECKPOINT'):
    if mesh is not None:
      sharding.check_batch_size(config.eval_batch_size, mesh,
                                key='eval_batch_size')
    self._config, self._mesh = config, mesh
    self._vocabularies = vocabularies
    self.predictor = predictor_lib.Predictor(model, config, vocabularies,
                                             mesh=mesh, path=path)
    self._functions, self._pipelines = {}, {}
    self._left_out = set()
    for name, options in config.evals.items():
      self._functions[name] = _function(name, options)
      # Opened now, so that a missing split fails before training.
      self._pipelines[name] = self._open(options.source, options.pp,
                                         options.get('unit'))
    self._samples = None
    if config.samples.count:
      self._samples = self._open(config.samples.source, config.data.pp_eval)
      self.predictor.task_names()  # Likewise a task that is not complete.

  def _open(self, source, pp, unit=None):
    config = self._config
    data = config.data
    if unit and unit != data.get('unit', 'image'):
      data = data.copy_and_resolve_references()
      data.unit = unit
      if unit != 'image':
        data.sentences = 1  # the unit's own text
    rows = None if self._mesh is None else sharding.host_rows(
        self._mesh, config.eval_batch_size)
    vocabularies = self._vocabularies
    if 'grounding' in dict(pp_lib.bind(pp)):
      # Classes are words there: those of this dataset, whatever the model has
      # been trained for.
      labels = records.label_space(data.dir, source.name)
      vocabularies = dataclasses.replace(
          vocabularies, labels=labels or vocabularies.labels)
    return pipeline_lib.Pipeline(
        data, sources=(dict(source, weight=1.),), pp=pp,
        seed=config.seed, batch_size=config.eval_batch_size, train=False,
        rows=rows, vocabularies=vocabularies)

  def check_metric(self, key, metric):
    """UserError unless `metric` is '' or measured during training.

    Args:
      key: config key, for the error message.
      metric: 'eval/<name>/<metric>'.
    """
    during = [n for n, o in self._config.evals.items()
              if o.examples_during_training]
    parts = metric.split('/', 2)
    if metric and (len(parts) != 3 or parts[0] != 'eval'
                   or parts[1] not in during):
      raise errors.UserError(
          f"{key}: {metric!r}; expected 'eval/<name>/<metric>' of an "
          'evaluation during training '
          f'({", ".join(during) or "there is none"})')
    if metric:
      given = gives(self._config.evals[parts[1]].type)
      if not _among(parts[2], given):
        raise errors.UserError(
            f'{key}: {metric!r}; no metric {parts[2]!r} of the evaluator '
            f'{parts[1]!r}' + errors.nearest(parts[2], given))

  def run(self, variables, final=True, bar=False, details=None,
          between=lambda: None, left_out=None):
    """Runs all evaluators.

    Args:
      variables: {'params': ..., **model_state}.
      final: use `max_examples`; otherwise `examples_during_training`.
      bar: show progress bars.
      details: a dict, which gets {evaluator: [details.Section]} of those that
        show more than numbers.
      between: called after every batch, on all hosts; may raise.
      left_out: called with a line about each evaluator whose head was not
        trained. Without it, that is an error.

    Returns:
      ({'eval/<name>/<metric>': value}, {picture name: PIL image}).
    """
    scores = {}
    for name, options in self._config.evals.items():
      count = (options.max_examples if final
               else options.examples_during_training)
      if not final and not count:
        continue
      pipeline, more = self._pipelines[name], options.get('options', {})
      own = inspect.signature(self._functions[name]).parameters
      if details is not None and 'details' in own:
        more = {**more, 'details': details.setdefault(name, [])}
      with tqdm.tqdm(total=min(count or np.inf, pipeline.num_examples),
                     desc=name, unit='image', leave=False,
                     disable=not bar) as progress:
        def after_batch(done, progress=progress):
          progress.update(done - progress.n)
          between()
        try:
          found = self._functions[name](
              self.predictor, variables, pipeline, max_examples=count or None,
              progress=after_batch, **more)
        except predictor_lib.NotTrained as e:
          if left_out is None:
            raise
          if name not in self._left_out:  # Once is enough.
            left_out(f'evals.{name} is left out: {e}')
          self._left_out.add(name)
          if details is not None:
            details.pop(name, None)
          continue
      for metric in found:
        if not _among(metric, gives(options.type)):
          warnings.warn(f'{_PACKAGE}.{options.type}: GIVES lacks {metric!r}',
                        stacklevel=2)
      scores.update({f'eval/{name}/{k}': v for k, v in found.items()})
    images = pictures.sample_sheet(
        self.predictor, variables, self._samples,
        self._config.samples.count) if self._samples else []
    return scores, {f'sample_{i:02d}': x for i, x in enumerate(images)}


def gives(kind):
  """Patterns of the metrics that an evaluator gives; () if it does not say."""
  module = importlib.import_module(f'{_PACKAGE}.{kind}')
  return getattr(module, 'GIVES', ())


def _among(metric, patterns):
  return any(fnmatch.fnmatchcase(metric, p) for p in patterns)


def _function(name, options):
  """The `evaluate` of `config.evals.<name>`; checks the config's keys."""
  evaluate = discovery.load(_PACKAGE, options.type, 'evaluate',
                            f'evals.{name}.type')
  for key in options:
    if key not in _KEYS:
      raise errors.UserError(
          f'evals.{name}.{key}: no such key' + errors.nearest(key, _KEYS)
          + f"; the evaluator's own options are evals.{name}.options")
  own = {k: p.default for k, p in inspect.signature(evaluate).parameters.items()
         if k not in _COMMON}
  for key, value in options.get('options', {}).items():
    if key not in own:
      raise errors.UserError(f'evals.{name}.options.{key}: no such option'
                             + errors.nearest(key, own))
    default = own[key]
    if default is not None and not isinstance(
        value, _ALSO.get(type(default), type(default))):
      raise errors.UserError(
          f'evals.{name}.options.{key}: found {value!r}, expected '
          f'{type(default).__name__} such as {default!r}')
  return evaluate


def write(workdir, step, scores, images, details=None):
  """Writes WORKDIR/eval.json, samples/*.png, details/* and report.html.

  Args:
    workdir: folder, created if needed.
    step: step of the evaluated checkpoint.
    scores: {'eval/<name>/<metric>': value}.
    images: {picture name: PIL image}; they replace those with the same name.
    details: {evaluator: [details.Section]}; likewise.
  """
  os.makedirs(os.path.join(workdir, 'samples'), exist_ok=True)
  for name, image in images.items():
    image.save(os.path.join(workdir, 'samples', f'{name}.png'))
  files.write_json(os.path.join(workdir, 'eval.json'),
                   {'step': int(step), **scores})
  details_lib.write(workdir, step, details or {})
  report.write_report(workdir)
