#!/usr/bin/env bash
# Runs a command, and runs it again while that helps: exit 75 (the run was saved and asks to be run again), 134 (the
# runtime aborted because a peer died, hung or did not come), 137 (killed: memory, or an operator).
#
#   launch/restart.sh [--dry-run] [--max-restarts N] COMMAND [ARGUMENT ...]
#
# SIGTERM and Ctrl-C reach the command as SIGTERM, which saves; after that nothing is run again.
set -uo pipefail

dry_run=false max_restarts=100 pause=${RESTART_PAUSE_SECONDS:-10}
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --max-restarts) max_restarts=$2 && shift ;;
    *) echo "error: $1: no such flag; --dry-run and --max-restarts N come before the command" >&2 && exit 2 ;;
  esac
  shift
done
if (($# == 0)); then
  echo "error: no command; for example launch/restart.sh python -m ddpm_jax.train --config configs/cifar10.py" >&2
  exit 2
fi
if $dry_run; then
  printf '+ %s# again on exit 75, 134 and 137, %s times at most\n' "$(printf '%q ' "$@")" "$max_restarts"
  exit 0
fi

child='' stopping=false
stop() {
  stopping=true
  if [[ -n $child ]]; then kill -TERM "$child" 2> /dev/null; fi
}
trap stop TERM INT

why() {
  case $1 in
    75) echo "saved, asks to be run again" ;;
    134) echo "the runtime aborted: a peer died or hung" ;;
    137) echo "killed: out of memory, or by an operator" ;;
  esac
}

for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2> /dev/null; do # a trapped signal ended the wait, and the command is still saving
    wait "$child"
    code=$?
  done
  reason=$(why "$code")
  if $stopping || [[ -z $reason ]]; then
    exit "$code"
  fi
  if ((restart >= max_restarts)); then
    echo "restart: exit $code ($reason), and --max-restarts $max_restarts is used up" >&2
    exit "$code"
  fi
  echo "restart: exit $code ($reason); starting again, $((restart + 1)) of $max_restarts" >&2
  child=''
  sleep "$pause" &
  wait $!
  if $stopping; then exit "$code"; fi
done
