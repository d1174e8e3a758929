#!/usr/bin/env bash
# What every host of a TPU slice does, as root, each time it starts: mounts the
# bucket, installs, and trains until the run is finished. tpu_vm.sh has it
# started; it needs no connection to whoever did that.
#
#   bash launch/tpu_vm_host.sh BUCKET NAME CACHE_GB  arguments of train
#
# In the bucket, launch/NAME/log/SLICE-HOST is this host's log, a minute old at
# most; launch/NAME/exit comes at the end (exit codes of worker.sh; 1: five
# crashes without a new checkpoint).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/launcher.sh
source launch/launcher.sh
[[ $# -ge 5 ]] || die 'expected BUCKET NAME CACHE_GB and arguments of train'
bucket="$1" name="$2" cache_gb="$3"
shift 3
check_train "$@"
PATH+=:/snap/bin
folder="$MOUNT/launch/$name" log="${E2E_VLP_LOG:-/var/log/e2e_vlp_jax}"
log+="-$name.log"
exec >>"$log" 2>&1

again() { until "$@"; do say "failed, again in a minute: $1"; sleep 60; done; }

# The bucket as a folder (Cloud Storage FUSE). Records are kept on the disk, whole
# files; which files there are is not: hosts agree on the newest checkpoint.
mount_bucket() {
  ! mountpoint -q "$MOUNT" || return 0
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    local url=https://packages.cloud.google.com/apt
    curl -fsSL "$url/doc/apt-key.gpg" -o "$key" || return
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -c -s) main" \
      >/etc/apt/sources.list.d/gcsfuse.list
    # A machine that has just started is often updating itself: wait for it.
    apt-get -o DPkg::Lock::Timeout=600 -qq update
    apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse || return
  fi
  fusermount -uz "$MOUNT" 2>/dev/null  # a dead one
  mkdir -p "$MOUNT" /var/cache/gcsfuse
  # In a unit of its own, so that it outlives train when the machine stops.
  systemd-run --quiet --collect --unit=e2e_vlp_gcs gcsfuse --foreground \
    --implicit-dirs --rename-dir-limit 100000 --metadata-cache-ttl-secs 0 \
    --metadata-cache-negative-ttl-secs 0 --cache-dir /var/cache/gcsfuse \
    --file-cache-max-size-mb $((cache_gb * 1000)) \
    --file-cache-cache-file-for-range-read "$bucket" "$MOUNT"
  sleep 5
  mountpoint -q "$MOUNT" && ls "$MOUNT" >/dev/null
}

# The images come with Python 3.10; jax wants a newer one.
install() {
  if [[ ! -x .venv/bin/python ]] && ! command -v python3.12 >/dev/null; then
    python3 -m pip install --quiet uv &&
      python3 -m uv python install --quiet 3.12 || return
    PYTHON="$(python3 -m uv python find 3.12)" || return
    export PYTHON
  fi
  E2E_VLP_EXTRAS="${E2E_VLP_EXTRAS:-tpu,gcs}" bash launch/common.sh
}

until tpu_env="$(curl -fs -H 'Metadata-Flavor: Google' http://metadata.google\
.internal/computeMetadata/v1/instance/attributes/tpu-env)"; do sleep 5; done
attribute() { sed -n "s/^$1: *'\(.*\)'/\1/p" <<<"$tpu_env"; }  # of this host
host="$(attribute MEGASCALE_SLICE_ID)"
host="${host:-0}-$(attribute WORKER_ID)"
again mount_bucket
mkdir -p "$folder/log"
while sleep 60; do cp "$log" "$folder/log/$host"; done &
copies=$!
# jax itself asks for this on v5e and newer: it starts and stops faster.
tee /sys/kernel/mm/transparent_hugepage/enabled <<<always >/dev/null
again install

trap 'stopped=1' TERM  # the machine is stopping; worker.sh is told as well
stopped='' crashes=0 newest=none
while [[ -z $stopped && ! -s $folder/exit ]]; do
  again mount_bucket
  bash launch/worker.sh "$@"
  code=$? before="$newest"
  newest="$(find "$workdir/checkpoints" -maxdepth 1 2>/dev/null | sort)"
  [[ $workdir == /* ]] || newest="$(gcloud storage ls "$workdir/checkpoints")"
  case $code in
    0) [[ $host != 0-0 ]] || echo 0 >"$folder/exit" ;;  # it writes the report
    2) echo 2 >"$folder/exit" ;;
    75) crashes=0 ;;
    *)
      [[ $newest == "$before" ]] && crashes=$((crashes + 1)) || crashes=1
      say "crash $crashes without a new checkpoint"
      ((crashes < 5)) || echo 1 >"$folder/exit" ;;
  esac
  sleep 20
done
kill "$copies"
cp "$log" "$folder/log/$host"
# Whoever started this may be away; the slice is paid for. Needs roles/tpu.admin.
if [[ $host == 0-0 && -s $folder/exit && -z ${E2E_VLP_KEEP:-} ]]; then
  sleep 300
  gcloud compute tpus queued-resources delete "$name" --force --quiet \
    --zone "$(attribute ZONE)" --project "$(attribute CONSUMER_PROJECT_ID)"
fi
