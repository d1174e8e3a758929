# shellcheck shell=bash
# Sourced by the scripts that start a run elsewhere (tpu_vm.sh, gke.sh,
# slurm.sbatch) and by the one that runs there (worker.sh): dry runs, errors,
# the checks of train's arguments. Makes and installs nothing.

DRY_RUN="${DRY_RUN:-0}"
MOUNT=/mnt/gcs  # where every machine sees the bucket

say() { echo "[launch] $*"; }

# A mistake of the user: one line, exit code 2.
die() {
  echo "error: $*" >&2
  exit 2
}

# Prints words so that a shell reads these very words again.
quoted() {
  local word quote="'" escaped="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[-_./:=@%+,a-zA-Z0-9]+$ ]]; then
      printf ' %s' "$word"
    else
      printf " '%s'" "${word//$quote/$escaped}"
    fi
  done
}

# Does a command; in a dry run, prints it.
run() {
  if [[ $DRY_RUN == 1 ]]; then
    echo "+$(quoted "$@")"
  else
    "$@"
  fi
}

# Checks that option $1 is followed by a value (called with all arguments).
needs_value() {
  [[ $# -ge 2 && -n $2 && $2 != --* ]] || die "$1 needs a value"
}

# A name that goes into the names of machines, pods and hosts.
check_name() {
  [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "$1: found '$2', expected a-z, 0-9 and -, 40 at most"
}

# Sets generation, shape and chips from what preflight calls a topology.
# shellcheck disable=SC2034
check_topology() {
  [[ $1 =~ ^(v4|v5e|v5p|v6e):([1-9][0-9]*(x[1-9][0-9]*){1,2})$ ]] ||
    die "--topology: found '$1', expected one such as v5e:4x4 (v4, v5e, v5p" \
      'or v6e; python -m e2e_vlp_jax.preflight knows which exist)'
  generation="${BASH_REMATCH[1]}"
  shape="${BASH_REMATCH[2]}"
  chips=$((${shape//x/*}))
}

check_count() {
  [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || die "$1: found '$2', expected a number"
}

# Sets bucket to a bare name.
check_bucket() {
  bucket="${1#gs://}"
  bucket="${bucket%/}"
  [[ $bucket =~ ^[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]$ ]] ||
    die "--bucket: found '$1', expected the name of a bucket"
}

# Checks train's arguments as far as it can be done before anything is rented,
# and sets workdir. Their values are data here: never evaluated, never split.
check_train() {
  local previous='' word config=''
  workdir=''
  for word in "$@"; do
    case "$previous" in
      --config) config="$word" ;;
      --workdir) workdir="$word" ;;
    esac
    case "$word" in
      --config=*) config="${word#*=}" ;;
      --workdir=*) workdir="${word#*=}" ;;
    esac
    previous="$word"
  done
  [[ -n $config ]] || die '--config C.py:ARG of train is missing'
  [[ -n $workdir ]] || die '--workdir W of train is missing'
}

# A machine's own disk goes when the machine does.
check_workdir_is_kept() {
  [[ $workdir == "$MOUNT"/?* ]] ||
    die "--workdir: found '$workdir', expected a folder in $MOUNT, where" \
      'the bucket is: every host must see it, and so must the next machine'
}

# Whether the run in folder $1 is at its last step. Train exits with 0 when it
# is done and also when SIGTERM stopped it; only this tells the two apart.
finished() {
  python - "$1" <<'PYTHON'
import json
import os
import sys
workdir = sys.argv[1]
with open(os.path.join(workdir, 'config.json')) as f:
  last = str(json.load(f)['total_steps'])
sys.exit(not os.path.isdir(os.path.join(workdir, 'checkpoints', last)))
PYTHON
}
