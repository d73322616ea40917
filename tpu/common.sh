# shellcheck shell=bash
# Shared by the launch scripts: checks of their variables, dry runs, and the way of this checkout onto a TPU.

# DRY_RUN=1 prints every command instead of running it.
DRY_RUN=${DRY_RUN:-0}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  printf '%s: error: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# run COMMAND ARGUMENT...
run() {
  if [ "$DRY_RUN" = 1 ]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# need VARIABLE...: each must be set to something.
need() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || die "$name is not set (see ${0##*/} --help)"
  done
}

# check VARIABLE EXPRESSION ACCEPTED: its value must match the extended regular expression as a whole.
check() {
  [[ ${!1} =~ ^($2)$ ]] || die "$1 must be $3, got '${!1}'"
}

# check_switch VARIABLE...: each must be 0 or 1.
check_switch() {
  local name
  for name in "$@"; do
    check "$name" '0|1' '0 or 1'
  done
}

# need_program PROGRAM...: each must be on the PATH, unless nothing is going to be run.
need_program() {
  local program
  for program in "$@"; do
    [ "$DRY_RUN" = 1 ] || command -v "$program" >/dev/null || die "$program is not installed, or not on the PATH"
  done
}

check_name() {
  check NAME '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'at most 40 lower-case letters, digits and hyphens, a letter first'
}

check_accelerator() {
  check ACCELERATOR_TYPE '(v5litepod|v6e)-(1|4|8|16|32|64|128|256)' \
    'v5litepod-N (v5e) or v6e-N with N = 1, 4, 8, 16, 32, 64, 128 or 256 chips'
}

check_project() {
  check PROJECT '[a-z][-a-z0-9.:]{4,60}[a-z0-9]' 'a project id'
}

check_zone() {
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-west4-a'
}

check_service_account() {
  [ -z "${SERVICE_ACCOUNT:-}" ] || check SERVICE_ACCOUNT '[^@[:space:]]+@[^@[:space:]]+' 'the address of a service account'
}

check_model_from() {
  [ -z "${MODEL_FROM:-}" ] || check MODEL_FROM 'gs://[^[:space:]]+' 'a folder gs://bucket/folder'
}

# The operating system image that belongs to ACCELERATOR_TYPE.
runtime_version() {
  case $ACCELERATOR_TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# check_job ARGUMENT...: the job's own arguments. Its output must outlive the machine that writes it.
check_job() {
  [ $# -gt 0 ] || die "no job given: SOURCE --prompts ... --out gs://... (see ${0##*/} --help)"
  local out='' argument previous=''
  for argument in "$@"; do
    [ "$previous" != --out ] || out=$argument
    case $argument in --out=*) out=${argument#--out=} ;; esac
    previous=$argument
  done
  [ -n "$out" ] || die 'the job has no --out'
  case $out in
    gs://?*) ;;
    *) die "--out must be gs://bucket/folder, for a machine's own disk goes with it; got '$out'" ;;
  esac
}

# Copies this checkout to every host of the TPU VM NAME (at PLACE, --zone and --project) and runs the job there;
# returns its exit status.
deploy_and_run() {
  local folder archive command status=0
  folder=$(mktemp -d) || return
  archive=$folder/sam3lt.tar.gz
  # On the hosts of one slice no variable tells of the others; the job has to ask.
  if [ "${ACCELERATOR_TYPE##*-}" -gt 8 ] && [[ " $* " != *' --distributed'* ]]; then
    set -- "$@" --distributed always
  fi
  command='mkdir -p ~/sam3lt && tar -xzf ~/sam3lt.tar.gz -C ~/sam3lt &&'
  command+=" MODEL_FROM=$(printf %q "${MODEL_FROM:-}") bash ~/sam3lt/tpu/worker.sh$(printf ' %q' "$@")"
  # shellcheck disable=SC2153 # NAME is the launch script's
  {
    run tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" pyproject.toml README.md LICENSE sam3lt_jax tpu &&
      run gcloud compute tpus tpu-vm scp "$archive" "$NAME:sam3lt.tar.gz" "${PLACE[@]}" --worker=all &&
      run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all --command="$command"
  } || status=$?
  rm -rf "$folder"
  return "$status"
}
