#!/usr/bin/env bash
# Trains on a Cloud TPU slice until the run is finished: asks for the slice (a
# queued resource) and hands it a startup script. The hosts do the rest by
# themselves (tpu_vm_host.sh), however many they are, also after a repair; this
# script watches, asks again when the slice was taken away, and deletes it.
#
#   bash launch/tpu_vm.sh --name N --zone Z --topology v5e:4x4 --bucket B \
#       [--slices 2] [--spot] [--keep] ... \
#       -- --config C.py:ARG --workdir /mnt/gcs/runs/R [--config.key=value ...]
#
# launch/README.md explains the options. Exit code: 0 finished, 1 given up, 2 a
# mistake of the user. It may be killed: training goes on, and the same command
# watches again. E2E_VLP_RUNTIME: TPU software version, if not the usual one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/launcher.sh
source launch/launcher.sh

single='--name --zone --topology --bucket --project --slices --cache-gb'
several='--env --create-arg' flags='--spot --keep --dry-run'
name='' zone='' topology='' bucket='' project='' slices=1 cache_gb=50
spot='' keep='' dry_run='' env=() create_arg=() train=()
read_options "$@"
check zone '[-a-z0-9]+' 'one such as us-central1-a'
check_options

# Cloud TPU's own names. v4 and v5p count cores, two a chip.
case "$generation" in
  v4) type="v4-$((2 * chips))" runtime=tpu-ubuntu2204-base ;;
  v5e) type="v5litepod-$chips" runtime=v2-alpha-tpuv5-lite ;;
  v5p) type="v5p-$((2 * chips))" runtime=v2-alpha-tpuv5 ;;
  v6e) type="v6e-$chips" runtime=v2-alpha-tpuv6e ;;
  *) die "--topology: Cloud TPU's API does not serve $generation; use gke.sh" ;;
esac
tpus=(gcloud compute tpus) queue=(gcloud compute tpus queued-resources)
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
nodes=("$name") create_as=(--node-id "$name")
if [[ $slices != 1 ]]; then
  mapfile -t nodes < <(seq -f "$name-%.0f" 0 $((slices - 1)))
  create_as=(--node-count "$slices" --node-prefix "$name")
fi
[[ -z $spot ]] || create_as+=(--spot)
[[ -z $keep ]] || env+=(E2E_VLP_KEEP=1)
remote="gs://$bucket/launch/$name"
here="$(mktemp -d)"
trap 'rm -rf "$here"' EXIT

# What a host runs, the words of train quoted once more, for the shell there;
start="cd /opt/e2e_vlp_jax && exec env HOME=/root$(quoted "${env[@]}") bash \
launch/tpu_vm_host.sh $bucket $name $cache_gb$(quoted "${train[@]}")"
# and what starts that with the machine, as a unit of its own: it gets SIGTERM
# while network and bucket are still there, and the time to save.
echo "$start" >"$here/start.sh"
cat >"$here/startup.sh" <<BASH
#!/bin/bash
mkdir -p /opt/e2e_vlp_jax && cd /opt/e2e_vlp_jax
export PATH=\$PATH:/snap/bin
until gcloud storage cp "$remote/start.sh" "$remote/code.tar.gz" . &&
    tar -xzf code.tar.gz; do sleep 30; done
systemd-run --collect --unit=e2e_vlp_jax --property=TimeoutStopSec=300 \
  --property="After=network-online.target e2e_vlp_gcs.service" \
  bash /opt/e2e_vlp_jax/start.sh
BASH

# Sends the working tree, edits included, what git ignores left out.
send() {
  local pack='git ls-files -z --cached --others --exclude-standard | '
  pack+="tar --null -T - -czf$(quoted "$here/code.tar.gz")"
  run bash -o pipefail -c "$pack" &&
    run gcloud storage cp "$here/code.tar.gz" "$here/start.sh" "$remote/"
}
create() {
  run "${queue[@]}" create "$name" "${where[@]}" "${create_as[@]}" \
    --accelerator-type "$type" --runtime-version "${E2E_VLP_RUNTIME:-$runtime}" \
    --scopes https://www.googleapis.com/auth/cloud-platform \
    --metadata-from-file "startup-script=$here/startup.sh" "${create_arg[@]}"
}
delete() { run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }
remote() { gcloud storage cat "$remote/$1" 2>/dev/null || true; }

# ACTIVE, SUSPENDED ... ; NONE only if there is none; else gcloud has failed.
state() {
  "${queue[@]}" describe "$name" "${where[@]}" \
    --format 'value(state.state)' 2>"$here/errors" && return
  grep -q NOT_FOUND "$here/errors" && echo NONE && return
  echo "unknown, gcloud fails: $(tail -n 1 "$here/errors")"
}

# What goes on there, in a line: nodes that are not READY, the log of host 0.
news() {
  local node found
  for node in "${nodes[@]}"; do
    found="$("${tpus[@]}" tpu-vm describe "$node" "${where[@]}" \
      --format 'value(state)' 2>/dev/null || true)"
    [[ ${found:-READY} == READY ]] || echo -n "; $node is $found, wait an hour"
  done
  found="$(remote log/0-0 | tail -n 1)"
  echo "; ${found:-no log of host 0 yet}"
}

if [[ $DRY_RUN == 1 ]]; then
  printf "+ cat <<'START'\n%s\nSTART\n" "$(cat "$here"/start{up,}.sh)"
  send
  create
  [[ -n $keep ]] || delete
  exit
fi

ask_train
now="$(state)" same=''
[[ $now != unknown* ]] || die "$now"
[[ $(remote start.sh) != "$start" ]] || same=1
[[ $now == NONE || -n $same ]] || die "--name: '$name' runs something else, or" \
  "the bucket cannot be read: gcloud storage cat $remote/start.sh"
if [[ $now == NONE ]] && [[ -z $same || $(remote exit) != 0 ]]; then
  gcloud storage rm "$remote/exit" 2>/dev/null || true
fi
made='' sent='' failures=0 last=''
while ((failures < 5)); do
  code="$(remote exit)"
  if [[ -n $code ]]; then
    say "ended with code $code, workdir $workdir; log: $remote/log/0-0"
    [[ -n $keep || $(state) == NONE ]] || delete ||
      say "not deleted: look with ${queue[*]} list ${where[*]}"
    exit "$code"
  fi
  now="$(state)" line=''
  case "$now" in
    NONE)
      [[ -z $made ]] || { say "somebody has deleted $name"; exit 1; }
      if { [[ -n $sent ]] || send; } 2>"$here/errors" && sent=1 &&
        create 2>"$here/errors"; then
        made=1
      else
        line="; $(tail -n 1 "$here/errors")" failures=$((failures + 1))
        ! grep -qE 'INVALID_ARG|PERMISSION_DENIED|NOT_FOUND|does not (exist|have)' \
          "$here/errors" || die "$name was not made$line"
      fi ;;
    ACTIVE) made=1 failures=0 line="$(news)" ;;
    FAILED | SUSPENDED)  # not to be had, or taken away: ask again
      [[ $now == SUSPENDED ]] || failures=$((failures + 1))
      line="; $("${queue[@]}" describe "$name" "${where[@]}" --format \
        'value(state.failedData.error.message)' 2>/dev/null || true)"
      ! delete || made='' ;;
  esac
  [[ $now$line == "$last" ]] || say "$name: ${now/NONE/asked for}$line"
  last="$now$line"
  sleep 30
done
say "giving up after $failures failures in a row"
exit 1
