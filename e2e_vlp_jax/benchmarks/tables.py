"""Reports of timings as aligned lines, for people."""
from e2e_vlp_jax.profiling import chips


def train_step(report):
  """The report of `benchmarks.train_step`."""
  r = report
  ms = _milliseconds
  rows = [
      ('model', f'{r["config"]}, {r["parameters"]:,} parameters, '
                f'{r["dtype"]}'),
      ('devices', f'{r["devices"]} x {r["device"]}'),
      ('batch', f'{r["batch_size"]} of {r["bucket"][0]}x{r["bucket"][1]}'),
      ('speed', f'{r["images_per_s"]:.2f} images/s; a step '
                f'{ms(r["step_time_s"])}; without waiting for each step '
                f'{r["ahead_images_per_s"]:.2f} images/s'),
      ('FLOPs', f'{r["flops_per_step"]:.3e} a step; MFU {r["mfu"]:.1%} '
                f'({r["mfu_of"]})'),
      ('roofline', _roofline_row(r['roofline'])),
      ('kernels', f'{r["operations_per_step"]:,} operations a step; '
                  f'{r["recompilations"]} recompilations'),
      ('peak memory', f'{r["peak_memory_bytes"] / chips.GIB:.2f} GiB'),
      ('compiled in', f'{r["compile_s"]:.0f} s'),
      ('parts', ', '.join(f'{k} {v:.1%}' for k, v in r['parts'].items()))]
  if r['data_wait'] is not None:
    rows.append(('with data', f'{r["data_images_per_s"]:.2f} images/s; '
                              f'{r["data_wait"]:.1%} of it waiting for data'))
  if r['score_pairs_per_s'] is not None:
    rows.append(('scoring', f'{r["score_pairs_per_s"]:.2f} image-text '
                            'pairs/s'))
  if r['peer']:
    rows += peer_rows(r['peer'])
  return '\n'.join(f'{name:12} {text}' for name, text in rows)


def inference(report):
  """The report of `benchmarks.inference`."""
  r = report
  rows = [
      ('model', f'{r["config"]}, {r["parameters"]:,} parameters for '
                f'{r["task"]!r}, {r["dtype"]}'),
      ('device', r['device']),
      ('batch', f'{r["batch_size"]} of {r["bucket"][0]}x{r["bucket"][1]}'),
      ('speed', f'{r["images_per_s"]:.2f} images/s; a step '
                f'{_milliseconds(r["step_time_s"])}'),
      ('compiled in', f'{r["compile_s"]:.0f} s'), *peer_rows(r['peer'])]
  return '\n'.join(f'{name:12} {text}' for name, text in rows)


def input_pipeline(report):
  """The report of `benchmarks.input_pipeline`."""
  return (f'pipeline {report["pipeline_images_per_s"]:.1f} images/s, plain '
          f'decoding {report["decoding_images_per_s"]:.1f}: ratio '
          f'{report["share"]:.2f}')


def _roofline_row(roof):
  if roof['step_time_s'] is None:
    return f'unknown: {roof["reason"]}'
  return (f'{roof["share"]:.1%} of it: at least '
          f'{roof["step_time_s"] * 1e3:.1f} ms a step, bound by '
          f'{roof["bound"]}')


def _milliseconds(t):
  """A report's percentiles of seconds as text."""
  return f'{t["p50"] * 1e3:.1f} ms (90 %: {t["p90"] * 1e3:.1f} ms)'


def peer_rows(p):
  """The rows of the part 'peer' of a report."""
  name = f'{p["name"]} ({p["version"]})' if p['version'] else p['name']
  if p['timed_out']:
    return [('peer', f'{name}: no answer in {p["waited_s"]:g} s during '
                     f'{p["during"]}; a longer --peer-timeout waits longer')]
  if p['failed']:
    return [('peer', f'{name}: {p["failed"]} (during {p["during"]})')]
  compiled = f'compiled in {p["compile_s"]:.0f} s'
  if 'graph_breaks' in p:
    compiled += (f', {p["graphs"]} graphs, {p["graph_breaks"]} graph breaks')
  return [('peer', f'{name}, {p["parameters"]:,} parameters: '
                   f'{p["images_per_s"]:.2f} images/s; a step '
                   f'{_milliseconds(p["step_time_s"])}; {compiled}'),
          ('ratio', f'{p["ratio"]:.2f} of the peer\'s images/s')]
