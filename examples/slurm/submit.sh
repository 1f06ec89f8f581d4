#!/bin/bash
# A whole run as jobs, each of which starts when what it needs is done: ./submit.sh CONFIG [PARTS]
set -euo pipefail
config=$1
parts=${2:-8}
array=--array=0-$((parts - 1))
script=$(dirname "$0")/stage.sbatch

submit() { # STAGE [OPTIONS OF SBATCH]
  local stage=$1
  shift
  # Jobs whose dependency has failed are cancelled.
  sbatch --parsable --job-name="$stage" --kill-on-invalid-dep=yes "$@" "$script" "$config" "$stage" "$parts"
}

gradients=$(submit gradients "$array")
baseline=$(submit baseline)
# These have nothing to do where the configuration asks for none.
calibration=$(submit calibration "$array")
at_baseline=$(submit gradients_at_baseline "$array" --dependency="afterok:$baseline")
group=$(submit group --dependency="afterok:$gradients:$baseline:$calibration:$at_baseline")
adapter=$(submit adapter "$array" --dependency="afterok:$group")
submit evaluation --dependency="afterok:$adapter"
