#!/usr/bin/env bash
# What each host of a TPU VM runs: sets up Python once, then its part of the job.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: worker.sh SOURCE --prompts ... --out gs://... [options of python -m tpu.batch_inference]

Run by the launch scripts on every host of a TPU VM, from the checkout that they copied there.

variables:
  JAX         the jax to install (default: jax[tpu])
  MODEL_FROM  gs:// folder of a checkpoint, to be copied and used in place of --model
  DRY_RUN=1   print the commands only
EOF
}

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in
  -h | --help) usage; exit ;;
  '') die 'no job given (see worker.sh --help)' ;;
esac
check_switch DRY_RUN
check_model_from
cd "$ROOT"
# The images of TPU VMs come with a Python older than 3.11, which uv replaces.
export PATH=$HOME/.local/bin:$PATH
[ -x .venv/bin/python ] || {
  command -v uv >/dev/null || run python3 -m pip install --user --quiet uv
  run uv venv --quiet --python 3.12 .venv
}
run uv pip install --quiet --python .venv/bin/python "${JAX:-jax[tpu]}" '.[jobs]' gcsfs
if [ -n "${MODEL_FROM:-}" ]; then
  run mkdir -p model
  run gcloud storage rsync --recursive "$MODEL_FROM" model
  set -- "$@" --model model
fi
[ "$DRY_RUN" = 1 ] || exec .venv/bin/python -m tpu.batch_inference "$@"
run .venv/bin/python -m tpu.batch_inference "$@"
