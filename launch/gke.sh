#!/usr/bin/env bash
# Trains on TPU slices of a Kubernetes cluster (GKE): writes a JobSet and
# applies it with kubectl. The cluster starts train on every host of every slice,
# and again on all of them when one is lost; the run goes on. launch/README.md
# explains the options, and says how xpk does the same.
#
#   bash launch/gke.sh --name N --topology v5e:4x4 --image I --bucket B \
#       [--slices 2] [--spot] ... \
#       -- --config C.py:ARG --workdir /mnt/gcs/runs/R [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/launcher.sh
source launch/launcher.sh

single='--name --topology --image --bucket --slices --restarts --cache-gb'
single+=' --service-account --chips-per-host'
several='--env --node-selector --label' flags='--spot --dry-run'
name='' topology='' image='' bucket='' slices=1 cache_gb=50 restarts=100
service_account=default chips_per_host=4 spot='' dry_run=''
env=() node_selector=() label=() train=()
read_options "$@"
check image '[-_./:@a-zA-Z0-9]+' 'REGISTRY/NAME:TAG'
check service_account '[a-z]([-a-z0-9]*[a-z0-9])?' 'a-z, 0-9 and -'
check restarts '[1-9][0-9]{0,3}' 'a number'
check chips_per_host '[1248]' '1, 2, 4 or 8'
check_options

declare -A names=([v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice
  [v5p]=tpu-v5p-slice [v6e]=tpu-v6e-slice [v7x]=tpu7x)
((chips >= chips_per_host)) || chips_per_host="$chips"
((chips % chips_per_host == 0)) ||
  die "--chips-per-host: found $chips_per_host, which does not divide $chips"
hosts=$((chips / chips_per_host))
((slices == 1 || hosts > 1)) ||
  die "--slices: found $slices, but GKE joins no slices of one host ($topology)"
node_selector+=("cloud.google.com/gke-tpu-accelerator=${names[$generation]}"
  "cloud.google.com/gke-tpu-topology=$shape")
tolerations='[]' host_network=false
options=implicit-dirs,rename-dir-limit=100000
options+=,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
volume=("bucketName=$bucket" "mountOptions=$options"  # as in tpu_vm_host.sh
  "fileCacheCapacity=${cache_gb}Gi" fileCacheForRangeRead=true)
if [[ -n $spot ]]; then
  node_selector+=(cloud.google.com/gke-spot=true)
  tolerations='[{key: cloud.google.com/gke-spot, operator: Exists}]'
fi
# Slices talk over the network of their hosts.
((slices == 1)) || host_network=true volume+=(hostNetworkPodKSA=true)

# Words as JSON, which YAML reads as it stands, whatever is in them: a list, or
# pairs K=V as an object or (env) a list of objects. Kubernetes expands $(NAME)
# in commands and variables, where it reads $$ as $.
json() {
  python3 -c 'import json, sys
what, *words = sys.argv[1:]
pairs = [w.partition("=")[::2] for w in words]
print(json.dumps({"object": dict(pairs),
    "list": [w.replace("$", "$$") for w in words],
    "env": [{"name": k, "value": v.replace("$", "$$")} for k, v in pairs]}[what]))
' "$@"
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels: $(json object "${label[@]}")
  annotations:
    # A slice's hosts on one node pool, a node pool for each slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    restartStrategy: BlockingRecreate  # no new host meets an old one
    rules:
    # Exit code 2 is a mistake of the user (below): once is enough.
    - {name: mistake, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0  # one host lost: all start again, together
        podFailurePolicy: {rules: [{action: FailJob, onExitCodes: {
          containerName: train, operator: In, values: [2]}}]}
        template:
          metadata:
            annotations: {gke-gcsfuse/volumes: "true"}
          spec:
            restartPolicy: Never
            serviceAccountName: $service_account
            terminationGracePeriodSeconds: 300  # to save; spot machines: less
            hostNetwork: $host_network
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector: $(json object "${node_selector[@]}")
            tolerations: $tolerations
            containers:
            - name: train
              image: $image
              command: $(json list bash launch/worker.sh "${train[@]}")
              env: $(json env "${env[@]}")
              resources: {requests: {google.com/tpu: $chips_per_host},
                limits: {google.com/tpu: $chips_per_host}}
              volumeMounts: [{name: gcs, mountPath: $MOUNT}]
            volumes: [{name: gcs, csi: {driver: gcsfuse.csi.storage.gke.io,
              volumeAttributes: $(json object "${volume[@]}")}}]
YAML
}

if [[ $DRY_RUN == 1 ]]; then
  run kubectl apply -f -
  manifest
  exit
fi
ask_train
# A finished JobSet keeps its name, and "apply" would leave it as it is.
if found="$(kubectl get jobset "$name" -o 'jsonpath=is {.status.terminalState}' \
  2>&1)"; then
  [[ $found != 'is ' ]] ||
    die "--name: JobSet '$name' is running; to stop it: kubectl delete jobset $name"
  say "deleting the JobSet of that name, which $found"
  kubectl delete jobset "$name"
elif [[ $found != *NotFound* ]]; then
  die "kubectl: $(tail -n 1 <<<"$found")"
fi
manifest | kubectl apply -f -
say "watch: kubectl logs -f --tail=-1 -c train --max-log-requests 999 -l" \
  "jobset.sigs.k8s.io/jobset-name=$name; stop: kubectl delete jobset $name"
