#!/usr/bin/env bash
# Runs a batch job on the GPUs of this machine, and starts it again should it crash.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: [GPUS=0,1] launch_gpus.sh SOURCE --prompts ... --out DIR [options]

The arguments are those of python -m tpu.batch_inference. One process uses all GPUs; images are divided among
them. After a crash it is started again and does what is missing; not after a mistake in the arguments (exit
code 2) or a signal from you.

  GPUS=0,1,2,3 tpu/launch_gpus.sh photos --prompts "truck" "traffic light" --model s0 --dtype bfloat16 --out found

variables:
  GPUS        numbers, with commas between (default: all)
  RESTARTS    how often it is started again (default: 5)
  PYTHON      what runs it (default: python3)
  DRY_RUN=1   print the command only
EOF
}

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help) usage; exit ;; esac
RESTARTS=${RESTARTS:-5} PYTHON=${PYTHON:-python3}
check_switch DRY_RUN
check RESTARTS '[0-9]{1,4}' 'a whole number'
if [ -n "${GPUS:-}" ]; then check GPUS '[0-9]+(,[0-9]+)*' 'numbers with commas between, such as 0,1'; fi
[ $# -gt 0 ] || die 'no job given: SOURCE --prompts ... --out DIR (see launch_gpus.sh --help)'
need_program "$PYTHON"

command=(env "PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
[ -z "${GPUS:-}" ] || command+=("CUDA_VISIBLE_DEVICES=$GPUS")
command+=("$PYTHON" -m tpu.batch_inference "$@")
for ((i = 0; ; i++)); do
  status=0
  run "${command[@]}" || status=$?
  case $status in
    0 | 2 | 130 | 143) exit "$status" ;; # done; a mistake in the arguments; Ctrl-C; a polite kill
  esac
  [ "$i" -lt "$RESTARTS" ] || exit "$status"
  say "exit code $status: starting again ($((i + 1)) of $RESTARTS)"
done
