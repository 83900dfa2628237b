#!/usr/bin/env bash
# A Cloud TPU slice that is waited for: Google's queue gives it when there is room, and takes a spot slice back.
#
#   launch/queued_resource.sh [--dry-run] create | wait | status | delete
#   launch/queued_resource.sh [--dry-run] copy | install | follow | stop | run COMMAND ... (as launch/tpu_vm.sh)
#   launch/queued_resource.sh [--dry-run] resume COMMAND [ARGUMENT ...]
#
# The environment is that of launch/tpu_vm.sh; the queued resource and its slice are both called TPU_NAME.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
action=${1:-}
shift || true
if [[ -z ${TPU_NAME:-} || -z ${ZONE:-} ]]; then
  echo "error: TPU_NAME and ZONE are not set; see the head of launch/tpu_vm.sh" >&2
  exit 2
fi
accelerator=${ACCELERATOR_TYPE:-v5litepod-8} runtime=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}

queued() { # queued VERB ARGUMENT...
  local verb=$1
  shift
  echo "+ $(printf '%q ' gcloud compute tpus queued-resources "$verb" "$TPU_NAME" "$@" --zone="$ZONE")" >&2
  if ! $dry_run; then gcloud compute tpus queued-resources "$verb" "$TPU_NAME" "$@" --zone="$ZONE"; fi
}

on_slice() {
  if $dry_run; then set -- --dry-run "$@"; fi
  "$(dirname "$0")/tpu_vm.sh" "$@"
}

create() {
  queued create --node-id="$TPU_NAME" --accelerator-type="$accelerator" --runtime-version="$runtime" ${SPOT:+--spot}
}

state() { queued describe --format='value(state.state)'; }

await() { # until the slice is there
  local now
  while true; do
    if ! now=$(state); then
      echo "error: Google did not say how $TPU_NAME is; launch/queued_resource.sh wait asks again" >&2
      exit 1
    fi
    if [[ $now == ACTIVE ]] || $dry_run; then return; fi
    if [[ $now == FAILED || $now == SUSPENDED ]]; then
      echo "error: $TPU_NAME is $now; launch/queued_resource.sh resume asks for another slice" >&2
      exit 1
    fi
    echo "$TPU_NAME is $now" >&2
    sleep "${POLL_SECONDS:-60}"
  done
}

resume() { # resume COMMAND...: a slice that was taken back is queued for again; the run goes on from its workdir
  local now=SUSPENDED
  if $dry_run; then state; else now=$(state || echo MISSING) && echo "$TPU_NAME is $now" >&2; fi
  case $now in
    ACTIVE)
      on_slice resume "$@"
      return
      ;;
    FAILED | SUSPENDED)
      queued delete --force --quiet
      create
      ;;
    MISSING) create ;;
  esac
  await
  on_slice copy
  on_slice install
  on_slice run "$@"
}

case $action in
  create) create ;;
  wait) await ;;
  status) state ;;
  delete) queued delete --force --quiet ;;
  resume) resume "$@" ;;
  copy | install | run | follow | stop) on_slice "$action" "$@" ;;
  *)
    echo "error: ${action:-no action}: choose one of create, wait, status, copy, install, run, follow, stop, resume, delete" >&2
    exit 2
    ;;
esac
