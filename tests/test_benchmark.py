"""benchmark: what it reports, where it says time goes, what it refuses."""
import functools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from e2e_vlp_jax import benchmark
from e2e_vlp_jax.profiling import by_module
from tests import commands

TINY = 'configs/e2e_vlp.py:tiny'


# --- Parts ------------------------------------------------------------------
@pytest.mark.parametrize('name,part', [
    ('jit(step)/jvp(Model)/Model.fuse/encoder/layer0/ffn/add', 'encoder'),
    ('jit(step)/transpose(jvp(Model))/Model._image_only/Model.decode/decoder/'
     'layer1/norm1/mul', 'decoder'),
    # The module that was called first: the head uses the embedding's table.
    ('jit(step)/jvp(Model)/mlm_head/text_embedding.attend/dot', 'mlm_head'),
    ('jit(step)/losses/jit(hungarian)/shard_map/vmap()/while', 'matching'),
    ('jit(step)/jvp(losses)/reduce_sum', 'losses'),
    ('jit(step)/optimizer/mul', 'optimizer'),
    ('jit(step)/jvp(Model)/mul', None),
])
def test_part_of_a_scope(name, part):
  modules = {'encoder', 'decoder', 'mlm_head', 'text_embedding'}
  assert by_module.part_of(name, modules) == part


def test_nested_operations_count_once():
  events = [(0, 100, 'while'), (10, 30, 'body'), (15, 5, 'inner'),
            (50, 20, 'body'), (100, 7, 'after')]
  assert sorted(map(tuple, by_module._own_times(events))) == [
      ('after', 7), ('body', 20), ('body', 25), ('inner', 5), ('while', 50)]


def test_operations_at_the_same_time_count_once():
  events = [(0, 10, 'first'), (5, 15, 'second'), (8, 1, 'third'),
            (30, 2, 'last')]
  assert list(map(tuple, by_module._own_times(events))) == [
      ('first', 5), ('second', 14), ('third', 1), ('last', 2)]


def test_trace_finds_the_expensive_part(tmp_path):
  def step(x):
    with jax.named_scope('backbone'):
      for _ in range(8):
        x = jnp.sin(x @ x)
    with jax.named_scope('optimizer'):
      return x + jnp.sin(x)
  x = jnp.ones((600, 600)) / 600
  compiled = jax.jit(step).lower(x).compile()
  operations = by_module.of_operations(compiled.as_text(), {'backbone'})
  assert set(operations.values()) >= {'backbone', 'optimizer'}
  jax.block_until_ready(compiled(x))
  by_module.trace(lambda: jax.block_until_ready(compiled(x)), str(tmp_path))
  found, count = by_module.measured(str(tmp_path), operations)
  assert found['backbone'] > .8 * sum(found.values())
  assert found['optimizer'] > 0
  assert count >= 2


def test_a_fusion_counts_for_the_part_of_what_is_inside():
  """On a GPU it is often named after a conversion outside all parts."""
  hlo = """
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%p, %p), metadata={op_name="jit(step)/backbone/add"}
  %b = f32[8]{0} add(%a, %p), metadata={op_name="jit(step)/backbone/add"}
  %c = f32[8]{0} add(%b, %p), metadata={op_name="jit(step)/encoder/add"}
  ROOT %d = f32[8]{0} convert(%c), metadata={op_name="jit(step)/convert"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/convert"}
  %outside = f32[8]{0} add(%f, %f), metadata={op_name="jit(step)/mask"}
  ROOT %copy = f32[8]{0} copy(%f)
}
"""
  found = by_module.of_operations(hlo, {'backbone', 'encoder'})
  assert found['f'] == 'backbone' and found['copy'] == 'backbone'
  assert found['outside'] == by_module.OTHER


def test_kernels_of_a_command_buffer_count_for_their_parts(
    monkeypatch, tmp_path):
  """As traced on an H100: their operation is the whole graph."""
  def event(start, name, operation):
    return types.SimpleNamespace(start_ns=start, duration_ns=10, name=name,
                                 stats=[('hlo_op', operation)])
  graph = 'command_buffer_7'
  line = types.SimpleNamespace(events=[
      event(40, 'memcpy', graph),
      event(0, 'sm90_conv', 'cudnn-conv.3'), event(10, 'loop_fusion_2', graph),
      event(20, 'nvjet_sm90_64x8', graph), event(30, 'input_fusion', graph),
      event(50, 'loop_fusion_4', graph)])
  data = types.SimpleNamespace(planes=[
      types.SimpleNamespace(name='/device:GPU:0', lines=[line])])
  (tmp_path / 'a.xplane.pb').touch()
  monkeypatch.setattr(jax.profiler, 'ProfileData', types.SimpleNamespace(
      from_file=lambda path: data))
  found, count = by_module.measured(str(tmp_path), {
      'cudnn-conv.3': 'backbone', 'loop_fusion.2': 'encoder',
      'input_fusion': 'decoder', 'loop_fusion.4': by_module.OTHER})
  assert count == 6
  assert {k: round(v * 1e9) for k, v in found.items()} == {
      'backbone': 10, 'encoder': 20, 'decoder': 20, 'other': 10}


# --- The command ------------------------------------------------------------
def test_benchmark_without_tensorflow(tmp_path):
  """Every promised key; in a process that could not import TensorFlow."""
  out = tmp_path / 'report.json'
  code = f'''
import sys
for name in ('tensorflow', 'tensorflow_datasets', 'torch', 'transformers'):
  sys.modules[name] = None  # any import of it raises
from e2e_vlp_jax import benchmark
benchmark.main(['--config', '{TINY}', '--steps', '3', '--batch-size', '4',
                '--config.model.encoder_layers=1',
                '--config.model.decoder_layers=1',
                '--score', '--json', {str(out)!r}])
'''
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  run = subprocess.run([sys.executable, '-c', code], check=False,
                       capture_output=True, text=True,
                       env={**os.environ, 'XLA_FLAGS': flags})
  assert run.returncode == 0, run.stderr
  report = json.loads(out.read_text())
  assert report['batch_size'] == 4 and report['devices'] == 1
  assert report['images_per_s'] > 0 and report['compile_s'] > 0
  assert 0 < report['step_time_s']['p50'] <= report['step_time_s']['p90']
  assert 0 < report['mfu'] < 1 and 'measured' in report['mfu_of']
  assert report['peak_memory_bytes'] > 2**27
  assert sum(report['parts'].values()) == pytest.approx(1)
  assert {'backbone', 'encoder', 'decoder', 'matching', 'optimizer'} <= set(
      report['parts'])
  assert report['parts']['backbone'] > 2 * report['parts']['losses']
  assert report['recompilations'] == 0
  assert report['operations_per_step'] > 100
  assert report['roofline']['share'] is None  # No data sheet of a CPU.
  assert report['score_pairs_per_s'] > 0
  assert report['data_wait'] is None and report['peer'] is None
  assert 'images/s' in run.stdout and 'MFU' in run.stdout


@pytest.mark.slow
def test_benchmark_on_data_of_its_own(tiny_scenes, tmp_path):
  out = tmp_path / 'report.json'
  benchmark.main(['--config', 'tests/small_run.py:light', '--steps', '2',
                  '--data', f'--config.data.dir={tiny_scenes}', '--json',
                  str(out)])
  report = json.loads(out.read_text())
  assert 0 <= report['data_wait'] < 1
  assert report['data_images_per_s'] > 0


# --- Bad input --------------------------------------------------------------
refused = functools.partial(commands.refused, benchmark.main)


@pytest.mark.parametrize('argv,expected', [
    (['--config', TINY, '--peer', 'hf_dert'], ["'hf_dert'", "'hf_detr'"]),
    (['--config', TINY, '--peer-timeout', '0'],
     ['--peer-timeout', '0', 'more than 0']),
    (['--config', TINY, '--steps', '0'], ['--steps', '0', '1 or more']),
    (['--config', TINY, '--batch-size', '9'], ['batch_size: 9', 'try 8']),
    (['--config', TINY, '--json', '/no/such/folder/x'],
     ['/no/such/folder/x', 'cannot be written']),
])
def test_mistakes(argv, expected, capsys):
  line = refused(*argv, capsys=capsys)
  for part in expected:
    assert part in line
