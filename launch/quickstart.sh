#!/usr/bin/env bash
# From a bare clone to a trained model: installs, draws the data, pre-trains
# E2E-VLP `tiny` and evaluates it on held-out scenes. Started again, it goes on.
#
#   bash launch/quickstart.sh [WORKDIR] [--config.key=value ...]
# WORKDIR is runs/quickstart by default; launch/common.sh lists variables.
set -euo pipefail
workdir=runs/quickstart
if [[ $# -gt 0 && $1 != -* ]]; then
  workdir="$(realpath -m "$1")"
  shift
fi
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
config=configs/e2e_vlp.py:tiny
# A run that is continued does not compile again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"

say 'drawing the data set scenes into data/'
python -m e2e_vlp_jax.prepare scenes --data_dir data
say "training $config in $workdir, with evaluation on held-out scenes"
python -m e2e_vlp_jax.train --config "$config" --workdir "$workdir" "$@"
say 'detecting the objects of one held-out image'
python -c 'import sys
from e2e_vlp_jax.data import records
with open(sys.argv[1], "wb") as f:
  f.write(records.open_split("data", "scenes", "test").get(0)["image"])
' "$workdir/example.png"
python -m e2e_vlp_jax.predict --checkpoint "$workdir" --task detect \
  --image "$workdir/example.png" --json "$workdir/example.json" \
  --picture "$workdir/example_objects.png"
say "done: open $workdir/report.html; see also $workdir/example_objects.png"
