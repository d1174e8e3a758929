"""Checks on one GPU, in about ten minutes, what tests on CPUs cannot see.

  python -m tests.gpu_check [--parts assignment,attention,...] [--json OUT]

| part | what it does |
|---|---|
| assignment | 500 problems with ties, padding and NaN against scipy; its time |
| attention | results and gradients of the kernels against plain XLA; times |
| numbers_SYSTEM | losses and gradients of each system, GPU against CPU |
| resume | SIGKILL and resume under `--deterministic` settings, to the bit |
| r50, detr, soho, fiber | `benchmark` of these configs; `detr` with a peer |

It needs neither TensorFlow nor data. Each part runs in its own process with
its own time limit; one that fails or hangs does not stop the others. At the end
it prints a table in Markdown, for docs/pods.md.
"""
import argparse
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

REPO = pathlib.Path(__file__).resolve().parent.parent
SEED = 5
_BENCHMARKS = {  # part: (arguments, seconds)
    'r50': (['--config', 'configs/e2e_vlp.py:r50', '--batch-size', '32'], 240),
    'soho': (['--config', 'configs/soho.py:r18', '--batch-size', '16'], 180),
    'detr': (['--config', 'configs/e2e_vlp.py:detr,side=800', '--batch-size',
              '8', '--peer', 'hf_detr', '--config.dtype=bfloat16'], 300),
    'fiber': (['--config', 'configs/fiber.py:base', '--batch-size', '8'], 300),
}
_SYSTEMS = 'e2e_vlp', 'soho', 'fiber'
_LIMITS = {'assignment': 120, 'attention': 120,
           **{f'numbers_{name}': 150 for name in _SYSTEMS}, 'resume': 240,
           **{k: seconds for k, (_, seconds) in _BENCHMARKS.items()}}


# --- The assignment ---------------------------------------------------------
def assignment():
  """Optimal cost of 500 problems; milliseconds of 192 problems of 100x100."""
  import jax  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.ops import matching  # pylint: disable=g-import-not-at-top
  from tests import assignment_problems  # pylint: disable=g-import-not-at-top
  draw = np.random.default_rng(SEED)
  worst, count = 0., 0
  for shape in ((100, 100), (100, 20), (37, 30), (12, 7)):
    for kind in assignment_problems.KINDS:
      cost, mask = assignment_problems.problems(25, *shape, kind, draw)
      index, bad = jax.device_get(matching.hungarian(cost, mask))
      assert not bad.any()
      for c, m, i in zip(cost, mask, index):
        assert len(set(i)) == len(i), 'a query is assigned twice'
        want = assignment_problems.best(c, m)
        size = max(np.abs(c[:, m]).max(initial=0), abs(want), 1e-6)
        worst = max(worst, abs(assignment_problems.cost_of(c, m, i) - want)
                    / size)
        count += 1
  cost[:, 0, 0] = np.nan
  broken = jax.device_get(matching.hungarian(cost, mask))[1]
  np.testing.assert_array_equal(broken, mask[:, 0])
  return {'problems': count, 'worst_relative_cost': worst,
          'ok': bool(worst <= 1e-6), **_assignment_times(draw)}


def _assignment_times(draw):
  """{'ms_<targets>': milliseconds} of 192 problems of 100 queries."""
  import jax  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.ops import matching  # pylint: disable=g-import-not-at-top
  out = {}
  for name, most in (('uniform', 100), ('about_7', 14)):
    cost = jax.device_put(draw.uniform(-1, 1, (192, 100, 100)).astype('f'))
    count = draw.integers(0, most + 1, (192, 1))
    mask = jax.device_put(np.arange(100) < count)
    jax.block_until_ready(matching.hungarian(cost, mask))  # Compiles.
    times = []
    for _ in range(20):
      start = time.perf_counter()
      jax.block_until_ready(matching.hungarian(cost, mask))
      times.append(time.perf_counter() - start)
    out[f'ms_{name}'] = float(np.median(times)) * 1e3
  return out


# --- Attention --------------------------------------------------------------
_ATTENTIONS = {  # rows, queries, keys, heads, width of a head, causal
    'encoder': (32, 364, 364, 8, 32, False),
    'decoder': (8, 140, 140, 8, 32, True),
    'cross': (8, 140, 364, 8, 32, False),
    'soho': (16, 580, 580, 12, 64, False),
}


def attention():
  """{case: differences between the kernels and plain XLA, and both times}."""
  import jax  # pylint: disable=g-import-not-at-top
  found = {name: _compare_attention(jax, *shape)
           for name, shape in _ATTENTIONS.items()}
  return {'ok': all(r['kernel_ran'] and r['worst'] <= 1e-4
                    for r in found.values()), **found}


def _compare_attention(jax, b, t, n, heads, width, causal):
  """One of `_ATTENTIONS`, with padded keys and dropout of a tenth.

  Returns:
    {'worst': largest difference in float32, relative to the largest value, of
    the result and the three gradients, for heads of 32 (float32 kernels take no
    wider ones), 'kernel_ran': in both, 'ms', 'plain_ms': forward and backward
    in bfloat16}.
  """
  from e2e_vlp_jax.ops import attention as attention_lib  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.ops import place  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.training import sharding  # pylint: disable=g-import-not-at-top
  np_, draw = jax.numpy, np.random.default_rng(SEED)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1},
                            jax.devices()[:1])
  arrays = [draw.normal(size=(b, 1, size, heads, width)).astype('f')
            for size in (t, n, n, t)]
  mask = np.arange(n) < draw.integers(n // 2, n + 1, (b, 1, 1, 1, 1))
  if causal:
    mask = mask & np.tri(t, n, dtype=bool)
  bias = np.where(mask, 0., -1e9).astype('f')
  dropout = attention_lib.draw_dropout(jax.random.key(SEED), .1, b)

  def both(query, key, value, cotangent):
    out, back = jax.vjp(lambda *x: attention_lib.attention(
        *x, bias=bias, dropout=dropout), query, key, value)
    return out, *back(cotangent)

  def inside(*x):
    with place.on(mesh, sharding.BATCH_AXES):
      return both(*x)
  with jax.default_matmul_precision('highest'):
    exact = [x[..., :32] for x in arrays]
    got, want = (jax.device_get(jax.jit(f)(*exact)) for f in (inside, both))
  narrow = [np_.asarray(x, np_.bfloat16) for x in arrays]
  return {'worst': max(float(np.abs(a - b).max() / np.abs(b).max())
                       for a, b in zip(got, want)),
          'kernel_ran': all('pallas_call' in str(jax.make_jaxpr(inside)(*x))
                            for x in (exact, narrow)),
          'ms': _milliseconds(jax, jax.jit(inside), narrow),
          'plain_ms': _milliseconds(jax, jax.jit(both), narrow)}


def _milliseconds(jax, function, inputs, times=20):
  """Milliseconds of one of `times` calls in a row."""
  jax.block_until_ready(function(*inputs))  # Compiles.
  start = time.perf_counter()
  for _ in range(times):
    out = function(*inputs)
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / times * 1e3


# --- Losses and gradients ---------------------------------------------------
def numbers(name):
  """Largest difference between GPU and CPU, in float32, for a `tiny` model.

  Losses relative to themselves, gradients relative to the largest of their
  tensor, and at the 99th percentile of the tensors, because a ReLU whose input
  is nearly zero may open on one device alone.
  """
  # Which kernels are fastest does not matter here, and takes time to find out.
  os.environ['XLA_FLAGS'] = ' '.join(
      [*os.environ.get('XLA_FLAGS', '').split(), '--xla_gpu_autotune_level=0'])
  import jax  # pylint: disable=g-import-not-at-top
  jax.config.update('jax_default_matmul_precision', 'highest')
  (losses, grads), (want, want_grads) = (
      _losses_and_gradients(name, jax.devices(p)[:1])
      for p in (jax.default_backend(), 'cpu'))
  loss = max(float(abs(losses[k] - want[k]) / max(abs(want[k]), 1e-3))
             for k in want)
  errors = [float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads))
            if np.abs(b).max() > 1e-7]
  p50, p99 = (float(np.percentile(errors, p)) for p in (50, 99))
  return {'ok': loss <= 1e-4 and p99 <= 1e-2, 'losses': len(want),
          'worst_loss': loss, 'tensors': len(errors), 'gradient_p50': p50,
          'gradient_p99': p99, 'gradient_worst': max(errors)}


def _losses_and_gradients(name, devices):
  """({loss: value}, gradients) of a system's `tiny` on one batch."""
  import jax  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.training import train_step  # pylint: disable=g-import-not-at-top
  with jax.default_device(devices[0]):
    assembly, draw, _ = _small(name, devices)
    objectives = assembly.objectives[-1]
    from e2e_vlp_jax import objectives as objectives_lib  # pylint: disable=g-import-not-at-top
    requests = objectives_lib.requests(objectives)

    def loss(params, model_state, batch):
      terms, _, _ = train_step.loss_terms(
          assembly.model, objectives, requests, params, model_state, batch,
          jax.random.key(1), assembly.mesh)
      values = {f'{k}/{n}': s / jax.numpy.maximum(w, 1e-9)
                for k, found in terms.items() for n, (s, w) in found.items()}
      return sum(objectives[k.split('/')[0]][0] * v
                 for k, v in values.items()), values
    state = assembly.init()
    grads, values = jax.jit(jax.grad(loss, has_aux=True))(
        state.params, state.model_state, draw(0))
    return jax.device_get((values, grads))


def _small(name, devices, dtype='float32', batch_size=8):
  """(assembly, function seed -> batch on the devices, meta) of a `tiny`."""
  from e2e_vlp_jax import cli  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax import models  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.data import synthetic  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.data import vocabularies  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.training import assemble  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.training import sharding  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.training import workdir  # pylint: disable=g-import-not-at-top
  config = cli.load_config(f'{REPO}/configs/{name}.py:tiny')
  config.dtype, config.batch_size = dtype, batch_size
  names = vocabularies.Vocabularies.load(config.data)
  sizes = names.sizes
  mesh = sharding.make_mesh(config.mesh, devices)
  draw = lambda seed: sharding.shard_batch(mesh, synthetic.synthetic_batch(
      config.data, batch_size=batch_size, seed=seed, **sizes))
  assembly = assemble.Assembly(
      config, models.build(config, **sizes), mesh,
      synthetic.synthetic_batch(config.data, batch_size=1, **sizes))
  return assembly, draw, {'config': workdir.to_dict(config), **names.to_dict()}


# --- Kill and resume --------------------------------------------------------
def resume(kills=(3, 6)):
  """Kills a run (SIGKILL) and compares its end with an undisturbed one."""
  with tempfile.TemporaryDirectory() as folder:
    whole = _finish(_start_child(f'{folder}/whole'))
    trials = []
    for kill_at in kills:
      workdir = f'{folder}/killed{kill_at}'
      child = _start_child(workdir)
      for line in child.stdout:
        if line.startswith('step') and int(line.split()[1]) >= kill_at:
          child.send_signal(signal.SIGKILL)
          break
      child.wait()
      again = _finish(_start_child(workdir))
      trials.append({'killed_at': kill_at, 'resumed_at': again['from'],
                     'same_bits': again['digest'] == whole['digest']})
  return {'ok': all(t['same_bits'] and t['resumed_at'] > 0 for t in trials),
          'digest': whole['digest'], 'trials': trials}


def _start_child(workdir):
  return subprocess.Popen(
      [sys.executable, '-m', 'tests.gpu_check', '--child', workdir], cwd=REPO,
      stdout=subprocess.PIPE, text=True)


def _finish(child):
  lines = child.communicate()[0].splitlines()
  if child.returncode:
    raise RuntimeError(f'a run ended with exit code {child.returncode}')
  return json.loads(lines[-1])


def child_run(workdir, steps=8, save_every=2):
  """Trains E2E-VLP `tiny` in bfloat16; prints steps, then a digest."""
  import hashlib  # pylint: disable=g-import-not-at-top
  import ml_collections  # pylint: disable=g-import-not-at-top
  from e2e_vlp_jax.training import compiler  # pylint: disable=g-import-not-at-top
  compiler.set_flags(deterministic=True)
  import jax  # pylint: disable=g-import-not-at-top
  compiler.use_cache()
  from e2e_vlp_jax.training import checkpointer  # pylint: disable=g-import-not-at-top
  assembly, draw, meta = _small('e2e_vlp', jax.devices()[:1], 'bfloat16')
  options = ml_collections.ConfigDict(dict(
      every_steps=save_every, every_minutes=0, keep=2, keep_every=0, best=''))
  with checkpointer.Checkpointer(workdir, meta, options) as saver:
    state = saver.restore(assembly.state_target()) or assembly.init()
    first, step = int(state.step), assembly.step()
    for t in range(first, steps):
      state, metrics = step(state, draw(t))
      if saver.due(t + 1):
        saver.save(t + 1, state)
        saver.wait()
      print('step', t + 1, float(metrics['loss']), flush=True)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get((state.params,
                                              state.model_state))):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  print(json.dumps({'from': first, 'digest': digest.hexdigest()}))


# --- Benchmarks -------------------------------------------------------------
def benchmark(part):
  """The JSON of `benchmark` for one config."""
  with tempfile.TemporaryDirectory() as folder:
    out = os.path.join(folder, 'report.json')
    subprocess.run([sys.executable, '-m', 'e2e_vlp_jax.benchmark',
                    *_BENCHMARKS[part][0], '--steps', '10', '--json', out],
                   cwd=REPO, check=True, stdout=sys.stderr)
    return {'ok': True, **json.loads(pathlib.Path(out).read_text())}


# --- All parts --------------------------------------------------------------
def run_part(part, limit):
  """The result of a part in a process of its own; never raises."""
  start = time.monotonic()
  child = subprocess.Popen(
      [sys.executable, '-m', 'tests.gpu_check', '--only', part], cwd=REPO,
      stdout=subprocess.PIPE, text=True, start_new_session=True)
  try:
    lines = child.communicate(timeout=limit)[0].splitlines()
    found = (json.loads(lines[-1]) if child.returncode == 0 else
             {'ok': False, 'error': f'exit code {child.returncode}'})
  except subprocess.TimeoutExpired:
    found = {'ok': False, 'error': f'no answer within {limit} s'}
  finally:
    try:  # Its children too: they would go on using the GPU.
      os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    child.wait()
  return {**found, 'seconds': time.monotonic() - start}


def table(results):
  """The results as a table in Markdown."""
  rows = ['| part | result | seconds |', '|---|---|---|']
  for part, r in results.items():
    if 'error' in r:
      text = f'**{r["error"]}**'
    elif part == 'assignment':
      text = (f'{r["problems"]} problems, cost off by at most '
              f'{r["worst_relative_cost"]:.1e}; 192 problems of 100 queries: '
              f'{r["ms_uniform"]:.2f} ms with 0 to 100 targets, '
              f'{r["ms_about_7"]:.2f} ms with about 7')
    elif part == 'attention':
      text = '; '.join(
          f'{k}: {v["worst"]:.1e} from plain XLA, {v["ms"]:.2f} ms for its '
          f'{v["plain_ms"]:.2f}' for k, v in r.items() if isinstance(v, dict))
    elif part.startswith('numbers'):
      text = (f'losses off by at most {r["worst_loss"]:.1e}, gradients by '
              f'{r["gradient_p50"]:.1e} (99 %: {r["gradient_p99"]:.1e})')
    elif part == 'resume':
      text = ', '.join(
          f'killed at step {t["killed_at"]}, resumed at {t["resumed_at"]}: '
          + ('same bits' if t['same_bits'] else '**other bits**')
          for t in r['trials'])
    else:
      text = _benchmark_row(r)
    rows.append(f'| {part} | {"" if r["ok"] else "FAILED: "}{text} | '
                f'{r["seconds"]:.0f} |')
  return '\n'.join(rows)


def _benchmark_row(r):
  roof, peer = r['roofline'], r['peer']
  height, width = r['bucket']
  text = (f'{r["device"]}, batch {r["batch_size"]} of {height}x{width}, '
          f'{r["dtype"]}: {r["images_per_s"]:.0f} images/s, a step '
          f'{r["step_time_s"]["p50"] * 1e3:.1f} ms (without waiting for each '
          f'{r["ahead_images_per_s"]:.0f} images/s), MFU {r["mfu"]:.1%}')
  if roof['share']:
    text += f', {roof["share"]:.0%} of the {roof["bound"]} bound'
  text += (f'; {r["operations_per_step"]} kernels; compiled in '
           f'{r["compile_s"]:.0f} s; '
           + ', '.join(f'{k} {v:.1%}' for k, v in r['parts'].items()
                       if v >= .005))
  if peer:
    text += '; peer ' + (f'{peer["images_per_s"]:.0f} images/s, ratio '
                         f'{peer["ratio"]:.2f}' if 'ratio' in peer
                         else 'did not answer')
  return text


def main(argv=None):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--parts', default=','.join(_LIMITS),
                      help='default: %(default)s')
  parser.add_argument('--json', metavar='OUT', help='write the results')
  parser.add_argument('--only', choices=_LIMITS, help=argparse.SUPPRESS)
  parser.add_argument('--child', metavar='WORKDIR', help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.child:
    child_run(args.child)
    return 0
  if args.only:
    functions = {'assignment': assignment, 'attention': attention,
                 'resume': resume,
                 **{f'numbers_{name}': functools.partial(numbers, name)
                    for name in _SYSTEMS}}
    found = (functions[args.only]() if args.only in functions
             else benchmark(args.only))
    print(json.dumps(found))
    return 0
  parts = args.parts.split(',')
  unknown = sorted(set(parts) - set(_LIMITS))
  if unknown:
    parser.error(f'--parts: no {unknown[0]!r}; expected some of '
                 + ', '.join(_LIMITS))
  # A part leaves the memory that it does not need to its children and peers.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  results = {}
  for part in parts:
    print(f'{part}: at most {_LIMITS[part]} s', file=sys.stderr, flush=True)
    results[part] = run_part(part, _LIMITS[part])
    if args.json:  # After each part: what is done is not lost.
      pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    print(table({part: results[part]}).splitlines()[-1], file=sys.stderr,
          flush=True)
  print(table(results))
  return 0 if all(r['ok'] for r in results.values()) else 1


if __name__ == '__main__':
  sys.exit(main())
