"""Times the input pipeline against plain decoding of the same files."""
import concurrent.futures
import os

import numpy as np

from e2e_vlp_jax.data import photographs
from e2e_vlp_jax.data import pipeline
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.profiling import timing


def measure(config, images=512, rounds=5):
  """Measures how fast the config's pipeline makes batches, without a model.

  For comparison it decodes the same files to RGB, in turns (Pillow, as many
  threads as the pipeline). That is the least that any pipeline must do.

  Args:
    config: reads data, seed and batch_size.
    images: minimum number of images in a turn.
    rounds: number of turns of each; the median counts.

  Returns:
    {'pipeline_images_per_s', 'decoding_images_per_s', 'share'}; `share` is the
    first divided by the second.

  Raises:
    UserError: no such data.
  """
  data = training_pipeline(
      config, vocabularies_lib.Vocabularies.load(config.data))
  threads = config.data.get('threads', 0) or os.cpu_count()
  count = -(-images // config.batch_size)  # batches in a turn
  speeds = {'pipeline': [], 'decoding': []}
  for turn in range(rounds):
    ids, seconds = _make_batches(data, turn * (count + 1), count)
    speeds['pipeline'].append(len(ids) / seconds)
    seconds = _decode([data.record(i)['image'] for i in ids], threads)
    speeds['decoding'].append(len(ids) / seconds)
  made, decoded = (float(np.median(speeds[k])) for k in speeds)
  return {'pipeline_images_per_s': made, 'decoding_images_per_s': decoded,
          'share': made / decoded}


def _make_batches(data, start, count):
  """(ids of the examples, seconds) of `count` batches of a pipeline."""
  batches = data.iterate(start)
  next(batches)  # Starts the threads.
  ids = []

  def take():
    for _ in range(count):
      ids.extend(next(batches)[1]['example_id'].tolist())
  seconds = timing.seconds(take)
  batches.close()
  return ids, seconds


def _decode(images, threads):
  """Seconds to decode encoded images to RGB."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    return timing.seconds(
        lambda: list(pool.map(photographs.decode_image, images)))


def training_pipeline(config, vocabularies, rows=None):
  """The training Pipeline of a config."""
  return pipeline.Pipeline(
      config.data, vocabularies=vocabularies,
      sources=config.data.train, pp=config.data.pp_train, seed=config.seed,
      batch_size=config.batch_size, train=True, rows=rows)
