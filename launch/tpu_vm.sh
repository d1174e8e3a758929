#!/usr/bin/env bash
# Trains on a Cloud TPU slice until the run is finished: asks for the slice (a
# queued resource), installs on all its hosts, trains on all of them, and after
# a preemption or a crash does so again; the run goes on from its checkpoint.
#
#   bash launch/tpu_vm.sh --name N --zone Z --topology v5e:4x4 --bucket B \
#       [--project P] [--slices 1] [--spot] [--keep] [--dry-run] \
#       -- --config C.py:ARG --workdir /mnt/gcs/runs/R [--config.key=value ...]
#
#   --topology  of one slice, in preflight's words
#   --bucket    seen by every host as /mnt/gcs; holds data and checkpoints
#   --slices    more than one are joined over the data centre's network
#   --spot      cheaper, may be taken away at any time
#   --keep      do not delete the slice at the end
#   --dry-run   print the commands, do nothing (also DRY_RUN=1)
# Environment variables:
#   E2E_VLP_RUNTIME  TPU software version, if not the usual one
#   E2E_VLP_CRASHES  crashes in a row, none a preemption, to give up at (5)
# Exit code: 0 finished, 1 given up, 2 a mistake of the user. Needs gcloud. It
# stays in the foreground: run it in tmux, or on a small machine in the cloud.
# Killed and started again, it goes on with the slice of that name.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/launcher.sh
source launch/launcher.sh

name='' zone='' topology='' bucket='' project='' slices=1 spot='' keep=''
while [[ $# -gt 0 && $1 != -- ]]; do
  case "$1" in
    --name | --zone | --topology | --bucket | --project | --slices)
      needs_value "$@"
      printf -v "${1#--}" '%s' "$2"
      shift 2 ;;
    --spot | --keep)
      printf -v "${1#--}" 1
      shift ;;
    --dry-run) DRY_RUN=1; shift ;;
    *) die "unknown option '$1' (arguments of train come after --)" ;;
  esac
done
[[ $# -gt 0 ]] || die 'expected -- and the arguments of train'
shift
for option in name zone topology bucket; do
  [[ -n ${!option} ]] || die "--$option is missing"
done
check_name --name "$name"
check_topology "$topology"
check_bucket "$bucket"
check_count --slices "$slices"
check_train "$@"
check_workdir_is_kept

# Cloud TPU's own names. v4 and v5p count cores, two a chip.
case "$generation" in
  v4) type="v4-$((2 * chips))" runtime=tpu-ubuntu2204-base ;;
  v5e) type="v5litepod-$chips" runtime=v2-alpha-tpuv5-lite ;;
  v5p) type="v5p-$((2 * chips))" runtime=v2-alpha-tpuv5 ;;
  v6e) type="v6e-$chips" runtime=v2-alpha-tpuv6e ;;
esac
tpus=(gcloud compute tpus queued-resources)
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
everywhere=(--node all --worker all)

create() {
  local nodes=(--node-id "$name")
  [[ $slices == 1 ]] || nodes=(--node-count "$slices" --node-prefix "$name")
  [[ -z $spot ]] || nodes+=(--spot)
  run "${tpus[@]}" create "$name" "${where[@]}" "${nodes[@]}" \
    --accelerator-type "$type" \
    --runtime-version "${E2E_VLP_RUNTIME:-$runtime}" \
    --scopes https://www.googleapis.com/auth/cloud-platform
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ..., or nothing if there is none.
state() {
  run "${tpus[@]}" describe "$name" "${where[@]}" \
    --format 'value(state.state)' 2>/dev/null || true
}

delete() {
  run "${tpus[@]}" delete "$name" "${where[@]}" --force --quiet
}

# A command line for bash on the hosts that the options pick.
ssh_to() {
  local command="$1"
  shift
  run "${tpus[@]}" ssh "$name" "${where[@]}" "$@" --command "$command"
}

# Sends the working tree, edits included, what git ignores left out. The words
# of train are quoted once more, for the shell there.
install() {
  local archive="${TMPDIR:-/tmp}/e2e_vlp_jax-$name.tar.gz" pack
  pack='git ls-files -z --cached --others --exclude-standard | '
  pack+="tar --null -T - -czf$(quoted "$archive")"
  run bash -o pipefail -c "$pack" &&
    run "${tpus[@]}" scp "$archive" "$name:e2e_vlp_jax.tar.gz" \
      "${where[@]}" "${everywhere[@]}" &&
    ssh_to "mkdir -p e2e_vlp_jax && tar -xzf e2e_vlp_jax.tar.gz -C e2e_vlp_jax \
&& bash e2e_vlp_jax/launch/tpu_vm_setup.sh $bucket" "${everywhere[@]}"
}
train() {
  ssh_to "bash e2e_vlp_jax/launch/worker.sh$(quoted "$@")" \
    "${everywhere[@]}"
}

# How it ended on the first host (the exit codes of worker.sh).
outcome() {
  ssh_to 'cat e2e_vlp_jax/.cache/worker.exit' --node 0 --worker 0 2>/dev/null ||
    true
}

if [[ $DRY_RUN == 1 ]]; then
  create
  state
  install
  train "$@"
  outcome
  [[ -n $keep ]] || delete
  exit
fi

crashes=0 last=''
while ((crashes < ${E2E_VLP_CRASHES:-5})); do
  now="$(state)"
  [[ $now == "$last" ]] || say "$name: ${now:-not there yet}"
  last="$now"
  case "$now" in
    ACTIVE)
      ended=''
      if install; then
        train "$@" || true  # one code for many hosts: the next line knows more
        ended="$(outcome)"
      fi
      case "${ended//[!0-9]/}" in
        0)
          say "finished: $workdir"
          [[ -n $keep ]] || delete
          exit ;;
        2)
          say "$name is still there (and paid for); to delete it:"
          DRY_RUN=1 delete
          die "train did not accept its arguments; see above" ;;
        75) crashes=0 ;;
        *)
          if [[ $(state) == ACTIVE ]]; then
            crashes=$((crashes + 1))
          else
            crashes=0
          fi ;;
      esac ;;
    SUSPENDED | FAILED)  # taken away, or not to be had: ask again
      [[ $now == SUSPENDED ]] || crashes=$((crashes + 1))
      delete || true ;;
    '') create || crashes=$((crashes + 1)) ;;
  esac
  sleep 30
done
say "giving up after $crashes crashes in a row"
[[ -n $keep ]] || delete
exit 1
