"""Triton programs inside lowered functions, and their compilation.

A program may lower and yet not compile. Triton compiles for an H100 without
one; E2E_VLP_TRITON names a folder with it: pip install --target FOLDER triton.
It crashes on some loops, so it runs in a process of its own.
"""
import os
import subprocess
import sys

import pytest

_CODE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
path, warps, stages = sys.argv[1:]
kernel = triton.compile(path, target=GPUTarget('cuda', 90, 32), options=dict(
    num_warps=int(warps), num_stages=int(stages)))
assert kernel.asm['cubin']
"""


def programs(lowered):
  """[text of each Triton program]; parsing it verifies it.

  Args:
    lowered: of `jax.jit(f).trace(...).lower(lowering_platforms=('cuda',))`.
  """
  from jax._src.lib import triton  # pylint: disable=g-import-not-at-top
  from jaxlib.mlir import ir  # pylint: disable=g-import-not-at-top
  found = []

  def visit(op):
    op = op.operation
    if (op.name == 'stablehlo.custom_call'
        and 'triton' in str(op.attributes['call_target_name'])):
      config = ir.DictAttr(op.attributes['mhlo.backend_config'])
      found.append(ir.StringAttr(config['ir']).value_bytes)
    return ir.WalkResult.ADVANCE
  lowered.compiler_ir('stablehlo').operation.walk(visit)
  with ir.Context() as context:
    triton.dialect.register_dialect(context)
    return [str(ir.Module.parse(code)) for code in found]


def compile_program(text, folder, warps, stages=1):
  """Compiles a program; skips the test without Triton."""
  packages = os.environ.get('E2E_VLP_TRITON')
  if not packages:
    pytest.skip('E2E_VLP_TRITON is not set')
  path = folder / 'program.ttir'
  path.write_text(text)
  run = subprocess.run(
      [sys.executable, '-c', _CODE, str(path), str(warps), str(stages)],
      check=False, capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': packages,
           'TRITON_CACHE_DIR': str(folder)})
  assert run.returncode == 0, run.stderr[-2000:]
