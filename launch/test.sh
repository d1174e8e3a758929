#!/usr/bin/env bash
# Installs what the tests need and runs them.
#
#   bash launch/test.sh [-m 'not slow'] [tests/test_matching.py -k ties]
#
# launch/common.sh lists environment variables.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Compiled programs are kept: the tests share many, and a second run compiles
# little. Two processes, as most of the time is compilation on one core.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
exec python -m pytest -n 2 --dist worksteal "$@"
