"""What all tests share: the devices, the data they read, their seeds.

Environment variables:
  E2E_VLP_SHARED: folder of the shared reference data; the folder `shared`
    beside the repository by default.
  E2E_VLP_REQUIRE_SHARED=1, E2E_VLP_REQUIRE_TORCH=1: a test that needs the
    reference data, or torch, fails instead of being skipped (`.ci/run`).
  JAX_COMPILATION_CACHE_DIR: where compiled programs are kept between runs
    (`launch/test.sh` sets it).
"""
import os
import pathlib

from tests import xla_flags

# These act only if they are set before jax or tensorflow is first imported,
# hence before the imports below.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
# Eight virtual CPU devices let every test build a mesh; a test that names no
# mesh runs on the first one, as fast as without (measured).
for _flag, _value in xla_flags.flags(devices=8):
  if _flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = (
        f'{os.environ.get("XLA_FLAGS", "")} {_flag}={_value}')

import collections  # noqa: E402
import importlib.util  # noqa: E402

import pytest  # noqa: E402

from tests import memory  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parent.parent
SEED = 0  # of `tiny_scenes`


def _missing(reason, require):
  """Skips the test for `reason`, or fails it if `require` is set to 1."""
  if os.environ.get(require) == '1':
    pytest.fail(f'{reason} ({require}=1)')
  pytest.skip(reason)


# --- Memory and time --------------------------------------------------------
@pytest.fixture(scope='module', autouse=True)
def _release_memory(request):
  """Drops what a file compiled or remembers: a worker would grow to 7 GB.

  What the next file shares with this one comes from the compilation cache.
  """
  yield
  memory.forget(request.module)


@pytest.fixture
def compiles_much():
  """For a test of a large program: others of its file are dropped before."""
  memory.release()
  yield
  memory.release()


@pytest.fixture
def one_device(monkeypatch):
  """For a test whose mesh would else be of eight devices.

  Each of eight holds all parameters, and their program takes twice the memory
  and time to compile.
  """
  import jax  # pylint: disable=import-outside-toplevel
  devices = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: devices)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
  """Releases memory between the tests of a file too, if there is much."""
  result = yield
  memory.release_if_grown()
  return result


def _cpu_seconds():
  """Of this process and of the ended ones that it has started."""
  return sum(os.times()[:4])


class _Usage:
  """Notes what each file of tests costs; prints it at the end of the run.

  Every worker of pytest-xdist runs one of these, and the main process too.
  """

  def __init__(self):
    self._before = _cpu_seconds()
    self._wall, self._cpu = collections.Counter(), collections.Counter()
    self._peak_of_file, self._peak_of_worker = {}, {}
    self._peak_of_started = {}
    self._started = memory.Started()

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_setup(self):
    if not self._started.is_alive():
      self._started.start()

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_makereport(self):
    """Adds CPU seconds and memory of a phase to its report (in a worker)."""
    report = yield
    now = _cpu_seconds()
    report.user_properties += [('cpu', now - self._before),
                               ('peak', memory.take_peak()),
                               ('started', self._started.take_peak())]
    self._before = now
    return report

  def pytest_runtest_logreport(self, report):
    """Adds a report to the sums (in the main process)."""
    path = report.nodeid.partition('::')[0]
    worker = getattr(report, 'worker_id', 'this process')
    used = dict(report.user_properties)
    self._wall[path] += report.duration
    self._cpu[path] += used.get('cpu', 0.)  # A worker that died says nothing.
    for peaks, name, key in ((self._peak_of_file, path, 'peak'),
                             (self._peak_of_worker, worker, 'peak'),
                             (self._peak_of_started, path, 'started')):
      peaks[name] = max(peaks.get(name, 0.), used.get(key, 0.))

  def pytest_terminal_summary(self, terminalreporter):
    write = terminalreporter.write_line
    terminalreporter.section('memory and time')
    write('peak memory: ' + ', '.join(
        f'{name} {peak:.2f} GiB'
        for name, peak in sorted(self._peak_of_worker.items())))
    write(f'all files: {sum(self._wall.values()):.0f} s in tests, '
          f'{sum(self._cpu.values()):.0f} CPU seconds; the slowest:')
    for path, seconds in self._cpu.most_common(10):
      write(f'  {seconds:6.0f} CPU s {self._wall[path]:6.0f} s  {path}')
    for title, peaks in (
        ('the largest:', self._peak_of_file),
        ('the largest of the processes that they start:',
         self._peak_of_started)):
      write(title)
      for path, peak in collections.Counter(peaks).most_common(10):
        if peak > .1:
          write(f'  {peak:6.2f} GiB  {path}')


def pytest_configure(config):
  config.pluginmanager.register(_Usage(), 'usage')


def pytest_collection_modifyitems(config, items):
  """Puts large files first; leaves out trials of minutes.

  A process grows with its age, whatever is released. Trials of minutes run if
  -m long, -k or a name asks for them.
  """
  items.sort(key=lambda item: item.get_closest_marker('large') is None)
  if 'long' in config.option.markexpr or config.option.keyword or any(
      '::' in a for a in config.args):
    return
  long = [i for i in items if i.get_closest_marker('long')]
  if long:
    config.hook.pytest_deselected(items=long)
    items[:] = [i for i in items if i not in long]


def pytest_report_header():
  return [f'seeds: tiny_scenes {SEED}; a test that draws prints its own']


@pytest.fixture(scope='session')
def shared():
  """Path of the shared reference data (official files, golden numbers)."""
  path = pathlib.Path(
      os.environ.get('E2E_VLP_SHARED', REPO.parent / 'shared'))
  if not (path / 'data').is_dir():
    _missing(f'no reference data at {path}; set E2E_VLP_SHARED',
             'E2E_VLP_REQUIRE_SHARED')
  return path


@pytest.fixture(scope='session')
def torch_extra():
  """Asks for torch and transformers (`E2E_VLP_TORCH=1 launch/test.sh`)."""
  for name in ('torch', 'transformers'):
    if importlib.util.find_spec(name) is None:
      _missing(f'{name} is not installed; run E2E_VLP_TORCH=1 bash '
               'launch/test.sh', 'E2E_VLP_REQUIRE_TORCH')


@pytest.fixture(scope='session')
def tiny_scenes(tmp_path_factory):
  """Data folder with a small prepared `scenes`.

  64 training images and 16 in each of validation, test and unseen.
  """
  from e2e_vlp_jax import prepare  # pylint: disable=import-outside-toplevel
  folder = tmp_path_factory.mktemp('scenes')
  prepare.main(['scenes', '--data_dir', str(folder), '--seed', str(SEED),
                '--num_train', '64', '--num_validation', '16',
                '--num_test', '16', '--num_unseen', '16'])
  return folder
