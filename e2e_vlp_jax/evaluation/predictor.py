"""The Python API of a trained model, for evaluators, predict and notebooks.

  predictor, variables = Predictor.from_checkpoint('W')
  found, = predictor.predict(variables, ['photo.jpg'], 'detect')

The tasks are in e2e_vlp_jax/tasks, one file each. Boxes never depend
on padding: the model's are relative to the unpadded image.
"""
import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.evaluation import inputs
from e2e_vlp_jax.models import contract
from e2e_vlp_jax.tasks import base
from e2e_vlp_jax.training import checkpoint
from e2e_vlp_jax.training import sharding

_ROWS = 8  # images that `predict` runs at once, if there are several


class NotTrained(errors.UserError):
  """The model offers a task, but the checkpoint lacks a head's parameters."""


class Predictor:
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
    self._mesh = mesh
    self._tasks, self._programs = {}, {}

  @classmethod
  def from_checkpoint(cls, path):
    """(predictor, variables) from a checkpoint alone: a WORKDIR or a step.

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
    texts = task.check_texts(texts, len(images))
    rows = 1 if len(images) == 1 else _ROWS
    if self._mesh is not None:
      rows = -(-rows // self._mesh.size) * self._mesh.size
    most = max(map(len, texts), default=0)
    examples = (inputs.example(self, shown, own, most, task.images)
                for shown, own in zip(images, texts))
    results = {}
    for numbers, batch in inputs.in_batches(examples, rows):
      results |= zip(numbers, self.results(
          variables, batch, task, [texts[n] for n in numbers], **options))
    cut = inputs.cut_texts(self, [t for own in texts for t in own])
    return [dataclasses.replace(results[n], cut_texts=[
        cut[t] for t in dict.fromkeys(own) if t in cut])
            for n, own in enumerate(texts)]

  # --- Batches ----------------------------------------------------------------

  def results(self, variables, batch, task, texts=None, **options):
    """A task's `Result` for every row of all hosts' batches.

    Args:
      variables: {'params': ..., **model_state}.
      batch: the task's keys and image_size.
      task: a `tasks.base.Task`.
      texts: the batch's texts, a list of strings per row. Rows beyond the lists
        are left out.
      **options: of the task.
    """
    options = task.full_options(options)
    arrays = self.run(variables, batch, task, **options)
    own = {k: v for k, v in options.items() if not task.options[k].compiled}
    return [task.result(self, {k: v[i] for k, v in arrays.items()},
                        tuple(map(int, size)), texts[i] if texts else (),
                        **own)
            for i, size in enumerate(self.gather(batch, 'image_size'))
            if not texts or i < len(texts)]

  def run(self, variables, batch, task, **options):
    """Runs a task's computation: dict of numpy arrays, all hosts' rows.

    It is compiled once per kind of task and shape of a batch.

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least the task's keys.
      task: a `tasks.base.Task`.
      **options: of the task.

    Raises:
      NotTrained: the checkpoint was trained without a head of the task.
    """
    fixed = {k: v for k, v in task.full_options(options).items()
             if task.options[k].compiled}
    compute = functools.partial(task.compute, self, **fixed)
    batch = self._place({k: batch[k] for k in task.keys if k in batch})
    try:
      return sharding.to_host(self._program(
          (type(task), *sorted(fixed.items())), compute)(variables, batch))
    except flax.errors.ScopeParamNotFoundError as e:
      heads = sorted({h for hs in task.requests.values() for h in hs})
      raise NotTrained(
          f'this checkpoint was trained without its {" or ".join(heads)} '
          f'head, which {task.name!r} needs' + self._to_train(task)) from e

  # --- Images and texts that are encoded once, and fused in pairs ------------

  def encode_images(self, variables, batch, embed=False, features=True):
    """Encodes the images of a batch, each once.

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image and image_mask of this host's rows.
      embed: whether to also return vectors, of a model with an ITC head.
      features: whether to return features.

    Returns:
      (features on the device, for `score_pairs`; float32 [B, E] vectors of all
      hosts' rows, whose products with those of texts are ITC's logits), None
      for what is not wanted.

    Raises:
      NotTrained: the checkpoint was trained without an ITC head.
    """
    batch = self._place({k: batch[k] for k in ('image', 'image_mask')})
    kept, vectors = self._encode(variables, batch, 'image', embed, features)
    return kept, vectors and sharding.to_host(vectors)['image']

  def encode_texts(self, variables, ids, mask, embed=False, features=True,
                   at_once=16):
    """Encodes M texts, each once.

    Args:
      variables: {'params': ..., **model_state}.
      ids, mask: [M, L] tokens, the same on all hosts.
      embed, features: see `encode_images`.
      at_once: number of texts in each row of a batch.

    Returns:
      (features with leading axis M, on every device; float32 [M, E] vectors),
      None for what is not wanted.
    """
    rows = self.config.eval_batch_size
    own = (np.arange(rows) if self._mesh is None else
           sharding.host_rows(self._mesh, rows))
    at_once = min(at_once, -(-len(ids) // rows))
    size, parts = rows * at_once, []
    for start in range(0, len(ids), size):
      # The last batch is filled up: another size would compile again.
      at = np.minimum(np.arange(start, start + size), len(ids) - 1)
      at = at.reshape(rows, at_once)[own]
      found = self._encode(variables, self._place(
          {'text': ids[at], 'text_mask': mask[at]}), 'text', embed, features)
      parts.append(jax.tree.map(
          lambda x: x.reshape(size, *x.shape[2:])[:len(ids) - start],  # pylint: disable=cell-var-from-loop
          sharding.to_host(found)))
    kept, vectors = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    everywhere = {} if self._mesh is None else {
        'device': sharding.replicated(self._mesh)}
    return (jax.device_put(kept, **everywhere),
            vectors and vectors['text'])

  def _encode(self, variables, batch, side, embed, features):
    """(features or None, {side: vectors} or None) of images or texts."""
    view = f'{side}_only'

    def encode(variables, batch):
      def run(model):
        pieces = contract.Pieces(model, batch, {view: ('itc',)}, False)
        vectors = None
        if embed:
          found = model.outputs_of(view, pieces)
          vectors = found[f'{side}_embedding'].astype(jnp.float32)
          if side == 'image':
            vectors *= found['itc_scale']
        return (pieces[side] if features else None,
                {side: vectors} if embed else None)
      return self.model.apply(variables, method=run)
    try:
      return self._program(('encode', side, embed, features), encode)(
          variables, batch)
    except flax.errors.ScopeParamNotFoundError as e:
      raise NotTrained(
          'this checkpoint was trained without an itc head, by which images '
          'and texts are embedded') from e

  def score_pairs(self, variables, images, texts, index):
    """ITM's logits of images with texts: float32 [B, P, 2], all hosts' rows.

    Args:
      variables: {'params': ..., **model_state}.
      images: features of B images, from `encode_images`.
      texts: features of M texts, from `encode_texts`.
      index: int32 [B, P] of this host's rows: P of the texts for each image.

    Raises:
      NotTrained: the checkpoint was trained without an ITM head.
    """
    def score(variables, images, texts, batch):
      def pairs(model):
        words = jax.tree.map(lambda x: x[batch['index']], texts)
        return model.pairs(images, words, ('itm',))['itm_logits']
      return self.model.apply(variables, method=pairs).astype(jnp.float32)
    try:
      return sharding.to_host(self._program('score_pairs', score)(
          variables, images, texts, self._place({'index': index})))
    except flax.errors.ScopeParamNotFoundError as e:
      raise NotTrained('this checkpoint was trained without an itm head, which '
                       'scores pairs of images and texts') from e

  def _program(self, key, function):
    """`function` compiled; the same program for the same key."""
    if key not in self._programs:
      self._programs[key] = jax.jit(function)
    return self._programs[key]

  def _place(self, batch):
    """A host's batch on the mesh, if there is one."""
    return sharding.shard_batch(self._mesh, batch) if self._mesh else batch

  def gather(self, batch, *keys):
    """`batch[key]` for all hosts' rows, in the order of the results."""
    found = {k: np.asarray(batch[k]) for k in keys}
    if self._mesh is not None and jax.process_count() > 1:
      found = sharding.to_host(sharding.shard_batch(self._mesh, found))
    return found[keys[0]] if len(keys) == 1 else [found[k] for k in keys]

