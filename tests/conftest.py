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

# These act only if they are set before jax or tensorflow is first imported,
# hence before the imports below.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
for _flag, _value in (
    # Eight virtual CPU devices let every test build a mesh; a test that names
    # no mesh runs on the first one, as fast as without (measured).
    ('--xla_force_host_platform_device_count', 8),
    # Tests compile much and run little: with these, half the time to compile
    # a train step (11 s instead of 23 s) for steps that take a third longer.
    ('--xla_backend_optimization_level', 0),
    ('--xla_llvm_disable_expensive_passes', 'true')):
  if _flag not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = (
        f'{os.environ.get("XLA_FLAGS", "")} {_flag}={_value}')

import importlib.util  # noqa: E402

import pytest  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parent.parent
SEED = 0  # of `tiny_scenes`


def _missing(reason, require):
  """Skips the test for `reason`, or fails it if `require` is set to 1."""
  if os.environ.get(require) == '1':
    pytest.fail(f'{reason} ({require}=1)')
  pytest.skip(reason)


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
