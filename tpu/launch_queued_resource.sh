#!/usr/bin/env bash
# Queues for a TPU slice, runs a batch job on every host of it, queues again if it is taken away, and deletes it.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: PROJECT=... ZONE=... ACCELERATOR_TYPE=... launch_queued_resource.sh SOURCE --prompts ... --out gs://... [options]

The arguments are those of python -m tpu.batch_inference. SOURCE and --prompts-file are read on the TPU: give
gs:// addresses. A spot slice that is taken away is asked for again, and the job does what is missing.

  PROJECT=my-project ZONE=us-east5-a ACCELERATOR_TYPE=v6e-16 SPOT=1 tpu/launch_queued_resource.sh \
    gs://my-bucket/photos --prompts "truck" "traffic light" --model s0 --dtype bfloat16 --out gs://my-bucket/found

variables:
  PROJECT            the Google Cloud project
  ZONE               a zone that has the TPU, such as us-east5-a
  ACCELERATOR_TYPE   v5litepod-N (v5e) or v6e-N, N chips: 1, 4, 8 on one host; 16, 32, ... 256 on N / 4 hosts
  NAME               of the queued resource and its TPU VM (default: sam3lt)
  SPOT=1             a spot slice: cheaper, and taken away when others need it
  VALID_UNTIL        give up when there is none within this time, such as 6h (default: wait)
  SERVICE_ACCOUNT    to run as (default: the project's)
  MODEL_FROM         gs:// folder of a checkpoint, which each host copies first and uses in place of --model
  ATTEMPTS           slices to ask for in all (default: 10)
  POLL               seconds between two looks at the queue (default: 30)
  DRY_RUN=1          print the commands only
EOF
}

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help) usage; exit ;; esac
NAME=${NAME:-sam3lt} SPOT=${SPOT:-0} ATTEMPTS=${ATTEMPTS:-10} POLL=${POLL:-30}
need PROJECT ZONE ACCELERATOR_TYPE
check_project
check_zone
check_name
check_accelerator
check_service_account
check_model_from
check_switch SPOT DRY_RUN
check ATTEMPTS '[1-9][0-9]{0,3}' 'a whole number from 1'
check POLL '[0-9]{1,4}' 'seconds'
if [ -n "${VALID_UNTIL:-}" ]; then check VALID_UNTIL '[1-9][0-9]*[smhd]' 'a time such as 90m or 6h'; fi
check_job "$@"
need_program gcloud tar
PLACE=(--zone="$ZONE" --project="$PROJECT")

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet ||
    say "not deleted: see what is left with gcloud compute tpus queued-resources list ${PLACE[*]}"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
}

request() {
  local options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE")
  options+=(--runtime-version="$(runtime_version)")
  [ "$SPOT" = 0 ] || options+=(--spot)
  [ -z "${VALID_UNTIL:-}" ] || options+=(--valid-until-duration="$VALID_UNTIL")
  [ -z "${SERVICE_ACCOUNT:-}" ] || options+=(--service-account="$SERVICE_ACCOUNT")
  run gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "${options[@]}"
}

# Whether the slice is still there, some while after a failure: its loss shows late.
still_there() {
  local look
  for look in 1 2 3 4; do
    [ "$(state || echo unknown)" = ACTIVE ] || return 1
    [ "$(gcloud compute tpus tpu-vm describe "$NAME" "${PLACE[@]}" --format='value(state)' || echo unknown)" = READY ] ||
      return 1
    [ "$look" = 4 ] || sleep "$POLL"
  done
}

# Until the slice is there; fails if it will not come.
wait_for_slice() {
  local now before=''
  if [ "$DRY_RUN" = 1 ]; then
    run gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format='value(state.state)'
    return
  fi
  while true; do
    now=$(state) || now=unknown
    [ "$now" = "$before" ] || say "queued resource $NAME: $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep "$POLL"
  done
}

if [ "$DRY_RUN" = 0 ] && state >/dev/null 2>&1; then
  die "the queued resource $NAME exists; choose another NAME, or delete it: gcloud compute tpus queued-resources delete $NAME ${PLACE[*]} --force"
fi
trap delete EXIT
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  request
  wait_for_slice || {
    say "no slice came (attempt $attempt of $ATTEMPTS)"
    [ "$attempt" -lt "$ATTEMPTS" ] || exit 1
    delete
    continue
  }
  status=0
  deploy_and_run "$@" || status=$?
  if [ "$status" = 0 ] || [ "$DRY_RUN" = 1 ]; then exit "$status"; fi
  if still_there; then
    say "the job failed, the slice is there: not tried again"
    exit "$status"
  fi
  say "the slice was taken away (attempt $attempt of $ATTEMPTS)"
  [ "$attempt" -lt "$ATTEMPTS" ] || exit "$status"
  delete
done
