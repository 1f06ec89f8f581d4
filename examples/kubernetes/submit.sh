#!/bin/bash
# A whole run as Jobs, one stage after the other and its parts side by side: IMAGE=... ./submit.sh CONFIG [PARTS]
# Their names begin with $RUN, which is made of the time where it is not set.
set -euo pipefail
: "${IMAGE:?Expected the image of the container, with hf-ensemble in it}"
CONFIG=${1:?Expected the configuration, a path in the volume}
parts=${2:-8}
run=${RUN:-hf-ensemble-$(date +%Y%m%d-%H%M%S)}
export IMAGE CONFIG NAME STAGE PARTS

submit() { # STAGE PARTS
  STAGE=$1 PARTS=$2 NAME=$run-${1//_/-}
  # $(JOB_COMPLETION_INDEX) is for Kubernetes.
  envsubst '$NAME $CONFIG $STAGE $PARTS $IMAGE' < "$(dirname "$0")/stage.yaml" | kubectl create -f -
}

finished() { # STAGE...
  local stage state
  for stage in "${@//_/-}"; do
    while true; do
      # Where the cluster does not answer, it is asked again.
      state=$(kubectl get job "$run-$stage" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}') || state=
      case $state in
        *Complete*) break ;;
        *Failed*) echo "$run-$stage has failed: kubectl logs --selector job-name=$run-$stage" >&2; exit 1 ;;
      esac
      sleep 10
    done
  done
}

submit gradients "$parts"
submit baseline 1
# These have nothing to do where the configuration asks for none.
submit calibration "$parts"
finished baseline
submit gradients_at_baseline "$parts"
finished gradients calibration gradients_at_baseline
submit group 1
finished group
submit adapter "$parts"
finished adapter
submit evaluation 1
