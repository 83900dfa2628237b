#!/usr/bin/env bash
# N processes of one run on this machine, for trying things.
#
#   launch/local_processes.sh [--dry-run] [--port P] [--max-restarts N] N COMMAND [ARGUMENT ...]
#   launch/local_processes.sh 2 python -m ddpm_jax.train --config configs/digits.py --workdir runs/two
#
# Each gets --coordinator, --num_processes and --process_id. When all have ended they are started again together, if one
# asked for it (exit 75), aborted because a peer died (134) or was killed (137), and none failed otherwise.
# SIGTERM and Ctrl-C reach all as SIGTERM, which saves; after that nothing is run again.
set -uo pipefail

dry_run=false port=$((20000 + RANDOM % 20000)) max_restarts=10 pause=${RESTART_PAUSE_SECONDS:-1}
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --port) port=$2 && shift ;;
    --max-restarts) max_restarts=$2 && shift ;;
    *) echo "error: $1: no such flag; --dry-run, --port P and --max-restarts N come before the number" >&2 && exit 2 ;;
  esac
  shift
done
if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]] || (($# < 2)); then
  echo "error: launch/local_processes.sh takes a number of processes and a command" >&2
  exit 2
fi
number=$1
shift

pids=() stopping=false
stop() {
  stopping=true
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2> /dev/null; done
}
trap stop TERM INT

start() { # start PORT COMMAND...: all processes, their ids in pids
  local address=127.0.0.1:$1 i
  shift
  pids=()
  for ((i = 0; i < number; i++)); do
    if $dry_run; then
      echo "+ $(printf '%q ' "$@")--coordinator $address --num_processes $number --process_id $i &"
      continue
    fi
    "$@" --coordinator "$address" --num_processes "$number" --process_id "$i" &
    pids+=($!)
  done
}

await() { # the exit codes of all, in codes
  local pid code
  codes=()
  for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    while kill -0 "$pid" 2> /dev/null; do # a trapped signal ended the wait, and the process is still saving
      wait "$pid"
      code=$?
    done
    codes+=("$code")
  done
}

verdict() { # the code that stands for all: a failure before a reason to restart, and that before 0
  local code result=0
  for code in "${codes[@]}"; do
    case $code in
      0) ;;
      75 | 134 | 137) if ((result == 0)); then result=$code; fi ;;
      *) result=$code && break ;;
    esac
  done
  echo "$result"
}

for ((restart = 0; ; restart++)); do
  start $((port + restart)) "$@"
  if $dry_run; then exit 0; fi
  await
  code=$(verdict)
  case $code in
    75) reason="saved, asks to be run again" ;;
    134 | 137) reason="a process died; the runtime ended its peers" ;;
    *) exit "$code" ;;
  esac
  if $stopping || ((restart >= max_restarts)); then
    exit "$code"
  fi
  echo "restart: exits ${codes[*]} ($reason); starting all $number again, $((restart + 1)) of $max_restarts" >&2
  sleep "$pause"
  if $stopping; then exit "$code"; fi
done
