"""`scenes`: drawn scenes that need no download.

The picture and every field of the record come from one scene graph: see `draw`
(pictures), `text` (language) and `facts` (truth). Example i of a split depends
only on the seed, the split's name and i, so a smaller split is a prefix of a
larger one. Splits have different seeds; `unseen` holds scenes with colour-shape
pairs that no other split shows or mentions. The second picture of a statement
is drawn for it and is not a record, so the statement stores its bytes.
"""
import functools
import json
import multiprocessing
import os
import random
import signal

from e2e_vlp_jax.data.datasets.scenes import draw as scene_draw
from e2e_vlp_jax.data.datasets.scenes import facts as scene_facts
from e2e_vlp_jax.data.datasets.scenes import grounding as scene_grounding
from e2e_vlp_jax.data.datasets.scenes import text as scene_text
from e2e_vlp_jax.data.datasets import base

_SPLITS = dict(train=20000, validation=1024, test=1024, unseen=512)
# For fewer images, starting processes takes longer than it saves.
_FEW = 600


class Builder(base.RecordBuilder):
  """Draws all splits with one process per core."""
  name = 'scenes'
  LABELS = 'scenes'
  OPTIONS = {'seed': (0, 'seed of the scenes'),
             'grounded': (False, 'also give the boxes of every phrase of the '
                          'captions; nothing else changes'),
             **{f'num_{s}': (n, f'images of the {s} split')
                for s, n in _SPLITS.items()}}

  def sources(self):
    seed, grounded = self.options['seed'], self.options['grounded']
    return {split: (n, functools.partial(_examples, seed, split, n, grounded))
            for split in _SPLITS
            if (n := self.options[f'num_{split}']) > 0}


def example(seed, split, i, grounded=False):
  """Record i of a split; see `Builder.OPTIONS`."""
  name = f'{seed} {split} {i}'
  unseen = split == 'unseen'
  pairs = scene_draw.ALL_PAIRS if unseen else scene_draw.SEEN_PAIRS
  scene, image = _picture(name, unseen)
  other, other_image = _picture(f'{name} second', unseen)
  rng = random.Random(f'text {name}')
  side = scene_draw.SIDE
  box = lambda o: base.stored_box(o['box'], side, side)
  statement, label = scene_text.statement(scene, other, rng, pairs)
  found = base.record(
      image=image, image_id=f'{split}-{i:06d}', height=side, width=side,
      texts=scene_text.captions(scene, rng),
      objects=[dict(bbox=box(o), label=o['shape'],
                    attributes=[o['colour'], o['size'], o['texture']],
                    is_crowd=False, area=float(o['area']),
                    id=i * scene_draw.MAX_OBJECTS + k + 1)
               for k, o in enumerate(scene['objects'])],
      phrases=[dict(text=t, bbox=box(o))
               for t, o in scene_text.phrases(scene, rng)],
      questions=[dict(question=q, answers=[a], kind=k)
                 for q, a, k in scene_text.questions(scene, rng, pairs)],
      refexps=[dict(text=t, bbox=box(o))
               for t, o in scene_text.referring(scene, rng)],
      statements=[dict(second_image=other_image, statement=statement,
                       label=label)],
      entailment=[dict(text=t, label=l)
                  for t, l in scene_text.entailment(scene, rng, pairs)],
      scene_json=json.dumps(scene), has_attributes=True)
  if grounded:
    found['phrases'] += [
        dict(text=found['texts'][k][slice(*span)], bbox=box(o), text_number=k,
             spans=[span])
        for k, span, o in scene_grounding.all_phrases(found['texts'], scene)]
  return found


def _picture(name, unseen):
  scene = scene_draw.sample_scene(name, unseen)
  return scene, scene_draw.encode_png(scene_draw.draw_scene(scene, name))


def _examples(seed, split, n, grounded):
  one = functools.partial(example, seed, split, grounded=grounded)
  cores = len(os.sched_getaffinity(0)) if hasattr(
      os, 'sched_getaffinity') else os.cpu_count()
  if n < _FEW or cores == 1:
    yield from map(one, range(n))
    return
  # Spawned: forking a process with TensorFlow's threads is not safe.
  with multiprocessing.get_context('spawn').Pool(
      cores, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
    yield from pool.imap(one, range(n), chunksize=64)


def check_caption(text, record):
  """Checks a caption against the scene that a record was drawn from.

  Returns:
    {'facts_right': whether every object, attribute, count and relation of
    the caption is true}; {} for a record without a scene.
  """
  if not record['scene_json']:
    return {}
  scene = json.loads(record['scene_json'])
  return {'facts_right': scene_facts.check_caption(text, scene)['right']}
