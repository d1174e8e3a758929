"""Inputs of an evaluation: batches of a pipeline, or single images."""
import collections

import numpy as np

from e2e_vlp_jax.data import ops_image
from e2e_vlp_jax.data import pp as pp_lib
from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.tasks import base


def fit(image, buckets, pp='decode|fit'):
  """Places an image in the bucket of the nearest aspect ratio.

  Args:
    image: uint8 [H, W, 3].
    buckets: [(height, width)].
    pp: pp string whose image ops place the image.

  Returns:
    (uint8 [BH, BW, 3], bool [BH, BW]), the mask True on the image.
  """
  h, w = image.shape[:2]
  bucket = min(buckets, key=lambda b: abs(np.log(h / w) - np.log(b[0] / b[1])))
  plan = pp_lib.build(pp, None, only=ops_image.OPS)(
      {'height': h, 'width': w, 'bucket': tuple(bucket), 'texts': [],
       'objects': [], 'seed': 0})
  canvas = np.zeros((*bucket, 3), np.uint8)
  ops_image.paint(plan, image, canvas)
  return canvas, plan['image_mask']


def example(predictor, images, texts=(), count=0, most=1):
  """Makes a row of a batch as the pipeline does, with `data.pp_eval`.

  Args:
    predictor: a Predictor.
    images: an image (path, encoded bytes, or uint8 [H, W, 3], upright), or a
      list or tuple of 1 or 2 of them.
    texts: list of strings.
    count: S, to which the texts are padded; 0 = no keys of texts.
    most: images of a row; with 2, a missing second one is masked.

  Returns:
    dict: image, image_mask, image_size; if most is 2, second_image and
    second_image_mask, in the bucket of the first; if count, text and
    text_mask.
  """
  if not isinstance(images, (list, tuple)):
    images = (images,)
  first, *rest = (i if isinstance(i, np.ndarray) else
                  photographs.decode_image(i) for i in images)
  data = predictor.config.data
  canvas, mask = fit(first, data.buckets, data.pp_eval)
  out = {'image': canvas, 'image_mask': mask,
         'image_size': np.array(first.shape[:2], np.int32)}
  if most == 2:
    out['second_image'], out['second_image_mask'] = (
        fit(rest[0], [mask.shape], data.pp_eval) if rest else
        (np.zeros_like(canvas), np.zeros_like(mask)))
  if count:
    out['text'], out['text_mask'] = tokenize(predictor, texts, count)
  return out


def in_batches(examples, rows):
  """Examples -> batches of one shape and `rows` rows each.

  Args:
    examples: iterable of dicts from `example`.
    rows: B. The last batch of a shape is filled up with its last example, since
      another size would need another compilation.

  Yields:
    (numbers, batch): which examples the first rows are, and the batch.
  """
  waiting = collections.defaultdict(list)

  def batch(shape):
    numbers, found = zip(*waiting.pop(shape))
    found += found[-1:] * (rows - len(found))
    return numbers, {k: np.stack([e[k] for e in found]) for k in found[0]}

  for number, one in enumerate(examples):
    shape = one['image'].shape
    waiting[shape].append((number, one))
    if len(waiting[shape]) == rows:
      yield batch(shape)
  for shape in list(waiting):
    yield batch(shape)


def tokenize(predictor, texts, count):
  """At most `count` texts -> int32 [count, L] ids, bool [count, L] mask."""
  tokenizer, length = predictor.tokenizer, predictor.config.data.max_text
  ids = np.full((count, length), tokenizer.pad_id, np.int32)
  mask = np.zeros((count, length), bool)
  for row, text in enumerate(texts):
    tokens = tokenizer.encode(text, length)
    ids[row, :len(tokens)] = tokens
    # A text may hold the pad token's id only as padding.
    mask[row, :len(tokens)] = True
  return ids, mask


def cut_texts(predictor, texts):
  """{text: `tasks.base.CutText`} of the texts that `tokenize` cuts."""
  tokenizer, length = predictor.tokenizer, predictor.config.data.max_text
  found = {}
  for text in dict.fromkeys(texts):
    tokens = tokenizer.encode(text)
    if len(tokens) > length:
      found[text] = base.CutText(text, len(tokens), length,
                                 tokenizer.decode(tokens[:length - 1]))
  return found


def text_rows(predictor, batch, encoded, count):
  """The keys text and text_mask for this host's rows of a batch.

  Args:
    predictor: a Predictor.
    batch: of a pipeline.
    encoded: {example_id: (ids, mask)}, each at most `count` rows of [L], or
      (); rows of other examples are blank.
    count: S.

  Returns:
    {'text': int32 [B, S, L], 'text_mask': bool [B, S, L]}.
  """
  blank = tokenize(predictor, [], count)
  ids, mask = (np.stack([x] * len(batch['example_id'])) for x in blank)
  for row, i in enumerate(np.asarray(batch['example_id']).tolist()):
    for out, rows in zip((ids, mask), encoded.get(i, ())):
      out[row, :len(rows)] = rows
  return {'text': ids, 'text_mask': mask}


def rows_of(batch, made, blank):
  """Keys for this host's rows of a batch, made outside of the pipeline.

  Args:
    batch: of a pipeline.
    made: {example_id: dict of arrays}.
    blank: such a dict, for rows of other examples.

  Returns:
    dict of arrays [B, ...].
  """
  rows = [made.get(i, blank) for i in np.asarray(batch['example_id']).tolist()]
  return {k: np.stack([row[k] for row in rows]) for k in blank}


def batches(predictor, pipeline, max_examples=None, progress=None):
  """Yields an evaluation's batches, all of them or a sample.

  A sample has whole batches spread evenly over the split, since neighbouring
  batches have the same image shape.

  Args:
    predictor: a Predictor.
    pipeline: an evaluation `Pipeline`.
    max_examples: at most this many; None or 0 = all.
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
