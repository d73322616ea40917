#!/usr/bin/env bash
# Submits a batch job to Slurm: one process a node, all GPUs of the node in it.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: [NODES=...] [GPUS_PER_NODE=...] launch_slurm.sh SOURCE --prompts ... --out DIR [options]

The arguments are those of python -m tpu.batch_inference; the job runs in the current folder, with its output on
a disk that all nodes share. A job that is preempted, or whose node fails, is queued again by Slurm and does what
is missing; so does one that is submitted again.

  NODES=4 GPUS_PER_NODE=8 TIME=08:00:00 tpu/launch_slurm.sh \
    /data/photos --prompts "truck" "traffic light" --model s0 --dtype bfloat16 --out /data/found

variables:
  NODES            (default: 1)
  GPUS_PER_NODE    (default: 1)
  CPUS_PER_TASK    cores of a node, which decode the images (default: 8 a GPU)
  TIME             limit, such as 08:00:00 or 1-00:00:00 (default: the partition's)
  PARTITION        (default: Slurm's)
  ACCOUNT          (default: Slurm's)
  NAME             of the job (default: sam3lt)
  PYTHON           what runs it, on the nodes (default: python3)
  DRY_RUN=1        print the command only
EOF
}

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help) usage; exit ;; esac
NAME=${NAME:-sam3lt} NODES=${NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-1} PYTHON=${PYTHON:-python3}
check_switch DRY_RUN
check_name
check NODES '[1-9][0-9]{0,3}' 'a whole number from 1'
check GPUS_PER_NODE '[1-9][0-9]?' 'a whole number from 1'
CPUS_PER_TASK=${CPUS_PER_TASK:-$((8 * GPUS_PER_NODE))}
check CPUS_PER_TASK '[1-9][0-9]{0,3}' 'a whole number from 1'
if [ -n "${TIME:-}" ]; then check TIME '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' 'a limit such as 08:00:00'; fi
[ $# -gt 0 ] || die 'no job given: SOURCE --prompts ... --out DIR (see launch_slurm.sh --help)'
need_program sbatch

options=(--job-name="$NAME" --nodes="$NODES" --ntasks-per-node=1 --gpus-per-node="$GPUS_PER_NODE")
options+=(--cpus-per-task="$CPUS_PER_TASK" --requeue --open-mode=append --output="$NAME-%j.log")
[ -z "${TIME:-}" ] || options+=(--time="$TIME")
[ -z "${PARTITION:-}" ] || options+=(--partition="$PARTITION")
[ -z "${ACCOUNT:-}" ] || options+=(--account="$ACCOUNT")
# A node that is lost leaves the others at work: they need nothing from each other.
command="PYTHONPATH=$(printf %q "$ROOT")\${PYTHONPATH:+:\$PYTHONPATH}"
command+=" srun --kill-on-bad-exit=0$(printf ' %q' "$PYTHON" -m tpu.batch_inference "$@")"
run sbatch "${options[@]}" --wrap="$command"
