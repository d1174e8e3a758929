"""The Python API of a trained model, for evaluators, predict and notebooks.

  predictor, variables = Predictor.from_checkpoint('W')
  found, = predictor.predict(variables, ['photo.jpg'], 'detect')

The tasks are in e2e_vlp_jax/tasks, one file each. Boxes never depend
on padding: the model's are relative to the unpadded image.
"""
import dataclasses

import flax
import jax
import ml_collections
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.evaluation import pairs
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import sharding

NotTrained = pairs.NotTrained
_ROWS = 8  # images that `predict` runs at once, if there are several


class Predictor(pairs.Pairs):
  """Runs tasks on images, or on batches of the input pipeline.

  Args:
    model: from `models.build`.
    config: whole config; reads `data.buckets`, `data.max_text`,
      `data.pp_eval`, `model`.
    vocabularies: a `data.vocabularies.Vocabularies`.
    mesh: if given, batches are split over its data axes. Every host then passes
      its own rows and gets the results of all rows.
    path: of the checkpoint, for error messages.
  """

  def __init__(self, model, config, vocabularies, mesh=None,
               path='CHECKPOINT'):
    self.model, self.config, self._path = model, config, path
    self.vocabularies = vocabularies
    self.tokenizer, self.labels = vocabularies.tokenizer, vocabularies.labels
    self.mesh = mesh
    self._tasks, self._programs = {}, {}

  @classmethod
  def from_checkpoint(cls, path):
    """(predictor, variables) from a checkpoint alone: a WORKDIR or a step.

    It may be in a bucket, gs://BUCKET/NAME.

    Raises:
      UserError: no checkpoint there, or not readable.
    """
    params, model_state, meta = checkpoint.load(path)
    config = ml_collections.ConfigDict(meta['config'])
    vocabularies = vocabularies_lib.Vocabularies.from_dict(meta)
    model = models.build(config, **vocabularies.sizes)
    variables = jax.device_put({'params': params, **model_state})
    return cls(model, config, vocabularies, path=path), variables

  # --- Tasks ------------------------------------------------------------------

  def task_names(self):
    """Names of the tasks that this model can do."""
    return [n for n in base.names() if not self._load(n).lacks(self.model)]

  def task(self, name):
    """Finds a task by name.

    Raises:
      UserError: no such task, or the model lacks a head that it needs.
    """
    task = self._load(name)
    lacking = task.lacks(self.model)
    if lacking:
      # A head that the config does not add belongs to another kind of model.
      how = task.finetuning
      raise errors.UserError(
          f'this checkpoint has no {" or ".join(lacking)} head, which task '
          f'{name!r} needs; its tasks: {", ".join(self.task_names())}'
          + (self._to_train(task) if how and how.head else ''))
    return task

  def _to_train(self, task):
    """'; train it with: COMMAND', or '' where there is no such command."""
    command = task.train_command(self._path)
    return f'; train it with: {command}' if command else ''

  def _load(self, name):
    if name not in self._tasks:
      self._tasks[name] = base.load(name)
    return self._tasks[name]

  # --- Images -----------------------------------------------------------------

  def predict(self, variables, images, task, texts=None, **options):
    """Runs a task on images.

    Images of different shapes go to the buckets of `data.buckets` and run in
    batches; each bucket compiles once.

    Args:
      variables: {'params': ..., **model_state}.
      images: list or other iterable of N images: a path, encoded bytes, or
        uint8 [H, W, 3]. For a task that takes two, N tuples of 1 or 2 images.
      task: name of a task, such as 'detect'.
      texts: for tasks that take texts: a list of strings that is used for
        every request, or a list of N lists of strings.
      **options: options of the task.

    Returns:
      list of N `tasks.base.Result`s of the task's own kind, in the order of
      the images. Texts of which the model reads only the beginning are in
      `cut_texts`.

    Raises:
      UserError: unknown task or option, the checkpoint lacks a head, the task
        needs a text and gets none, or a file is not an image.
    """
    task = self.task(task)
    options = task.full_options(options)
    if isinstance(images, (str, bytes, np.ndarray)):
      raise errors.UserError('images: one image; expected a list of images')
    images = task.check_images(images)
    texts = task.check_texts(texts, len(images), options)
    rows = 1 if len(images) == 1 else _ROWS
    if self.mesh is not None:
      rows = -(-rows // self.mesh.size) * self.mesh.size
    most = max(map(len, texts), default=0)
    examples = ({**inputs.example(self, shown, most=task.images),
                 **(task.text_inputs(self, own, most) if most else {})}
                for shown, own in zip(images, texts))
    fixed = task.fixed_inputs(self, variables, options)
    results = {}
    for numbers, batch in inputs.in_batches(examples, rows):
      results |= zip(numbers, self.results(
          variables, batch, task, [texts[n] for n in numbers], fixed,
          **options))
    read = [list(map(task.plain_text, own)) for own in texts]
    cut = inputs.cut_texts(self, [t for own in read for t in own])
    return [dataclasses.replace(results[n], cut_texts=[
        cut[t] for t in dict.fromkeys(own) if t in cut])
            for n, own in enumerate(read)]

  # --- Batches ----------------------------------------------------------------

  def results(self, variables, batch, task, texts=None, fixed=None, **options):
    """A task's `Result` for every row of all hosts' batches.

    Args:
      variables: {'params': ..., **model_state}.
      batch: the task's keys and image_size.
      task: a `tasks.base.Task`.
      texts: the batch's texts, a list of strings per row. Rows beyond the lists
        are left out.
      fixed: the task's `fixed_inputs`.
      **options: of the task.
    """
    options = task.full_options(options)
    arrays = self.run(variables, batch, task, fixed, **options)
    own = {k: v for k, v in options.items() if not task.options[k].compiled}
    return [task.result(self, {k: v[i] for k, v in arrays.items()},
                        tuple(map(int, size)), texts[i] if texts else (),
                        **own)
            for i, size in enumerate(self.gather(batch, 'image_size'))
            if not texts or i < len(texts)]

  def run(self, variables, batch, task, fixed=None, **options):
    """Runs a task's computation: dict of numpy arrays, all hosts' rows.

    It is compiled once per kind of task and shape of a batch.

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least the task's keys.
      task: a `tasks.base.Task`.
      fixed: the task's `fixed_inputs`.
      **options: of the task.

    Raises:
      NotTrained: the checkpoint was trained without a head of the task.
    """
    compiled = {k: v for k, v in task.full_options(options).items()
                if task.options[k].compiled}
    def compute(variables, batch, same):
      return task.compute(self, variables, {**batch, **same}, **compiled)
    batch = self.place({k: batch[k] for k in task.keys if k in batch})
    try:
      return sharding.to_host(self.program(
          (type(task), *sorted(compiled.items())), compute)(
              variables, batch, fixed or {}))
    except flax.errors.ScopeParamNotFoundError as e:
      heads = sorted({h for hs in task.requests.values() for h in hs})
      raise NotTrained(
          f'this checkpoint was trained without its {" or ".join(heads)} '
          f'head, which {task.name!r} needs' + self._to_train(task)) from e

  def program(self, key, function):
    """`function` compiled; the same program for the same key."""
    if key not in self._programs:
      self._programs[key] = jax.jit(function)
    return self._programs[key]

  def place(self, batch):
    """A host's batch on the mesh, if there is one."""
    return sharding.shard_batch(self.mesh, batch) if self.mesh else batch

  def gather(self, batch, *keys):
    """`batch[key]` for all hosts' rows, in the order of the results."""
    found = {k: np.asarray(batch[k]) for k in keys}
    if self.mesh is not None and jax.process_count() > 1:
      found = sharding.to_host(sharding.shard_batch(self.mesh, found))
    return found[keys[0]] if len(keys) == 1 else [found[k] for k in keys]

