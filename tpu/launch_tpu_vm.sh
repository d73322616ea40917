#!/usr/bin/env bash
# Makes a TPU VM, runs a batch job on every host of it, and deletes it.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: PROJECT=... ZONE=... ACCELERATOR_TYPE=... launch_tpu_vm.sh SOURCE --prompts ... --out gs://... [options]

The arguments are those of python -m tpu.batch_inference. SOURCE and --prompts-file are read on the TPU: give
gs:// addresses. Started again after any failure, the job does what is missing and only that.

  PROJECT=my-project ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-8 tpu/launch_tpu_vm.sh \
    gs://my-bucket/photos --prompts "truck" "traffic light" --model s0 --dtype bfloat16 --out gs://my-bucket/found

variables:
  PROJECT            the Google Cloud project
  ZONE               a zone that has the TPU, such as us-west4-a
  ACCELERATOR_TYPE   v5litepod-N (v5e) or v6e-N, N chips: 1, 4, 8 on one host; 16, 32, ... 256 on N / 4 hosts
  NAME               of the TPU VM (default: sam3lt). One of this name that exists is used, and kept
  SPOT=1             a spot VM: cheaper, and taken away when others need it
  SERVICE_ACCOUNT    to run as (default: the project's)
  MODEL_FROM         gs:// folder of a checkpoint, which each host copies first and uses in place of --model
  KEEP=1             do not delete the TPU VM afterwards: it goes on costing
  DRY_RUN=1          print the commands only
EOF
}

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help) usage; exit ;; esac
NAME=${NAME:-sam3lt} SPOT=${SPOT:-0} KEEP=${KEEP:-0}
need PROJECT ZONE ACCELERATOR_TYPE
check_project
check_zone
check_name
check_accelerator
check_service_account
check_model_from
check_switch SPOT KEEP DRY_RUN
check_job "$@"
need_program gcloud tar
PLACE=(--zone="$ZONE" --project="$PROJECT")

delete() {
  run gcloud compute tpus tpu-vm delete "$NAME" "${PLACE[@]}" --quiet ||
    say "not deleted: see what is left with gcloud compute tpus tpu-vm list ${PLACE[*]}"
}

if [ "$DRY_RUN" = 0 ] && gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" >/dev/null 2>&1; then
  say "using the TPU VM $NAME, which exists; it is kept"
else
  options=(--accelerator-type="$ACCELERATOR_TYPE" --version="$(runtime_version)")
  [ "$SPOT" = 0 ] || options+=(--spot)
  [ -z "${SERVICE_ACCOUNT:-}" ] || options+=(--service-account="$SERVICE_ACCOUNT")
  # Before the request: one that is interrupted may still have made the machine.
  [ "$KEEP" = 1 ] || trap delete EXIT
  run gcloud compute tpus tpu-vm create "$NAME" "${PLACE[@]}" "${options[@]}"
fi
deploy_and_run "$@"
