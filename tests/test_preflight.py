"""What a step costs, counted by hand and by preflight; what cannot fit."""
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

from e2e_vlp_jax import cli
from e2e_vlp_jax import preflight
from e2e_vlp_jax.models import layers
from e2e_vlp_jax.models import resnet
from e2e_vlp_jax.ops import matching
from e2e_vlp_jax.profiling import chips
from e2e_vlp_jax.profiling import program as program_lib
from e2e_vlp_jax.training import sharding
from tests import commands

TINY = 'configs/e2e_vlp.py:tiny'


def counted(function, *shapes):
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return program_lib.flops(jax.make_jaxpr(function)(*args))


def config_of(*overrides):
  argv = ['--config', TINY, *(f'--config.{x}' for x in overrides)]
  return cli.parse(cli.parser('', config='required'), argv)[1]


# --- FLOPs ------------------------------------------------------------------
def test_flops_of_resnet50_by_hand():
  """4.09 G multiply-adds at 224 (as published, with its classifier's 2 M)."""
  def convolution(side, out, kernel, inputs):
    return side**2 * out * kernel**2 * inputs
  total, side, inputs = convolution(112, 64, 7, 3), 56, 64
  for stage, count in enumerate(resnet.BLOCKS[50]):
    width = 64 * 2**stage
    for i in range(count):
      before, side = side, side // 2 if stage and not i else side
      total += (convolution(before, width, 1, inputs)
                + convolution(side, width, 3, width)
                + convolution(side, 4 * width, 1, width))
      if not i:
        total += convolution(side, 4 * width, 1, inputs)
      inputs = 4 * width
  assert abs(total + 2048 * 1000 - 4.09e9) < .01e9
  model = resnet.ResNet(depth=50)
  image = jnp.zeros((2, 224, 224, 3))
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image))
  jaxpr = jax.make_jaxpr(lambda v: model.apply(v, image))(variables)
  assert program_lib.flops(jaxpr) == 2 * 2 * total


def test_flops_of_an_encoder_layer_by_hand():
  b, t, d, f = 3, 20, 32, 48
  layer = layers.EncoderLayer(d, heads=4, ffn=f, dropout=0.)
  x = jnp.zeros((b, t, d))
  params = jax.eval_shape(
      lambda: layer.init(jax.random.key(0), x, None, 0.))
  loss = lambda p, x: layer.apply(p, x, None, 0.).sum()
  forward = 2 * b * (4 * t * d * d + 2 * t * t * d + 2 * t * d * f)
  assert program_lib.flops(jax.make_jaxpr(loss)(params, x)) == forward
  both = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x)
  assert program_lib.flops(both) == 3 * forward


def test_flops_of_strided_convolution_backward():
  def loss(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (2, 2), [(1, 1)] * 2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC')).sum()
  shapes = (2, 16, 16, 3), (3, 3, 3, 8)
  forward = 2 * (2 * 8 * 8 * 8) * (3 * 3 * 3)
  assert counted(loss, *shapes) == forward
  # One for the input and one for the kernel; the value is not needed.
  assert counted(jax.grad(loss, (0, 1)), *shapes) == 2 * forward


def test_flops_in_loops_recomputation_and_shards():
  product = 2 * 8**3
  square = (8, 8)

  def scanned(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, None, 5)[0]
  assert counted(scanned, square) == 5 * product
  loss = lambda w, x: jnp.sin(x @ w).sum()
  once = jax.value_and_grad(loss)
  assert counted(once, square, square) == 2 * product
  again = jax.value_and_grad(jax.checkpoint(loss))
  assert counted(again, square, square) == 3 * product
  # What nobody reads does not count.
  assert counted(lambda x: (x @ x, x + 1)[1], square) == 0
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2, 'tensor': 1})
  shards = jax.shard_map(lambda x: x @ jnp.ones((8, 8)), mesh=mesh,
                         in_specs=P(('data', 'fsdp')),
                         out_specs=P(('data', 'fsdp')))
  assert counted(shards, (16, 8)) == 2 * 16 * 8 * 8


# --- Collectives ------------------------------------------------------------
HLO = '''HloModule jit_step, is_scheduled=true, num_partitions=8

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%reduced (p: (s32[], f32[16,4])) -> f32[4,4] {
  ROOT %r = bf16[4,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8]
}

%body (p: (s32[], /*index=1*/f32[16,4])) -> (s32[]) {
  %ar = (f32[16,4]{1,0}, f32[]) all-reduce(%x), replica_groups={{0,1},{2,3}}
  %f = f32[4,4] fusion(%ar), kind=kCustom, calls=%reduced
}

%below (p: (s32[])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %seven), direction=LT
}

%gathered (p: (s32[])) -> (s32[]) {
  %a2a = f32[8]{0} all-to-all(%x), replica_groups={{0,1}}
}

%endless (p: (s32[])) -> (s32[]) {
  %cp = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main (p: f32[16,4]) -> f32[16,4] {
  %ag = (f32[16,4], f32[128,4]) all-gather-start(%p), replica_groups=AXES
  %agd = f32[128,4]{1,0} all-gather-done(%ag)
  %w = (s32[]) while(%t), body=%body, config={"known_trip_count":{"n":"3"}}
  %v = (s32[]) while(%u), body=%endless
  %z = (s32[]) while(%t), condition=%below, body=%gathered
  ROOT %alone = f32[16,4] all-reduce(%p), replica_groups={{0},{1}}
}
'''.replace('AXES', "mesh['a'=2,'b'=4] {'a','b'}")


def test_collectives_of_a_program_text():
  found = {c.kind: c for c in program_lib.collectives(HLO)}
  assert len(found) == len(program_lib.collectives(HLO)) == 5
  assert found['all-gather'] == ('all-gather', 128 * 4 * 4, 8, 1, False)
  assert found['all-reduce'] == ('all-reduce', 16 * 4 * 4 + 4, 2, 3, False)
  assert found['reduce-scatter'] == ('reduce-scatter', 4 * 4 * 2 * 4, 4, 3,
                                     False)
  assert found['all-to-all'] == ('all-to-all', 32, 2, 7, False)
  assert found['collective-permute'].in_loop
  # Rings: a reduction goes round twice, a gathering once.
  assert found['all-reduce'].traffic == 3 * 260 * 2 * 1 / 2
  assert found['all-gather'].traffic == 2048 * 7 / 8


def test_collectives_of_a_compiled_program():
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
  rows = NamedSharding(mesh, P('data'))
  x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
  w = jax.ShapeDtypeStruct((32, 4), jnp.float32,
                           sharding=sharding.replicated(mesh))

  def step(w, x):
    body = lambda _, w: w + jax.grad(lambda w: jnp.sin(x @ w).sum())(w)
    return jax.lax.fori_loop(0, 5, body, w)
  compiled = jax.jit(
      step, out_shardings=sharding.replicated(mesh)).lower(w, x).compile()
  found, = program_lib.collectives(compiled.as_text())
  assert found == ('all-reduce', 32 * 4 * 4, 8, 5, False)


def test_memory_traffic_of_a_program_text():
  hlo = '''HloModule jit_step

%fused (p: f32[8,4]) -> f32[8,4] {
  %y = f32[800,800] broadcast(%p)
  ROOT %z = f32[8,4] slice(%y)
}

ENTRY %main (p: f32[8,4], q: bf16[6]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = bf16[6]{0} parameter(1)
  %near = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %there = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%near)
  %used = f32[8,4]{1,0} fusion(%there, %q), kind=kLoop, calls=%fused
  ROOT %out = f32[8,4]{1,0:S(1)} add(%used, %used)
}
'''
  # Fetched once, read near by; the fusion writes; the sum reads that once.
  assert program_lib.memory_traffic(hlo) == 128 + (12 + 128) + 128


def test_memory_traffic_of_what_reads_a_part():
  hlo = '''HloModule jit_step

%looked_up (a: f32[100,4], b: s32[3], c: f32[3,4]) -> f32[3,4] {
  %a = f32[100,4]{1,0} parameter(0)
  %b = s32[3]{0} parameter(1)
  %c = f32[3,4]{1,0} parameter(2)
  %row = f32[100,4]{1,0} bitcast(%a)
  %g = f32[3,4]{1,0} gather(%row, %b), offset_dims={1}
  ROOT %sum = f32[3,4]{1,0} add(%g, %c)
}

ENTRY %main (t: f32[100,4], i: s32[3]) -> f32[3,4] {
  %t = f32[100,4]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %s = f32[3,4]{1,0} slice(%t), slice={[0:3], [0:4]}
  ROOT %out = f32[3,4]{1,0} fusion(%t, %i, %s), kind=kLoop, calls=%looked_up
}
'''
  # The slice reads and writes 48; the fusion reads 48 + 12 + 48, writes 48.
  assert program_lib.memory_traffic(hlo) == 96 + 156


def test_memory_traffic_of_a_sliced_prefetch():
  """TPU programs fetch a large array piece by piece: all pieces are one read.
  """
  hlo = '''HloModule jit_step

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %s0 = ((f32[8,4]{1,0:T(8,128)}), f32[4,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:4], [0:4]}
  %s1 = ((f32[8,4]{1,0:T(8,128)}), f32[4,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[4:8], [0:4]}
  %d0 = f32[4,4]{1,0:T(8,128)S(1)} slice-done(%s0)
  %d1 = f32[4,4]{1,0:T(8,128)S(1)} slice-done(%s1)
  ROOT %whole = f32[8,4]{1,0:S(1)} custom-call(%d0, %d1), custom_call_target="ConcatBitcast"
}
'''
  assert program_lib.memory_traffic(hlo) == 8 * 4 * 4


def test_the_matching_loop_exchanges_nothing():
  """As it would, in every iteration, if it did not run shard by shard."""
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
  rows = NamedSharding(mesh, P('data'))
  cost_ = jax.ShapeDtypeStruct((16, 6, 5), jnp.float32, sharding=rows)
  mask = jax.ShapeDtypeStruct((16, 5), bool, sharding=rows)

  def in_loops(*where):
    compiled = matching.hungarian.lower(cost_, mask, *where).compile()
    return sum(c.in_loop for c in program_lib.collectives(compiled.as_text()))
  assert in_loops(mesh, ('data',)) == 0
  assert in_loops() > 0


# --- preflight --------------------------------------------------------------
@pytest.fixture(scope='module')
def report(tmp_path_factory):
  out = tmp_path_factory.mktemp('preflight') / 'report.json'
  preflight.main(['--config', TINY, '--topology', 'local', '--no-search',
                  '--json', str(out)])
  return json.loads(out.read_text())


def test_preflight_of_tiny_on_these_devices(report):
  assert report['parameters'] == 993_736
  assert report['chips'] == 8 and report['batch_per_chip'] == 2
  hbm = report['hbm_bytes_per_chip']
  # Parameters, two moments, the batch: replicated on every device.
  assert hbm['arguments'] > 3 * 4 * report['parameters']
  assert hbm['arguments'] < hbm['peak'] < hbm['capacity']
  # The gradients' sum (that of a shared table in parts), and little else.
  total = report['collective_bytes']['all-reduce']
  assert 1 < total / (4 * report['parameters']) < 1.5
  assert report['collectives_in_unknown_loops'] == 0
  assert report['flops_per_step'] > 0 and report['compile_s'] > 0
  assert report['roofline']['step_time_s'] is None  # a CPU has no data sheet
  assert report['roofline']['reason']
  assert report['largest_batch_per_chip'] is None  # not looked for
  assert 'largest batch' not in preflight.table(report)


def test_accumulation_costs_the_same_flops(report):
  """Its first pass, over the losses' weights, is dropped."""
  config = config_of('accumulate=2')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preflight, '_compile', _only_flops)
    other = preflight.preflight(config, 'local', search=False)
  assert other['flops_per_step'] == report['flops_per_step']


def test_quick_is_for_the_compiler(tmp_path):
  out, level = tmp_path / 'report.json', jax.config.jax_optimization_level
  seen = []

  def compile_(assembly, batch_size):
    seen.append(jax.config.jax_optimization_level)
    return _only_flops(assembly, batch_size)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preflight, '_compile', compile_)
    try:
      for flags in ([], ['--quick']):
        preflight.main(['--config', TINY, '--topology', 'local', '--no-search',
                        '--json', str(out), *flags])
        assert json.loads(out.read_text())['quick'] == bool(flags)
    finally:
      jax.config.update('jax_optimization_level', level)
  assert seen == [level, 'O0']


def _only_flops(assembly, batch_size):
  traced = assembly.trace(batch_size)
  return preflight._Program(1, 1., program_lib.flops(traced.jaxpr),
                            dict(arguments=1, temporaries=0, peak=1))


@pytest.mark.parametrize('first,largest', [(1, 100), (64, 100), (100, 100),
                                           (250, 100), (3, 1), (8, 3)])
def test_search_finds_the_largest_batch_in_few_programs(first, largest):
  state, each, capacity = 1e9, 1e8, 1e9 + largest * 1e8 + 5e7
  tried = []

  def peak_of(n):  # Not quite linear, as real programs.
    tried.append(n)
    return state + each * n * (1 - .03 * np.sin(n))
  found = preflight._largest(peak_of, first, peak_of(first), state, capacity,
                             lambda _: None)
  assert len(tried) <= 1 + 4
  fits = [n for n in range(1, 300)
          if state + each * n * (1 - .03 * np.sin(n)) <= capacity]
  assert found in fits
  # 1/16 is the resolution, another 1/32 left free on purpose.
  assert found >= max(fits) - max(1, max(fits) * 1.5 / preflight.RESOLUTION)


@pytest.mark.parametrize('overhead', [0, 2e8, 1e9])
def test_search_needs_two_programs_if_memory_is_linear(overhead):
  """The config's own, one more, and one to confirm it."""
  tried, said = [], []

  def peak_of(n):
    tried.append(n)
    return 1e9 + overhead + 4e6 * n
  found = preflight._largest(peak_of, 32, peak_of(32), 1e9, 16e9, said.append)
  assert len(tried) <= 3
  largest = (15e9 - overhead) / 4e6
  assert found == tried[-1] and .9 * largest < found <= largest
  # Said before a program is compiled, as that takes minutes, and after.
  assert len(said) == 2 * (len(tried) - 1)
  assert f'compiling a batch of {tried[1]} ' in said[0]
  assert f'batch of {tried[1]} ' in said[1] and 'GiB of 14.90 GiB' in said[1]


def test_search_goes_back_from_a_program_whose_size_is_unknown():
  """The compiler does not always say how much memory is missing."""
  fits = lambda n: 1e9 + 1e8 * n if n <= 40 else float('inf')
  found = preflight._largest(fits, 10, fits(10), 1e9, 11e9, lambda _: None)
  assert 30 <= found <= 40


def test_roofline_names_what_binds():
  chip = chips.TPUS['v5e']
  mesh = sharding.make_mesh({'data': 8, 'fsdp': 1, 'tensor': 1})
  program = preflight._Program(0, 0., 8 * chip.flops, {}, (), 1e9)
  found = preflight._roofline(program, chip, mesh, config_of())
  assert found['bound'] == 'compute' and found['step_time_s'] == 1.
  program = program._replace(traffic=2 * chip.hbm_bandwidth)
  found = preflight._roofline(program, chip, mesh, config_of())
  assert found['bound'] == 'memory' and found['step_time_s'] == 2.
  program = program._replace(collectives=(
      program_lib.Collective('all-gather', 8 / 7 * 3 * chip.ici_bandwidth, 8, 1,
                      False),))
  found = preflight._roofline(program, chip, mesh, config_of())
  assert found['bound'] == 'interconnect'
  assert found['step_time_s'] == pytest.approx(3.)


# --- Bad input --------------------------------------------------------------
refused = functools.partial(commands.refused, preflight.main, '--config', TINY)


def test_unknown_topologies_are_named_with_the_valid_ones(capsys):
  line = refused('--topology', 'v5e:4x5', capsys=capsys)
  assert "'v5e:4x5'" in line and "mean 'v5e:4x" in line
  assert 'v4: 2x2x1' in line and '16x16' in line and "'local'" in line


def test_libtpu_is_asked_for_by_its_extra(capsys, monkeypatch):
  def absent(*unused, **unused_too):
    raise RuntimeError('JAX TPU support not installed')
  monkeypatch.setattr(topologies, 'get_topology_desc', absent)
  line = refused('--topology', 'v5e:2x2', capsys=capsys)
  assert "pip install -e '.[preflight]'" in line


@pytest.fixture
def small_chips(monkeypatch):
  """Eight devices that pose as chips of so many bytes."""
  def pose(hbm):
    chip = chips.TPUS['v5e']._replace(hbm=hbm)
    monkeypatch.setattr(chips, 'devices', lambda _: (chip, jax.devices()))
  return pose


@pytest.mark.parametrize('override,expected', [
    ('mesh.data=3', ["'data': 3", '8 devices', 'must be 8']),
    ('batch_size=12', ['batch_size: 12', 'divide by 8', 'try 8']),
])
def test_a_mesh_or_batch_that_does_not_fit(override, expected, capsys,
                                           small_chips):
  small_chips(2**30)
  line = refused('--topology', 'v5e:2x4', f'--config.{override}',
                 capsys=capsys)
  for part in expected:
    assert part in line


def test_a_chip_too_small_for_the_state(capsys, small_chips, monkeypatch):
  monkeypatch.setattr(sharding, 'FSDP_MIN_BYTES', 1)
  small_chips(8 * 2**20)  # The state is 11.4 MiB.
  line = refused('--topology', 'v5e:2x4', capsys=capsys)
  assert '0.01 GiB' in line and 'too much' in line
  assert '--config.mesh.fsdp=2 would fit' in line
  small_chips(2**20)
  line = refused('--topology', 'v5e:2x4', capsys=capsys)
  assert 'v5e:4x4 with --config.mesh.fsdp=16 would fit' in line


def test_a_batch_too_large_says_what_fits(capsys, small_chips, monkeypatch):
  small_chips(2**30)
  monkeypatch.setattr(
      preflight, '_compile',
      lambda assembly, n: preflight._Program(n * 2**27, 1., 1., {}))
  line = refused('--topology', 'v5e:2x4', '--config.batch_size=128',
                 capsys=capsys)
  assert 'batch_size: 128 (16 a chip) needs 16.00 GiB' in line
  assert '15.00 GiB too much' in line
  assert '1 a chip fit: --config.batch_size=8' in line
  assert '--config.accumulate=16, which keeps the batch' in line


def test_parts_of_a_batch():
  assert preflight._parts(16, 5) == 4    # four at a time
  assert preflight._parts(12, 5) == 3
  assert preflight._parts(7, 5) == 7
  assert preflight._parts(8, 8) == 1
  assert preflight._parts(8, 0) is None


def test_the_compilers_refusals_are_understood():
  g = 2**30
  assert preflight._needed(
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used '
      '20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.') == 20.5 * g
  assert preflight._needed(
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory '
      'required for HLO temporaries (31.00G) exceeds available HBM '
      '(15.75G).') == 31 * g


@pytest.mark.slow
def test_preflight_of_tiny_for_a_tpu(tmp_path):
  """The real thing; a process of its own, as libtpu wants to be set up."""
  pytest.importorskip('libtpu', reason="no libtpu; pip install '.[preflight]'")
  out = tmp_path / 'report.json'
  subprocess.run(
      [sys.executable, '-m', 'e2e_vlp_jax.preflight', '--config', TINY,
       '--topology', 'v5e:2x2', '--no-search', '--json', str(out)], check=True,
      env={**os.environ, 'XLA_FLAGS': ''})
  report = json.loads(out.read_text())
  assert report['chips'] == 4 and report['chip'] == 'TPU v5e'
  assert report['hbm_bytes_per_chip']['capacity'] == 15.75 * 2**30
  assert report['roofline']['bound'] in ('compute', 'memory', 'interconnect')
  total = report['collective_bytes']['all-reduce']
  assert 1 < total / (4 * report['parameters']) < 1.1


@pytest.mark.slow
def test_preflight_searches_by_compiling(capsys):
  config = config_of('objectives.detection=0.', 'objectives.captioning=0.',
                     'model.encoder_layers=1', 'model.width=32')
  small = preflight.preflight(config, 'local', search=True)
  lines = capsys.readouterr().out.splitlines()
  tried = [x for x in lines if x.startswith('batch of')]
  assert 1 <= len(tried) <= 4
  assert small['largest_batch_per_chip'] > 8 * small['batch_per_chip']
