"""The pieces of the training loop, and that every exit releases them."""
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax import models
from e2e_vlp_jax import train
from e2e_vlp_jax.data import synthetic
from e2e_vlp_jax.data import vocabularies
from e2e_vlp_jax.profiling import timing
from e2e_vlp_jax.training import assemble
from e2e_vlp_jax.training import monitor as monitor_lib
from e2e_vlp_jax.training import nonfinite
from e2e_vlp_jax.training import profiler as profiler_lib
from e2e_vlp_jax.training import progress
from e2e_vlp_jax.training import sharding
from e2e_vlp_jax.training import stop_signal
from tests import small_run


class Time:
  """A clock that tests set."""

  def __init__(self, monkeypatch):
    self.now = 0.
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: self.now)


# --- Time -------------------------------------------------------------------
def test_the_clock_attributes_all_time_to_phases(monkeypatch):
  time = Time(monkeypatch)
  clock = progress.Clock('init')

  def batches():
    for i in range(2):
      time.now += 3
      yield i
  time.now = 1.
  for _ in clock.waiting('data', batches()):
    clock.enter('step')
    time.now += 1
  assert clock.seconds('data') == 6 and clock.seconds('step') == 2
  assert clock.fractions() == pytest.approx({
      'perf/time/init': 1 / 9, 'perf/time/data': 6 / 9,
      'perf/time/step': 2 / 9})


def test_the_rate_leaves_out_compilation_evaluation_and_saves(monkeypatch):
  time = Time(monkeypatch)
  clock = progress.Clock('init')

  def multiply(state, batch):
    return state + 1, jnp.sum(batch['image'] @ state)
  mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  step = progress.MeteredStep(jax.jit(multiply), clock, mesh)
  batch = {'image': jnp.ones((4, 5))}
  state = jnp.ones((5, 5))
  state, _ = step(state, batch)  # Compiles.
  assert not step.speed()
  with step.interrupted('save'):
    time.now += 100
  for _ in range(3):
    clock.enter('data')
    time.now += 1
    state, _ = step(state, batch)
    time.now += 1
  speed = step.speed()
  assert speed['perf/step_s'] == 2 and speed['perf/data_wait'] == .5
  assert speed['perf/images_per_s'] == 4 / 2
  assert speed['perf/tflops_per_s'] == 2 * 4 * 5 * 5 / 2 / 1e12
  assert speed['perf/save_blocked_s'] == 100
  # Another bucket compiles, and the measurement begins again.
  step(state, {'image': jnp.ones((2, 5))})
  assert not step.speed()


def test_a_bucket_compiles_once():
  """200 steps in random order of three buckets: three programs."""
  config = small_run.get_config('light')
  config.data.buckets = ((48, 48), (48, 72), (72, 48))
  sizes = vocabularies.Vocabularies.load(config.data).sizes
  draw = lambda bucket, size=8: synthetic.synthetic_batch(
      config.data, batch_size=size, bucket=bucket, **sizes)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  assembly = assemble.Assembly(config, models.build(config, **sizes), mesh,
                               draw(0, 1))
  state, step = assembly.init(), assembly.step()
  batches = [sharding.shard_batch(mesh, draw(i)) for i in range(3)]
  order = np.random.default_rng(4).integers(0, 3, 200)
  with timing.compilations() as compiled:
    for bucket in order:
      state, metrics = step(state, batches[bucket])
  assert np.isfinite(metrics['loss']) and int(state.step) == 200
  assert len(compiled) == 3


# --- Updates that are not finite --------------------------------------------
def test_nonfinite_inspects_the_step_before(tmp_path):
  data = types.SimpleNamespace(
      example_ids=lambda t: np.array([10 * t, -1]),
      name=lambda i: f'record {i}')
  watch = nonfinite.NonFinite(str(tmp_path), data, limit=2)
  good = {'loss': np.float32(1), 'skipped': np.float32(0)}
  bad = {'loss': np.float32(np.nan), 'skipped': np.float32(1)}
  for t, metrics in enumerate([bad, good, bad]):
    watch.look(t, metrics)  # One, none, and one that is not inspected yet.
  watch.look(3, bad)
  with pytest.raises(errors.UserError, match='step 5: 2 updates in a row'):
    watch.look(4, good)
  written = [json.loads(line)
             for line in (tmp_path / 'nonfinite.jsonl').open()]
  assert [x['step'] for x in written] == [1, 3, 4]
  assert written[1] == {'step': 3, 'example_ids': [20],
                        'examples': ['record 20'], 'not_finite': ['loss']}
  # At the end nobody comes after: the last step is inspected at once.
  watch = nonfinite.NonFinite(str(tmp_path), data, limit=1)
  with pytest.raises(errors.UserError, match='1 updates'):
    watch.look(0, bad, wait=True)


# --- Exits ------------------------------------------------------------------
@pytest.fixture
def ctrl_c():
  """Ctrl-C interrupts, also where the tests run in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_signals_are_requests_inside_only(ctrl_c):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with stop_signal.StopSignal() as stop:
    signal.raise_signal(signal.SIGTERM)
    assert not stop.requested  # A step sees one answer.
    stop.look()
    assert stop.requested and stop.exit_code == 0
  with stop_signal.StopSignal() as stop:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    stop.look()
  assert stop.requested and stop.exit_code == 130
  after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  assert after == before


def test_an_error_ends_the_trace_and_gives_the_signals_back(
    ctrl_c, tiny_scenes, tmp_path, monkeypatch):
  """As in a notebook, whose next Ctrl-C must be an interrupt again."""
  config = small_run.get_config('light')
  config.update_from_flattened_dict({
      'data.dir': str(tiny_scenes), 'profile.start': 1, 'profile.steps': 100,
      'checkpoint.every_steps': 1, 'tensorboard': True})

  def look(self, t, metrics, wait=False):
    if t == 2:
      raise RuntimeError('in the middle')
  monkeypatch.setattr(nonfinite.NonFinite, 'look', look)
  closed = []
  leave = monitor_lib.Monitor.__exit__
  monkeypatch.setattr(monitor_lib.Monitor, '__exit__', lambda self, *error: (
      closed.append(error[0]), leave(self, *error))[1])
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError, match='in the middle'):
    train.train(config, str(tmp_path))
  assert before == (signal.getsignal(signal.SIGINT),
                    signal.getsignal(signal.SIGTERM))
  with pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
  assert closed == [RuntimeError]
  assert list(tmp_path.rglob('*.xplane.pb'))
  with jax.profiler.trace(str(tmp_path / 'next')):  # No other one is open.
    pass
  # The saves under way were finished.
  assert {p.name for p in (tmp_path / 'checkpoints').iterdir()} == {'1', '2'}


def test_a_profile_is_asked_for_by_a_file(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace',
                      lambda _: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace',
                      lambda: calls.append('stop'))
  with profiler_lib.Profiler(str(tmp_path), start=3, steps=2) as profiler:
    for t in range(8):
      profiler.before(t)
      calls.append(t)
      profiler.after(t + 1, None, look_for_file=True)
      if t == 5:
        (tmp_path / 'profile_now').write_text('')
  assert calls == [0, 1, 2, 'start', 3, 4, 'stop', 5, 6, 'start', 7, 'stop']
  assert not (tmp_path / 'profile_now').exists()
