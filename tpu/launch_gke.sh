#!/usr/bin/env bash
# Submits a batch job to a GKE cluster as a JobSet on one TPU slice.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: PROJECT=... LOCATION=... CLUSTER=... IMAGE=... ACCELERATOR_TYPE=... launch_gke.sh SOURCE --prompts ... --out gs://... [options]

The arguments are those of python -m tpu.batch_inference. The cluster needs JobSet and a node pool of the slice;
README.md says how to get both, and how to build the image from the Dockerfile. A pod that is lost is started
again, and the job does what is missing.

  PROJECT=my-project LOCATION=us-east5 CLUSTER=tpus IMAGE=us-docker.pkg.dev/my-project/images/sam3lt:1 \
    ACCELERATOR_TYPE=v6e-16 tpu/launch_gke.sh \
    gs://my-bucket/photos --prompts "truck" "traffic light" --model s0 --dtype bfloat16 --out gs://my-bucket/found

variables:
  PROJECT            the Google Cloud project
  LOCATION           the cluster's region or zone
  CLUSTER            the cluster's name
  IMAGE              the image to run
  ACCELERATOR_TYPE   v5litepod-N (v5e) or v6e-N, N chips: 1, 4, 8 on one host; 16, 32, ... 256 on N / 4 hosts
  NAME               of the JobSet (default: sam3lt)
  SPOT=1             run on spot nodes
  SERVICE_ACCOUNT    Kubernetes service account, which may read and write the bucket (default: default)
  MAX_RESTARTS       how often lost pods are started again (default: 20)
  DRY_RUN=1          print the commands and the manifest only
EOF
}

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help) usage; exit ;; esac
NAME=${NAME:-sam3lt} SPOT=${SPOT:-0} MAX_RESTARTS=${MAX_RESTARTS:-20} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
need PROJECT LOCATION CLUSTER IMAGE ACCELERATOR_TYPE
check_project
check LOCATION '[a-z]+-[a-z]+[0-9]+(-[a-z])?' 'a region or zone such as us-east5'
check CLUSTER '[a-z][-a-z0-9]{0,39}' 'the name of a cluster'
check IMAGE '[^[:space:]]+' 'an image without spaces'
check SERVICE_ACCOUNT '[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?' 'the name of a Kubernetes service account'
check MAX_RESTARTS '[0-9]{1,4}' 'a whole number'
check_name
check_accelerator
check_switch SPOT DRY_RUN
check_job "$@"
command -v python3 >/dev/null || die 'python3 is not installed, or not on the PATH'
need_program gcloud kubectl

options=(--name "$NAME" --image "$IMAGE" --accelerator-type "$ACCELERATOR_TYPE")
options+=(--service-account "$SERVICE_ACCOUNT" --max-restarts "$MAX_RESTARTS")
[ "$SPOT" = 0 ] || options+=(--spot)
manifest=$(cd "$ROOT" && python3 -m tpu.jobset "${options[@]}" -- "$@")
run gcloud container clusters get-credentials "$CLUSTER" --location="$LOCATION" --project="$PROJECT"
run kubectl apply -f - <<<"$manifest"
[ "$DRY_RUN" = 0 ] || printf '%s\n' "$manifest"
cat >&2 <<EOF
follow it:  kubectl logs --follow --prefix --selector=jobset.sigs.k8s.io/jobset-name=$NAME
its state:  kubectl get jobset $NAME
remove it:  kubectl delete jobset $NAME
EOF
