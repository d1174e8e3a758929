"""Batches: a function of (seed, t), whatever the hosts, threads, restarts."""
import collections
import hashlib
import io
import os
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from e2e_vlp_jax.data import ops_image, order, photographs, pipeline
from e2e_vlp_jax.data import records, rng
from e2e_vlp_jax.data import tokenizer as tokenizer_lib
from e2e_vlp_jax.data import vocabularies as vocabularies_lib
from e2e_vlp_jax.data.label_space import LabelSpace
from e2e_vlp_jax.errors import UserError

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LABELS = LabelSpace(['cube', 'ball'], ['red', 'small'], {})
PP = ('decode|scale_crop|flip(swap_words=True)|fit|boxes|text|mlm(.2)'
      '|itm(.5)')
CONFIG = dict(dir='unused', buckets=((32, 32),), sentences=2, max_text=10,
              max_boxes=3, max_attributes=2, threads=1, pp_train=PP)


class FakeSplit:
  """Records without files. Record i says 'cube i' and shows grey level i."""

  def __init__(self, n, sizes=((24, 32),), label='cube', broken=(), raising=(),
               images=None):
    self._n, self._label, self._images = n, label, images or n
    self._broken, self._raising = broken, raising
    self._sizes = [sizes[i % len(sizes)] for i in range(n)]
    height, width = np.array(self._sizes, np.int32).reshape(n, 2).T
    self.index = dict(height=height, width=width,
                      num_texts=np.full(n, 2, np.int32),
                      num_objects=np.full(n, 1, np.int32))

  def __len__(self):
    return self._n

  def get(self, i):
    if i in self._raising:
      raise ValueError('damaged')
    h, w = self._sizes[i]
    file = io.BytesIO()
    Image.fromarray(np.full((h, w, 3), i % 256, np.uint8)).save(file, 'PNG')
    data = b'no image' if i in self._broken else file.getvalue()
    return dict(
        image=data, image_id=str(i % self._images), height=h, width=w,
        texts=[f'{self._label} {i % 50} left', f'a {self._label} {i % 50}'],
        has_attributes=True, objects=[dict(
            bbox=np.float32([.2, .1, .8, .1 + .8 * (i + 1) / self._n]),
            label=self._label, attributes=['red'], is_crowd=False, area=1.,
            id=i)])


def tokenizer():
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'left', 'right',
           'cube', 'ball', *map(str, range(50))]
  return tokenizer_lib.from_dict(dict(kind='wordpiece', tokens=words))


def make(splits, monkeypatch=None, **more):
  """A Pipeline over `splits`, a FakeSplit or [(FakeSplit, weight)]."""
  splits = splits if isinstance(splits, list) else [(splits, 1.)]
  found = {str(k): s for k, (s, _) in enumerate(splits)}
  opener = lambda data_dir, name, split: found[name]
  if monkeypatch:
    monkeypatch.setattr(records, 'open_split', opener)
  else:
    records.open_split = opener
  config = {**CONFIG, **more.pop('config', {})}
  return pipeline.Pipeline(
      config, sources=[dict(name=str(k), split='s', weight=w)
               for k, (_, w) in enumerate(splits)],
      **{**dict(vocabularies=vocabularies_lib.Vocabularies(
          tokenizer(), LABELS), pp=PP, seed=0, batch_size=8, train=True),
         **more})


@pytest.fixture
def open_(monkeypatch):
  return lambda splits, **more: make(splits, monkeypatch, **more)


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def digest(batch):
  h = hashlib.sha256()
  for key in sorted(batch):
    h.update(f'{key} {batch[key].dtype} {batch[key].shape}'.encode())
    h.update(batch[key].tobytes())
  return h.hexdigest()


MIX = [(24, ((24, 32), (32, 24), (40, 40))), (10, ((20, 40),))]
BUCKETS = ((24, 32), (32, 24), (28, 28))


def mixture():
  return [(FakeSplit(n, sizes), w) for (n, sizes), w in zip(MIX, (3., 1.))]


# --- Purity -----------------------------------------------------------------

PROCESS = '''
import sys
sys.path.insert(0, 'tests')
import test_pipeline as t
config = dict(buckets=t.BUCKETS, threads=int(sys.argv[1]))
p = t.make(t.mixture(), config=config)
ahead = p.iterate(3)
print(*[t.digest(next(ahead)[1]) for _ in range(4)])
'''


def test_two_processes_make_the_same_bytes(open_):
  """Another process with more threads, and this one."""
  run = subprocess.run(
      [sys.executable, '-c', PROCESS, '3'], check=True, timeout=120,
      capture_output=True, text=True, cwd=REPO,
      env={**os.environ, 'PYTHONHASHSEED': '2'})
  here = open_(mixture(), config=dict(buckets=BUCKETS))
  assert run.stdout.split() == [digest(here.batch(t)) for t in range(3, 7)]


def test_a_batch_depends_on_seed_and_step_alone(open_):
  p = open_(mixture(), config=dict(buckets=BUCKETS))
  first = [p.batch(t) for t in range(12)]
  for t in (7, 2, 11):  # not on what was asked before
    assert_equal(p.batch(t), first[t])
  for start in (0, 5):  # nor on where the run was resumed
    for k, (t, batch) in zip(range(6), p.iterate(start)):
      assert t == start + k
      assert_equal(batch, first[t])
  assert len({digest(b) for b in first}) == 12
  other = open_(mixture(), config=dict(buckets=BUCKETS), seed=1)
  assert all(digest(other.batch(t)) != digest(first[t]) for t in range(12))


def test_tensorflow_need_not_copy_images(open_):
  """It takes over what lies on 64 bytes."""
  data = open_(mixture(), config=dict(buckets=BUCKETS))
  assert not any(data.batch(t)['image'].ctypes.data % 64 for t in range(8))


@pytest.mark.parametrize('train', [True, False])
def test_dataset_is_made_in_parts_of_batches(open_, monkeypatch, train):
  """Parts of 3, 3 and 2 rows, several buckets, and tf.data's own tools."""
  monkeypatch.setattr(pipeline, '_CHUNK', 3)
  p = open_(mixture(), config=dict(buckets=BUCKETS, threads=3), train=train)
  dataset = p.dataset(1)
  assert dataset.element_spec['boxes'].shape == (8, 3, 4)
  assert dataset.element_spec['image'].shape.as_list() == [8, None, None, 3]
  count = p.num_batches or 9
  batches = list(dataset.enumerate().take(count - 1).as_numpy_iterator())
  assert len(batches) == count - 1
  for t, batch in batches:
    assert_equal(batch, p.batch(1 + t))  # t is numpy's


EXITS = '''
import os, signal, sys
sys.path.insert(0, 'tests')
import tensorflow
import test_pipeline as t

running = []
for how in ['end', 'raise', 'exit'] * 2:
  child = os.fork()  # A process of its own, for one import of TensorFlow.
  if not child:
    break
  running.append((how, child))
  if len(running) == 3:
    for way, child in running:
      _, status = os.waitpid(child, 0)
      print(way, os.waitstatus_to_exitcode(status), flush=True)
    running = []
else:
  sys.exit()
p = t.make(t.mixture(), config=dict(buckets=t.BUCKETS, threads=2))
batches, elements = p.iterate(), iter(p.dataset())
next(elements)
for n, _ in batches:
  if n == 1:
    signal.alarm(60)  # kills this process if it hangs
    if how == 'raise':
      raise ValueError('meant')
    if how == 'exit':
      sys.exit(3)
    break
# Both iterators are alive, and read ahead, when the process ends.
'''


def test_a_process_ends_under_a_living_iterator():
  run = subprocess.run([sys.executable, '-c', EXITS], check=True, timeout=300,
                       capture_output=True, text=True, cwd=REPO)
  assert run.stdout.split('\n')[:-1] == ['end 0', 'raise 1', 'exit 3'] * 2, (
      run.stderr)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('rows', [
    [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4], [1, 3], [6], [5, 7]]])
def test_hosts_make_parts_of_one_batch(open_, rows, train):
  options = dict(config=dict(buckets=BUCKETS), train=train)
  whole = open_(mixture(), **options)
  parts = [open_(mixture(), rows=r, **options) for r in rows]
  back = np.argsort(np.concatenate(rows))
  for t in range(whole.num_batches or 9):
    slices = [p.batch(t) for p in parts]
    assert_equal({k: np.concatenate([s[k] for s in slices])[back]
                  for k in slices[0]}, whole.batch(t))


def test_a_late_batch_costs_what_the_first_does(open_, monkeypatch):
  p = open_(mixture(), config=dict(buckets=BUCKETS))
  calls = []
  permute = rng.permute
  monkeypatch.setattr(rng, 'permute', lambda i, n, key: (
      calls.append(n), permute(i, n, key))[1])
  for t in (0, 10**9):
    calls.clear()
    assert p.batch(t)['valid'].all()
    assert len(calls) < 20


def test_prepared_scenes(tiny_scenes):
  """The whole way: files, records, batch."""
  config = {**CONFIG, 'dir': str(tiny_scenes), 'buckets': ((96, 96),),
            'max_boxes': 8, 'max_attributes': 4}
  labels = LabelSpace.load('scenes')
  p = pipeline.Pipeline(
      config, vocabularies=vocabularies_lib.Vocabularies(
          tokenizer_lib.load_tokenizer('wordpiece', 'scenes'), labels),
      sources=[dict(name='scenes', split='train', weight=1.)],
      pp='decode|fit|boxes|text|mlm|itm', seed=0, batch_size=8, train=True)
  p.check_labels()
  batch = p.batch(0)
  assert batch['valid'].all() and batch['task_mask/attributes'].all()
  assert (batch['text_mask'][:, 0].sum(-1) > 4).all()
  for k, example_id in enumerate(batch['example_id']):
    record = p.record(example_id)
    image = photographs.decode_image(record['image'])
    np.testing.assert_array_equal(batch['image'][k], image)
    names = [labels.classes[c] for c in batch['box_labels'][k][
        batch['box_mask'][k]]]
    assert names == [o['label'] for o in record['objects']]


# --- Order ------------------------------------------------------------------


@hypothesis.given(st.integers(1, 3000), st.integers(0, 10**12))
@hypothesis.settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(n, key):
  found = rng.permute(np.arange(n), n, key)
  assert sorted(found) == list(range(n))
  assert rng.permute([n // 2], n, key)[0] == found[n // 2]


def test_permute_is_fair():
  n, keys = 7, 3000
  found = np.stack([rng.permute(np.arange(n), n, rng.fold(k))
                    for k in range(keys)])
  counts = np.stack([(found == v).sum(0) for v in range(n)])
  chi = ((counts - keys / n)**2 / (keys / n)).sum()
  assert chi < 80  # 36 degrees of freedom
  assert abs((np.diff(found) == 1).mean() - (n - 1) / n / (n - 1)) < .02


@hypothesis.given(st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(
    lambda w: sum(w) > 1e-3), st.integers(0, 10**9))
@hypothesis.settings(max_examples=60, deadline=None)
def test_interleave_deals_in_proportion(weights, start):
  parts = order.shares(weights)
  assert parts.sum() == 1 << 24 and ((parts > 0) == (np.array(weights) > 0)
                                     ).all()
  slots = np.arange(start, start + 500)
  part, count = order.interleave(slots, parts)
  for k, share in enumerate(parts / parts.sum()):
    mine = np.flatnonzero(part == k)
    assert abs(len(mine) - 500 * share) <= len(parts) + 1
    if len(mine):  # numbered on without a gap, about where they should be
      assert (np.diff(count[mine]) == 1).all()
      assert abs(count[mine[0]] - slots[mine[0]] * share) <= len(parts) + 1


def test_every_example_comes_once_an_epoch(open_):
  p = open_(FakeSplit(20), batch_size=4)
  epochs = [np.concatenate([p.batch(t)['example_id'] for t in range(e, e + 5)])
            for e in (0, 5, 50)]
  for ids in epochs:
    assert sorted(ids) == list(range(20))
  assert len({tuple(ids) for ids in epochs}) == 3


def test_a_batch_has_one_bucket(open_):
  """Buckets come in proportion to their images, each with its nearest."""
  sizes = ((30, 40), (60, 80), (90, 120), (40, 30))  # 3 : 1
  p = open_(FakeSplit(40, sizes), config=dict(buckets=((24, 32), (32, 24))),
            pp='decode|fit')
  shapes, ids = [], []
  for t in range(60):
    batch = p.batch(t)
    shapes.append(batch['image'].shape[1:3])
    ids += batch['example_id'].tolist()
    tall = batch['image_size'][:, 0] > batch['image_size'][:, 1]
    assert (tall == (shapes[-1] == (32, 24))).all()
  assert abs(shapes.count((24, 32)) / 60 - .75) < .05
  assert set(ids) == set(range(40))
  # Shuffled: no simple rhythm that logging could keep step with.
  assert len({tuple(shapes[t:t + 4]) for t in range(0, 60, 4)}) > 2


def test_mixtures_have_their_weights(open_):
  splits = [(FakeSplit(30), 2.), (FakeSplit(7), 1.), (FakeSplit(5), 0.)]
  p = open_(splits, batch_size=6, pp='decode|fit')
  counts = collections.Counter()
  for t in range(70):
    ids = p.batch(t)['example_id']
    assert (ids < 30).sum() == 4 and (ids < 37).all()
    counts.update(ids.tolist())
  assert len(counts) == 37
  # Each source keeps its own epochs.
  assert set(counts[i] for i in range(30)) <= {9, 10}
  assert set(counts[i] for i in range(30, 37)) == {20}
  assert p.record(31)['image_id'] == '1'


def test_itm_takes_texts_of_other_images_of_the_source(open_):
  """Two records an image; the second source speaks of balls."""
  splits = [(FakeSplit(20, images=10), 1.), (FakeSplit(20, label='ball'), 1.)]
  p = open_(splits, pp='decode|fit|boxes|text|itm(1.)')
  words = tokenizer()
  for t in range(10):
    batch = p.batch(t)
    assert (batch['itm_labels'] == 0).all()
    for k, example_id in enumerate(batch['example_id']):
      text = words.decode(batch['masked_text'][k, 0])
      assert ('ball' in text) == (example_id >= 20)
      number = int(''.join(c for c in text if c.isdigit()))
      assert number % 10 != example_id % 10 or example_id >= 20
      assert number != example_id % 20
  alone = open_(FakeSplit(8, images=1), pp='decode|fit|text|itm(1.)')
  assert (alone.batch(0)['itm_labels'] == 1).all()


def test_texts_that_are_not_shown_do_not_stop_a_flip(open_):
  """Detection alone, on a dataset that has captions."""
  p = open_(FakeSplit(8), pp='decode|flip(p=1.)|fit|boxes')
  batch = p.batch(0)
  assert 'text' not in batch
  right = batch['boxes'][:, 0, 0] + batch['boxes'][:, 0, 2] / 2
  np.testing.assert_allclose(right, .9, atol=1e-6)


# --- Evaluation ---------------------------------------------------------------


def test_evaluation_sees_everything_once(open_):
  p = open_(mixture(), config=dict(buckets=BUCKETS), train=False,
            batch_size=5)
  batches = list(p.iterate())
  assert [t for t, _ in batches] == list(range(p.num_batches))
  ids = np.concatenate([b['example_id'] for _, b in batches])
  assert sorted(ids[ids >= 0]) == list(range(p.num_examples)) == list(
      range(34))
  for t, batch in batches:
    assert_equal(batch, p.batch(t))
    valid = batch['valid']
    assert (valid == (batch['example_id'] >= 0)).all()
    assert (np.diff(batch['example_id'][valid]) > 0).all()
    padding = {k: v[~valid] for k, v in batch.items()}
    for key, value in padding.items():
      fill = -1 if key in ('mlm_labels', 'itm_labels', 'box_attributes',
                           'example_id') else 0
      assert (value == fill).all(), key
  tail = list(p.iterate(3))
  assert [t for t, _ in tail] == list(range(3, p.num_batches))


def test_an_evaluated_example_does_not_depend_on_its_batch(open_):
  rows = []
  for size in (4, 7):
    p = open_(FakeSplit(12), train=False, batch_size=size,
              pp='decode|fit|boxes|text|mlm')
    rows.append({k: np.concatenate([b[k] for _, b in p.iterate()])[:12]
                 for k in p.batch(0)})
  assert_equal(*rows)


# --- Bad input --------------------------------------------------------------


def test_bad_records_are_masked_and_counted(open_, caplog):
  p = open_(FakeSplit(16, broken=(3,), raising=(5,)), batch_size=16)
  for _ in range(2):
    batch = p.batch(0)
  bad = np.isin(batch['example_id'], (3, 5))
  assert bad.sum() == 2 and (batch['valid'] == ~bad).all()
  assert p.bad_records == {'0/s record 3', '0/s record 5'}  # each once
  assert not batch['image'][bad].any()
  for key, value in batch.items():
    if key.endswith('mask') or key.startswith('task_mask'):
      assert not value[bad].any(), key
  assert (batch['mlm_labels'][bad] == -1).all()
  assert (batch['itm_labels'][bad] == -1).all()
  assert '0/s record 3 cannot be read' in caplog.text
  assert '0/s record 5: damaged' in caplog.text


def test_too_many_bad_records_end_the_run(open_):
  p = open_(FakeSplit(16, broken=range(12)), batch_size=4,
            config=dict(max_bad_records=10))
  with pytest.raises(UserError, match='11 unreadable.*max_bad_records is 10'):
    for _ in zip(range(4), p.iterate()):
      pass


def test_errors_in_rows_arrive_as_they_are(open_, monkeypatch):
  """And after the batches before them."""
  p = open_(FakeSplit(16), batch_size=4, pp='decode|fit', train=False)
  paint = ops_image.paint
  def broken(example, *args):
    if example['image_id'] == '9':
      raise ZeroDivisionError('a bug in an op')
    return paint(example, *args)
  monkeypatch.setattr(ops_image, 'paint', broken)
  batches = p.iterate()
  assert [next(batches)[0] for _ in range(2)] == [0, 1]
  with pytest.raises(ZeroDivisionError, match='a bug in an op'):
    next(batches)


def test_labels_are_checked_before_the_run(open_):
  splits = [(FakeSplit(5), 1.), (FakeSplit(5, label='cubes'), 1.)]
  p = open_(splits)
  expected = r"1/s record \d: .*'cubes'.*did you mean 'cube'"
  with pytest.raises(UserError, match=expected):
    p.check_labels()
  with pytest.raises(UserError, match=expected):
    list(zip(range(2), p.iterate()))
  open_(splits, pp='decode|fit|boxes(drop_unknown=True)').check_labels()
  open_(splits, pp='decode|fit').check_labels()


@pytest.mark.parametrize('n, more, expected', [
    (8, dict(batch_size=0), 'batch_size: 0'),
    (0, {}, '0/s has no examples'),
    (8, dict(pp='decode|boxes|text'), 'no fit'),
    (8, dict(pp='decode|fit|boxs'), "did you mean 'boxes'"),
    (8, dict(pp='fit|decode'), 'decode must stand before fit'),
    (8, dict(config=dict(max_text=2)), 'data.max_text: 2 is less than 3'),
    (8, dict(config=dict(buckets=())), 'data.buckets'),
    (8, dict(config=dict(buckets=((0, 3),))), 'data.buckets'),
])
def test_bad_values(open_, n, more, expected):
  with pytest.raises(UserError, match=expected):
    open_(FakeSplit(n), **more)


def test_bad_sources(open_):
  with pytest.raises(UserError, match='no sources'):
    open_([])
  with pytest.raises(UserError, match='weights'):
    open_([(FakeSplit(3), -1.)])
