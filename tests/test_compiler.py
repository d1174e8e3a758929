"""Settings of the compiler: flags are added, not replaced; the cache."""
import os

import jax
import pytest

from e2e_vlp_jax import errors
from e2e_vlp_jax.training import compiler


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """Variables and jax's setting are as before after each test."""
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=false')
  monkeypatch.delenv('LIBTPU_INIT_ARGS', raising=False)
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_flags_are_added_to_those_of_the_user(monkeypatch):
  name = 'xla_tpu_overlap_compute_collective_tc'
  monkeypatch.setenv('LIBTPU_INIT_ARGS', f'--{name}=false')
  compiler.set_flags()
  compiler.set_flags()
  flags = os.environ['LIBTPU_INIT_ARGS'].split()
  assert flags[0] == f'--{name}=false' and len(flags) == len(set(flags)) == 5
  assert os.environ['XLA_FLAGS'] == '--xla_cpu_enable_fast_math=false'
  compiler.set_flags(deterministic=True)
  assert os.environ['XLA_FLAGS'] == (
      '--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true')


def test_a_cache_on_accelerators_only(monkeypatch, tmp_path, caplog):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  compiler.use_cache()
  assert jax.config.jax_compilation_cache_dir is None
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  compiler.use_cache()
  folder = str(tmp_path / 'e2e_vlp_jax/xla')
  assert jax.config.jax_compilation_cache_dir == folder
  assert os.path.isdir(folder)
  # A home that cannot be written costs time, not the run.
  jax.config.update('jax_compilation_cache_dir', None)
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  compiler.use_cache()
  assert jax.config.jax_compilation_cache_dir is None
  assert 'JAX_COMPILATION_CACHE_DIR names another folder' in caplog.text


def test_a_cache_that_the_user_names_must_be_writable(tmp_path):
  (tmp_path / 'file').write_text('')
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'file/cache'))
  with pytest.raises(errors.UserError, match='JAX_COMPILATION_CACHE_DIR .*'
                     'cannot be written'):
    compiler.use_cache()
