#!/usr/bin/env bash
# Trains on this machine, one host of a TPU slice; tpu_vm_host.sh and gke.sh
# start it on all of them.
#
#   bash launch/worker.sh --config C --workdir W [--config.key=value ...]
#
# Exit code: 0 finished; 2 a mistake, starting again changes nothing; 75 not
# finished, start it again; else a crash. launch/common.sh lists variables.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/launcher.sh
source launch/launcher.sh
check_train "$@"

export E2E_VLP_EXTRAS="${E2E_VLP_EXTRAS:-tpu,gcs}"
# The hosts find each other by what the TPU tells them.
export E2E_VLP_DISTRIBUTED="${E2E_VLP_DISTRIBUTED:-auto}"
# Without a working TPU stop here, rather than train on the CPU unnoticed.
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
# The next machine finds the compiled step beside the checkpoints.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$workdir/jax_cache}"
# shellcheck source=launch/common.sh
source launch/common.sh || exit 75  # no network, say

# In the background, as bash acts on a signal only between two commands. What
# stops a pod signals this shell, so it is passed on.
python -m e2e_vlp_jax.train "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
while true; do
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break  # else a signal ended the wait
done
code="$(outcome "$code")"
say "host $(hostname): train ended with code $code"
exit "$code"
