#!/usr/bin/env bash
# Trains on TPU slices of a Kubernetes cluster (GKE): writes a JobSet and
# applies it with kubectl. The cluster starts it on every host of every slice
# and starts all of them again when one is lost; the run goes on from its
# checkpoint.
#
#   bash launch/gke.sh --name N --topology v5e:4x4 --image I --bucket B \
#       [--slices 1] [--spot] [--service-account default] [--restarts 100] \
#       [--chips-per-host 4] [--dry-run] \
#       -- --config C.py:ARG --workdir /mnt/gcs/runs/R [--config.key=value ...]
#
#   --topology   of one slice, in preflight's words; the cluster has a node
#                pool of that shape for every slice
#   --image      made from launch/Dockerfile with DEVICE=tpu
#   --bucket     seen by every host as /mnt/gcs
#   --restarts   how often the whole set is started again
#   --dry-run    print the command and the manifest, do nothing (or DRY_RUN=1)
# Needs kubectl and python3 here; in the cluster JobSet and the Cloud Storage
# FUSE driver, both of which launch/README.md turns on.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/launcher.sh
source launch/launcher.sh

name='' topology='' image='' bucket='' slices=1 spot=''
service_account=default restarts=100 chips_per_host=4
while [[ $# -gt 0 && $1 != -- ]]; do
  case "$1" in
    --name | --topology | --image | --bucket | --slices | --restarts | \
      --service-account | --chips-per-host)
      needs_value "$@"
      option="${1#--}"
      printf -v "${option//-/_}" '%s' "$2"
      shift 2 ;;
    --spot) spot=1; shift ;;
    --dry-run) DRY_RUN=1; shift ;;
    *) die "unknown option '$1' (arguments of train come after --)" ;;
  esac
done
[[ $# -gt 0 ]] || die 'expected -- and the arguments of train'
shift
for option in name topology image bucket; do
  [[ -n ${!option} ]] || die "--$option is missing"
done
check_name --name "$name"
check_name --service-account "$service_account"
check_topology "$topology"
check_bucket "$bucket"
check_count --slices "$slices"
check_count --restarts "$restarts"
check_count --chips-per-host "$chips_per_host"
[[ $image =~ ^[-_./:@a-zA-Z0-9]+$ ]] ||
  die "--image: found '$image', expected REGISTRY/NAME:TAG"
check_train "$@"
check_workdir_is_kept

case "$generation" in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac
((chips >= chips_per_host)) || chips_per_host="$chips"
((chips % chips_per_host == 0)) ||
  die "--chips-per-host: found $chips_per_host, which does not divide $chips"
hosts=$((chips / chips_per_host))

# A list of words as JSON, which YAML reads as it stands, whatever is in them.
json() {
  python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"
}
# Kubernetes expands $(NAME) in a command, and reads $$ as $.
command="$(json bash launch/worker.sh "${@//\$/\$\$}")"
mount_options=implicit-dirs,metadata-cache:ttl-secs:0
mount_options+=,metadata-cache:negative-ttl-secs:0
spot_lines=''
[[ -z $spot ]] || spot_lines='
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Exists}'

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # A slice's hosts on one node pool, a node pool for each slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    # Exit code 2 is a mistake of the user (below): once is enough.
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0  # one host lost: all start again, together
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2]}
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
          spec:
            restartPolicy: Never
            serviceAccountName: $service_account
            terminationGracePeriodSeconds: 300  # to save; spot machines: less
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $shape$spot_lines
            containers:
            - name: train
              image: $image
              command: $command
              resources:
                requests: {google.com/tpu: $chips_per_host}
                limits: {google.com/tpu: $chips_per_host}
              volumeMounts:
              - {name: gcs, mountPath: $MOUNT}
            volumes:
            - name: gcs
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $bucket
                  # As in tpu_vm_setup.sh.
                  mountOptions: $mount_options
                  fileCacheCapacity: 50Gi
                  fileCacheForRangeRead: "true"
YAML
}

if [[ $DRY_RUN == 1 ]]; then
  run kubectl apply -f -
  manifest
  exit
fi
manifest | kubectl apply -f -
say "watch:  kubectl get jobset $name;  kubectl logs -f -c train -l" \
  "jobset.sigs.k8s.io/jobset-name=$name --max-log-requests $((slices * hosts))"
say "stop:   kubectl delete jobset $name"
