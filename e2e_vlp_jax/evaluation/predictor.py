"""The Python API of a trained model, for evaluators, predict and notebooks.

  predictor, variables = Predictor.from_checkpoint('W')
  predictor.predict(variables, 'photo.jpg', 'detect')

The methods on batches take `variables` first and compile once for each shape
of a batch. Boxes never depend on padding: the model's are relative to the
unpadded picture.
"""
import functools

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from e2e_vlp_jax import errors
from e2e_vlp_jax.data import pp as pp_lib
from e2e_vlp_jax.data import ops_image
from e2e_vlp_jax.data import photographs

# What `predict` can be asked for, and the head that it takes.
TASK_HEADS = {'detect': 'detection', 'caption': 'captioning', 'match': 'itm',
              'answer': 'vqa', 'ground': 'grounding'}
# Of attributes that do not exclude each other, those named with a box.
_MIN_ATTRIBUTE, _MAX_ATTRIBUTES = .1, 4


class Predictor:
  """Runs a model on batches, or on one image.

  Args:
    model: from `models.build`.
    config: whole config; reads `data.buckets`, `data.max_text`, `model`.
    vocabularies: a `data.vocabularies.Vocabularies`.
    mesh: batches are split over its data axes, if given. Every host then
      passes its own rows and gets the results of all rows.
  """

  def __init__(self, model, config, vocabularies, mesh=None):
    self.model, self.config = model, config
    self.vocabularies = vocabularies
    self.tokenizer, self.labels = vocabularies.tokenizer, vocabularies.labels
    labels = self.labels
    self._mesh = mesh
    # Groups of attributes of which an object has one each; names in no group
    # are a group of their own, of which it may have several.
    self.groups = {name: [labels.attribute_id(n) for n in names]
                   for name, names in labels.attribute_groups.items()}
    grouped = {i for ids in self.groups.values() for i in ids}
    self.ungrouped = [i for i in range(len(labels.attributes))
                      if i not in grouped]
    self._detect = jax.jit(self._detect_fn)
    self._match = jax.jit(self._match_fn)
    self._embed = jax.jit(self._embed_fn)
    self._mlm = jax.jit(self._mlm_fn)
    self._caption = jax.jit(self._caption_fn, static_argnames='beams')

  @classmethod
  def from_checkpoint(cls, path):
    """(predictor, variables) from a checkpoint alone: a WORKDIR or a step.

    Raises:
      UserError: no checkpoint there, or not readable.
    """
    # pylint: disable=g-import-not-at-top
    from e2e_vlp_jax import models
    from e2e_vlp_jax.data import vocabularies as vocabularies_lib
    from e2e_vlp_jax.training import checkpoint
    # pylint: enable=g-import-not-at-top
    params, model_state, meta = checkpoint.load(path)
    config = ml_collections.ConfigDict(meta['config'])
    vocabularies = vocabularies_lib.Vocabularies.from_dict(meta)
    model = models.build(config, **vocabularies.sizes)
    variables = jax.device_put({'params': params, **model_state})
    return cls(model, config, vocabularies), variables

  # --- Batches ----------------------------------------------------------------

  def detect(self, variables, batch):
    """Objects of every image; every query is kept, no suppression.

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image, image_mask, image_size.

    Returns:
      A list of B dicts of arrays: boxes [Q, 4] (x0, y0, x1, y1 in pixels of
      the upright original), scores [Q] and labels [Q] (the best class and its
      probability; DETR), attributes [Q, A] (probabilities).
    """
    out = self._run(self._detect, variables, batch,
                    ('image', 'image_mask', 'image_size'))
    return [{k: v[i] for k, v in out.items()}
            for i in range(len(out['scores']))]

  def _detect_fn(self, variables, batch):
    out = self.model.apply(variables, batch, {'image_only': ('detection',)})
    out = out['image_only']
    # The last class is 'no object'.
    scores = jax.nn.softmax(out['pred_logits'].astype(jnp.float32))[..., :-1]
    centre, size = jnp.split(out['pred_boxes'].astype(jnp.float32), 2, -1)
    boxes = jnp.concatenate([centre - size / 2, centre + size / 2], -1)
    h, w = jnp.split(batch['image_size'].astype(jnp.float32), 2, -1)
    # A label space may have no attributes.
    attributes = out.get('pred_attributes', jnp.zeros((*boxes.shape[:2], 0)))
    return {'boxes': boxes * jnp.concatenate([w, h, w, h], -1)[:, None],
            'scores': scores.max(-1), 'labels': scores.argmax(-1),
            'attributes': jax.nn.softmax(attributes.astype(jnp.float32))}

  def caption(self, variables, batch, beams=None):
    """A caption of every image, from the image alone.

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image, image_mask.
      beams: width of the beam search; greedy by default.

    Returns:
      A list of B (text, score); the score is the geometric mean of the
      tokens' probabilities.
    """
    out = self._run(functools.partial(self._caption, beams=beams or 1),
                    variables, batch, ('image', 'image_mask'))
    return [(self.text_of(tokens), float(np.exp(score)))
            for tokens, score in zip(out['tokens'], out['scores'])]

  def _caption_fn(self, variables, batch, beams):
    from e2e_vlp_jax.models import beam_search  # pylint: disable=g-import-not-at-top
    t = self.tokenizer
    tokens, scores = beam_search.generate(
        self.model, variables, batch, cls_id=t.cls_id, sep_id=t.sep_id,
        pad_id=t.pad_id, mask_id=t.mask_id,
        max_length=self.config.data.max_text, beams=beams)
    return {'tokens': tokens, 'scores': scores}

  def match(self, variables, batch):
    """How well each text fits its image: float32 [B, S] in [0, 1].

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image, image_mask, text, text_mask.
    """
    logits = self.match_logits(variables, batch)
    return np.asarray(jax.nn.softmax(logits)[..., 1])

  def match_logits(self, variables, batch):
    """Logits of 'no match' and 'match': float32 [B, S, 2]; as `match`."""
    return self._run(self._match, variables, batch,
                     ('image', 'image_mask', 'text', 'text_mask'))

  def _match_fn(self, variables, batch):
    out = self.model.apply(variables, batch, {'joint': ('itm',)})
    return out['joint']['itm_logits'].astype(jnp.float32)

  def embed(self, variables, batch):
    """Vectors of images and texts, whose products are ITC's logits.

    Texts' are of length 1, images' as long as the learned scale: float32
    [B, E] and [B, S, E].

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image, image_mask, text, text_mask.
    """
    return self._run(self._embed, variables, batch,
                     ('image', 'image_mask', 'text', 'text_mask'))

  def _embed_fn(self, variables, batch):
    out = self.model.apply(variables, batch, {'image_only': ('itc',),
                                              'text_only': ('itc',)})
    image = out['image_only']
    return ((image['image_embedding'] * image['itc_scale']).astype(
        jnp.float32), out['text_only']['text_embedding'].astype(jnp.float32))

  def mlm(self, variables, batch):
    """The likeliest token at every position of the masked texts: [B, S, L].

    Args:
      variables: {'params': ..., **model_state}.
      batch: at least image, image_mask, masked_text, masked_text_mask.
    """
    return self._run(self._mlm, variables, batch, (
        'image', 'image_mask', 'masked_text', 'masked_text_mask'))

  def _mlm_fn(self, variables, batch):
    out = self.model.apply(variables, batch, {'joint_masked': ('mlm',)})
    return out['joint_masked']['mlm_logits'].argmax(-1)

  def gather(self, batch, *keys):
    """`batch[key]` for all hosts' rows, in the order of the results."""
    found = {k: np.asarray(batch[k]) for k in keys}
    if self._mesh is not None and jax.process_count() > 1:
      from e2e_vlp_jax.training import sharding  # pylint: disable=g-import-not-at-top
      found = sharding.to_host(sharding.shard_batch(self._mesh, found))
    return found[keys[0]] if len(keys) == 1 else [found[k] for k in keys]

  def _run(self, fn, variables, batch, keys):
    """fn(variables, batch[keys]) on the mesh, its results as numpy arrays."""
    batch = {k: batch[k] for k in keys}
    if self._mesh is None:
      return jax.tree.map(np.asarray, fn(variables, batch))
    from e2e_vlp_jax.training import sharding  # pylint: disable=g-import-not-at-top
    return sharding.to_host(
        fn(variables, sharding.shard_batch(self._mesh, batch)))

  # --- Names ------------------------------------------------------------------

  def text_of(self, tokens):
    """Ids [L] up to the first end token -> text."""
    ids = [int(i) for i in tokens]
    if self.tokenizer.sep_id in ids[1:]:
      ids = ids[:ids.index(self.tokenizer.sep_id, 1)]
    return self.tokenizer.decode(ids)

  def attributes_of(self, probabilities):
    """[A] probabilities -> [(id, score)], likeliest first within its group.

    One attribute of each group that the label space knows, scored among the
    members of the group; of the attributes in no group the few likeliest.
    """
    chosen = []
    for ids in self.groups.values():
      p = probabilities[ids]
      chosen.append((ids[int(p.argmax())],
                     float(p.max() / max(p.sum(), 1e-9))))
    rest = sorted(self.ungrouped, key=lambda i: -probabilities[i])
    return chosen + [(i, float(probabilities[i]))
                     for i in rest[:_MAX_ATTRIBUTES]
                     if probabilities[i] >= _MIN_ATTRIBUTE]

  def objects_of(self, found, height, width, threshold=.5):
    """One image's `detect` as the JSON promises it, best first.

    Args:
      found: an item of `detect`.
      height, width: of the upright original; boxes are cut to it.
      threshold: least score.

    Returns:
      list of {'label', 'score', 'box', 'attributes': [{'label', 'score'}]}.
    """
    limit = np.array([width, height, width, height])
    return [{
        'label': self.labels.classes[int(found['labels'][q])],
        'score': float(found['scores'][q]),
        'box': np.clip(found['boxes'][q], 0, limit).tolist(),
        'attributes': [
            {'label': self.labels.attributes[i], 'score': score}
            for i, score in self.attributes_of(found['attributes'][q])],
    } for q in np.argsort(-found['scores'], kind='stable')
            if found['scores'][q] >= threshold]

  # --- One image --------------------------------------------------------------

  def predict(self, variables, image, task, text=None, *, threshold=.5,
              beams=None):
    """One image in, a JSON-able dict out.

    Args:
      variables: {'params': ..., **model_state}.
      image: path, encoded bytes, or uint8 [H, W, 3].
      task: 'detect', 'caption' or 'match'.
      text: what 'match' compares: a string or a list of them.
      threshold: least score of an object.
      beams: of the caption.

    Returns:
      {'task', 'image': {'height', 'width'}} and what the task makes:
      'objects', 'caption' or 'match'; boxes in pixels of the upright image.

    Raises:
      UserError: unknown task, a head that the checkpoint lacks, no text, or
        not an image.
    """
    self.check_task(task, text)
    if not isinstance(image, np.ndarray):
      image = photographs.decode_image(image)
    height, width = image.shape[:2]
    batch = self.batch_of(image, [text] if isinstance(text, str) else text)
    out = {'task': task, 'image': {'height': height, 'width': width}}
    try:
      if task == 'detect':
        found, = self.detect(variables, batch)
        out['objects'] = self.objects_of(found, height, width, threshold)
      elif task == 'caption':
        (words, score), = self.caption(variables, batch, beams)
        out['caption'] = {'text': words, 'score': score}
      else:
        texts = [text] if isinstance(text, str) else text
        out['match'] = [{'text': t, 'score': float(s)} for t, s in
                        zip(texts, self.match(variables, batch)[0])]
    except flax.errors.ScopeParamNotFoundError as e:
      raise errors.UserError(
          f'this checkpoint was trained without its {TASK_HEADS[task]} head: '
          f'--task {task} needs it') from e
    return out

  def check_task(self, task, text=None):
    """UserError unless this model can do `task` with `text`."""
    if task not in TASK_HEADS:
      raise errors.UserError(f'task: no task {task!r}'
                             + errors.nearest(task, TASK_HEADS))
    if TASK_HEADS[task] not in self.model.heads:
      can = [t for t, h in TASK_HEADS.items() if h in self.model.heads]
      raise errors.UserError(
          f'this checkpoint has no {TASK_HEADS[task]} head, which task '
          f'{task!r} needs; its tasks: {", ".join(can)}')
    if task == 'match' and not (text and all(
        t.strip() for t in ([text] if isinstance(text, str) else text))):
      raise errors.UserError("task 'match' needs a text to compare (--text)")

  def batch_of(self, image, texts=None):
    """A batch of one image, made as the pipeline makes it for `data.pp_eval`.

    Args:
      image: uint8 [H, W, 3], upright.
      texts: list of S strings, or None.

    Returns:
      dict: image, image_mask, image_size and, with texts, text and text_mask.
    """
    canvas, mask = fit(image, self.config.data.buckets,
                       self.config.data.pp_eval)
    batch = {'image': canvas[None], 'image_mask': mask[None],
             'image_size': np.array([image.shape[:2]], np.int32)}
    if texts:
      ids, mask = self.tokenize(texts, len(texts))
      batch |= {'text': ids[None], 'text_mask': mask[None]}
    return batch

  def tokenize(self, texts, count):
    """At most `count` texts -> int32 [count, L] ids, bool [count, L] mask."""
    length = self.config.data.max_text
    ids = np.full((count, length), self.tokenizer.pad_id, np.int32)
    mask = np.zeros((count, length), bool)
    for row, text in enumerate(texts):
      tokens = self.tokenizer.encode(text, length)
      ids[row, :len(tokens)] = tokens
      # A text may hold the pad token's id only as padding.
      mask[row, :len(tokens)] = True
    return ids, mask


def fit(image, buckets, pp='decode|fit'):
  """The image in the bucket of the nearest aspect ratio, as the pipeline's.

  Args:
    image: uint8 [H, W, 3].
    buckets: [(height, width)].
    pp: whose image ops decide how it lies there.

  Returns:
    (uint8 [BH, BW, 3], bool [BH, BW]), the mask True on the image.
  """
  h, w = image.shape[:2]
  bucket = min(buckets, key=lambda b: abs(np.log(h / w) - np.log(b[0] / b[1])))
  plan = pp_lib.build(pp, None, only=ops_image.OPS)(
      {'height': h, 'width': w, 'bucket': tuple(bucket), 'texts': [],
       'objects': [], 'seed': 0})
  canvas = np.zeros((*bucket, 3), np.uint8)
  ops_image.paint(plan, Image.fromarray(image), canvas)
  return canvas, plan['image_mask']


def batches(predictor, pipeline, max_examples=None, progress=None):
  """An evaluation's batches, all of them or a sample.

  A sample is whole batches spread evenly over the split, since neighbouring
  batches have the same shape of image.

  Args:
    predictor: a Predictor.
    pipeline: an evaluation `Pipeline`.
    max_examples: at most so many; None or 0 = all.
    progress: called with the number of examples done after each batch.

  Yields:
    (batch, ids): this host's batch, and the example_id of all hosts' rows,
    -1 where a row is padding, unreadable or beyond `max_examples`.
  """
  left = pipeline.num_examples
  if max_examples and max_examples < left:
    left = max_examples
    rows = len(predictor.gather(pipeline.batch(0), 'example_id'))
    count = min(-(-left // rows), pipeline.num_batches)
    steps = np.arange(count) * pipeline.num_batches // count
    source = (pipeline.batch(int(t)) for t in steps)
  else:
    source = (batch for _, batch in pipeline.iterate())
  done = 0
  for batch in source:
    ids, valid = predictor.gather(batch, 'example_id', 'valid')
    ids = np.where(valid & (np.cumsum(valid) <= left), ids, -1)
    left -= int((ids >= 0).sum())
    yield batch, ids
    done += int((ids >= 0).sum())
    if progress:
      progress(done)
