#!/usr/bin/env bash
# A run on GKE: launch/gke_jobset.yaml with its names filled in.
#
#   NAME=cifar10 IMAGE=us-docker.pkg.dev/project/repository/ddpm_jax:1 \
#     launch/gke.sh [--dry-run] apply COMMAND [ARGUMENT ...]
#   NAME=cifar10 launch/gke.sh [--dry-run] follow | delete
#
# CACHE=gs://bucket/cache is where compiled programs are kept; left out, each start compiles again.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true && shift; fi
action=${1:-}
shift || true
if [[ -z ${NAME:-} ]]; then
  echo "error: NAME is not set: what the run is called in the cluster" >&2
  exit 2
fi

run() {
  echo "+ $(printf '%q ' "$@")" >&2
  if ! $dry_run; then "$@"; fi
}

quoted() { # a list of JSON strings, safe on the right-hand side of sed
  local argument separator=''
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    argument=\"${argument//\"/\\\"}\"
    argument=${argument//\\/\\\\}
    argument=${argument//&/\\&}
    printf '%s%s' "$separator" "${argument//|/\\|}"
    separator=', '
  done
}

filled() { # filled COMMAND...
  sed -e "s|: NAME\$|: $NAME|" -e "s|: IMAGE\$|: $IMAGE|" -e "s|: CACHE\$|: $(quoted "${CACHE:-}")|" \
    -e "s|\[COMMAND\]|[$(quoted "$@")]|" "$(dirname "$0")/gke_jobset.yaml"
}

case $action in
  apply)
    if [[ -z ${IMAGE:-} ]] || (($# == 0)); then
      echo "error: apply takes IMAGE in the environment and a command" >&2
      exit 2
    fi
    echo "+ kubectl apply -f -" >&2
    if $dry_run; then filled "$@"; else filled "$@" | kubectl apply -f -; fi
    ;;
  follow) run kubectl logs -f --prefix -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" ;;
  delete) run kubectl delete jobset "$NAME" ;;
  *)
    echo "error: ${action:-no action}: choose one of apply, follow, delete" >&2
    exit 2
    ;;
esac
