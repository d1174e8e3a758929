#!/usr/bin/env bash
# Readies one host of a TPU VM; tpu_vm.sh runs it on all of them. Safe to run
# again: what is there is left alone.
#
#   bash launch/tpu_vm_setup.sh BUCKET
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/launcher.sh
source launch/launcher.sh
[[ $# == 1 ]] || die 'expected one argument, the name of the bucket'

# The bucket as a folder (Cloud Storage FUSE). Files read at random, as records
# are, are kept on the disk whole. Nothing is remembered about which files
# there are: hosts must agree at once on which checkpoint is the newest.
if ! mountpoint -q "$MOUNT"; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    url=https://packages.cloud.google.com/apt
    curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A machine that has just started is often updating itself: wait for it.
    apt=(sudo apt-get -o DPkg::Lock::Timeout=600 -qq)
    "${apt[@]}" update
    "${apt[@]}" install -y gcsfuse
  fi
  sudo mkdir -p "$MOUNT"
  sudo chown "$(id -u):$(id -g)" "$MOUNT"
  mkdir -p ~/.cache/gcsfuse
  gcsfuse --implicit-dirs \
    --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 \
    --cache-dir ~/.cache/gcsfuse --file-cache-max-size-mb 50000 \
    --file-cache-cache-file-for-range-read "$1" "$MOUNT"
fi

# The images come with Python 3.10; jax wants a newer one.
if [[ ! -x .venv/bin/python ]] && ! command -v python3.12 >/dev/null; then
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  PYTHON="$(python3 -m uv python find 3.12)"
  export PYTHON
fi
export E2E_VLP_EXTRAS="${E2E_VLP_EXTRAS:-tpu}"
# shellcheck source=launch/common.sh
source launch/common.sh
say "$(hostname) is ready"
