#!/usr/bin/env bash
# A Cloud TPU slice: create it, put this repository on all its workers, run, follow, resume after a preemption, delete.
#
#   launch/tpu_vm.sh [--dry-run] create | copy | install | follow | stop | delete
#   launch/tpu_vm.sh [--dry-run] run | resume COMMAND [ARGUMENT ...]
#
# The environment names the slice:
#   TPU_NAME, ZONE                 required
#   ACCELERATOR_TYPE=v5litepod-8   what `gcloud compute tpus accelerator-types list` says
#   RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   SPOT=1                         a slice that may be preempted; `resume` brings it back
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
action=${1:-}
shift || true
if [[ -z ${TPU_NAME:-} || -z ${ZONE:-} ]]; then
  echo "error: TPU_NAME and ZONE are not set; for example TPU_NAME=ddpm ZONE=us-west4-a launch/tpu_vm.sh create" >&2
  exit 2
fi
accelerator=${ACCELERATOR_TYPE:-v5litepod-8} runtime=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite}

# Commands for the workers, where $HOME, $PATH and the like are theirs.
# shellcheck disable=SC2016
{
  # The VM images have an older Python; uv brings one.
  installing='set -e; mkdir -p ddpm_jax; tar -xzf ddpm_jax.tar.gz -C ddpm_jax; cd ddpm_jax
python3 -m pip install --quiet --user uv; PATH=$HOME/.local/bin:$PATH
uv venv --quiet --allow-existing --python 3.12 .venv; uv pip install --quiet --python .venv/bin/python -e ".[tpu]"'
  # In a session of its own, so that it outlives the connection.
  starting='cd ddpm_jax; PATH=$PWD/.venv/bin:$PATH; nohup setsid bash launch/restart.sh COMMAND>> ~/ddpm_jax.log 2>&1 < /dev/null & echo $! > ~/ddpm_jax.pid'
  # restart.sh passes the signal on; the run saves and ends.
  stopping='pid=$(cat ~/ddpm_jax.pid) && kill "$pid" && tail --pid="$pid" -f /dev/null || true'
}

run() { # what is about to run, and then its run
  echo "+ $(printf '%q ' "$@")" >&2
  if ! $dry_run; then "$@"; fi
}

tpu_vm() { # tpu_vm VERB ARGUMENT...
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$ZONE"
}

on() { # on WORKERS COMMAND: a shell command on these workers
  tpu_vm ssh "$TPU_NAME" --worker="$1" --command="$2"
}

create() {
  tpu_vm create "$TPU_NAME" --accelerator-type="$accelerator" --version="$runtime" ${SPOT:+--spot}
}

copy() { # the last commit; what is not committed stays here
  local archive=${TMPDIR:-/tmp}/ddpm_jax.tar.gz
  run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
  tpu_vm scp "$archive" "$TPU_NAME:ddpm_jax.tar.gz" --worker=all
}

remake() {
  create
  copy
  on all "$installing"
}

start() { # start COMMAND...: on all workers
  if (($# == 0)); then
    echo "error: no command; for example launch/tpu_vm.sh run python -m ddpm_jax.train --config configs/cifar10.py" >&2
    exit 2
  fi
  on all "${starting%%COMMAND*}$(printf '%q ' "$@")${starting##*COMMAND}"
}

resume() { # resume COMMAND...: after a preemption the slice is made anew; the run goes on from its workdir
  local state=PREEMPTED
  if ! $dry_run; then
    state=$(gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$ZONE" --format='value(state)' || echo MISSING)
    echo "$TPU_NAME is $state" >&2
  fi
  case $state in
    READY) on all "$stopping" ;;
    MISSING) remake ;;
    PREEMPTED | TERMINATED | STOPPED)
      tpu_vm delete "$TPU_NAME" --quiet
      remake
      ;;
    *) echo "error: $TPU_NAME is $state; wait until it is READY, or delete it" >&2 && exit 1 ;;
  esac
  start "$@"
}

case $action in
  create) create ;;
  copy) copy ;;
  install) on all "$installing" ;;
  run) start "$@" ;;
  follow) on 0 'tail -n 100 -F ~/ddpm_jax.log' ;;
  stop) on all "$stopping" ;;
  resume) resume "$@" ;;
  delete) tpu_vm delete "$TPU_NAME" --quiet ;;
  *)
    echo "error: ${action:-no action}: choose one of create, copy, install, run, follow, stop, resume, delete" >&2
    exit 2
    ;;
esac
