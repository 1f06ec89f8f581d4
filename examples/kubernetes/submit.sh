#!/bin/bash
# A whole run as Jobs, one stage after the other and its parts side by side: IMAGE=... ./submit.sh [PARTS]
set -euo pipefail
export IMAGE NAME STAGE PARTS
parts=${1:-8}

submit() { # STAGE PARTS
  STAGE=$1 PARTS=$2 NAME=hf-ensemble-${1//_/-}
  # $(JOB_COMPLETION_INDEX) is for Kubernetes.
  envsubst '$NAME $STAGE $PARTS $IMAGE' < "$(dirname "$0")/stage.yaml" | kubectl apply -f -
}

finished() { # STAGE...
  kubectl wait --for=condition=complete --timeout=24h "${@/#/job/hf-ensemble-}"
}

submit gradients "$parts"
submit baseline 1
# These have nothing to do where the configuration asks for none.
submit calibration "$parts"
finished baseline
submit gradients_at_baseline "$parts"
finished gradients calibration gradients-at-baseline
submit group 1
finished group
submit adapter "$parts"
finished adapter
submit evaluation 1
