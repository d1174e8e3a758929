# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the scripts that start a run elsewhere and by those that run there:
# dry runs, errors, options, the checks of train's arguments. Installs nothing.

DRY_RUN="${DRY_RUN:-0}"
MOUNT=/mnt/gcs  # where every machine sees the bucket
[[ ! -d .venv/bin ]] || PATH="$PWD/.venv/bin:$PATH"

say() { echo "[launch] $*"; }

# A mistake of the user: one line, exit code 2.
die() { echo "error: $*" >&2; exit 2; }

# Prints words so that a shell reads these very words again.
quoted() {
  local word quote="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[-_./:=@%+,a-zA-Z0-9]+$ ]] || word="'${word//\'/"$quote"}'"
    printf ' %s' "$word"
  done
}

# Does a command; in a dry run, prints it.
run() { if [[ $DRY_RUN == 1 ]]; then echo "+$(quoted "$@")"; else "$@"; fi; }

# Reads a command line. The caller lists its options: $single (one value),
# $several (an array of values) and $flags. --some-name V or --some-name=V sets
# the variable some_name; what follows -- becomes the array train.
read_options() {
  local _variable
  while [[ $# -gt 0 && $1 != -- ]]; do
    _variable="${1%%=*}" _variable="${_variable#--}" _variable="${_variable//-/_}"
    if [[ " $flags " == *" $1 "* ]]; then
      printf -v "$_variable" 1
      shift
      continue
    fi
    [[ " $single $several " == *" ${1%%=*} "* ]] ||
      die "unknown option '${1%%=*}' (arguments of train come after --)"
    [[ $1 != *=* ]] || set -- "${1%%=*}" "${1#*=}" = "${@:2}"
    [[ -n ${2:-} && ($2 != -* || ${3:-} == =) ]] || die "$1 needs a value"
    if [[ " $several " == *" $1 "* ]]; then
      local -n _values="$_variable"
      _values+=("$2")
    else
      printf -v "$_variable" '%s' "$2"
    fi
    shift 2
    [[ ${1:-} != = ]] || shift
  done
  [[ $# -gt 0 ]] || die 'expected -- and the arguments of train'
  train=("${@:2}")
  [[ -z $dry_run ]] || DRY_RUN=1
}

# Checks the value of a variable, whose option has the same name.
check() {
  [[ -n ${!1} ]] || die "--${1//_/-} is missing"
  [[ ${!1} =~ ^($2)$ ]] || die "--${1//_/-}: found '${!1}', expected $3"
}

# What tpu_vm.sh and gke.sh have in common; also sets generation, shape and
# chips from what preflight calls a topology.
check_options() {
  local pair three='x[1-9][0-9]*' flat='1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16'
  three="[1-9][0-9]*$three$three"
  bucket="${bucket#gs://}" bucket="${bucket%/}"
  check name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'a-z, 0-9 and -, 40 at most'
  check bucket '[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]' 'the name of a bucket'
  check slices '[1-9][0-9]{0,3}' 'a number'
  check cache_gb '[0-9]{1,6}' 'a number'
  check topology "v[56]e:($flat)|(v4|v5p|v7x):$three" \
    "v5e or v6e and ${flat//|/, }; or v4, v5p or v7x and such as 2x2x4"
  generation="${topology%:*}" shape="${topology#*:}"
  chips=$((${shape//x/*}))
  for pair in "${env[@]}"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      die "--env: found '$pair', expected NAME=VALUE"
  done
  check_train "${train[@]}"
  # A machine's own disk goes when the machine does.
  [[ $workdir == "$MOUNT"/?* || $workdir == gs://*/?* ]] ||
    die "--workdir: found '$workdir', expected gs://BUCKET/NAME or a folder in" \
      "$MOUNT: every host must see it, and so must the next machine"
}

# What train itself would refuse, before anything is rented.
ask_train() {
  if python -c 'import jax' 2>/dev/null; then
    python -m e2e_vlp_jax.train --check "${train[@]}" >&2 || exit 2
  fi
}

# Checks train's arguments as far as a shell can, and sets workdir. Their values
# are data here: never evaluated, never split.
check_train() {
  local previous='' word config=''
  workdir=''
  for word in "$@" ''; do
    case "$previous" in
      --config) config="$word" ;;
      --workdir) workdir="$word" ;;
      --config=*) config="${previous#*=}" ;;
      --workdir=*) workdir="${previous#*=}" ;;
    esac
    previous="$word"
  done
  [[ -n $config ]] || die '--config C.py:ARG of train is missing'
  [[ -n $workdir ]] || die '--workdir W of train is missing'
}

# The exit code of a run from that of train, which is 0 also where SIGTERM
# stopped it: 75, to be started again, unless the last step is there or
# early_stop has ended the run.
outcome() {
  if [[ $1 != 0 ]] || python -c 'import json, sys
from e2e_vlp_jax import checkpoint_files
from e2e_vlp_jax.storage import paths
run = sys.argv[1]
read = lambda *names: json.loads(paths.read_text("/".join(names)))
config = read(run, "config.json")
last = checkpoint_files.step_folder(run)  # the newest that is finished
patience = config.get("early_stop", {}).get("patience", 0)
waited = patience and read(last, "meta", "metadata").get("early_stop", {}).get(
    "waited", 0)
sys.exit(int(last.rpartition("/")[2]) < config["total_steps"]
         and not 0 < patience <= waited)
' "$workdir"; then
    echo "$1"
  else
    echo 75
  fi
}
