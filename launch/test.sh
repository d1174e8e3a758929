#!/usr/bin/env bash
# Installs what the tests need and runs them.
#
#   bash launch/test.sh [-m 'not slow'] [tests/test_matching.py -k ties]
#   bash launch/test.sh -m long     # trials of minutes, which are left out
#
# launch/common.sh lists environment variables.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Compiled programs are kept, small ones too: the tests share many, and every
# file of tests starts without any in memory. A training run of seconds takes
# 12 instead of 17 CPU seconds by the small ones. Two processes, as most of the
# time is compilation on one core. Few arenas leave less memory unused.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export MALLOC_ARENA_MAX=2
exec python -m pytest -n 2 --dist worksteal "$@"
