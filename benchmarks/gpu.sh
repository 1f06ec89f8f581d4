#!/usr/bin/env bash
# Measures the study benchmarks/gpu on a GPU, and runs the tests that need one: about five minutes, seven at most.
#
#     bash benchmarks/gpu.sh FOLDER [--device cuda|cpu] [--tiny]
#
# FOLDER gets results.json and results.md (of the parts that finished), log.txt and tests.xml; with --tiny, tiny.json and
# tiny.md. A part that fails, or takes longer than it may, does not stop the others; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."

folder= device=cuda tiny=
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device="$2"; shift 2 ;;
    --tiny) tiny=--tiny; shift ;;
    -*) echo "Expected FOLDER, --device cuda|cpu or --tiny, found $1." >&2; exit 2 ;;
    *) folder="$1"; shift ;;
  esac
done
[ -n "$folder" ] || { echo "Expected a folder for the results." >&2; exit 2; }
mkdir -p "$folder"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Freed memory of one kind of batch serves another.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
output="$folder/results"
[ -z "$tiny" ] || output="$folder/tiny"
python="${PYTHON:-$(command -v python || command -v python3)}" worst=0

# part NAME SECONDS COMMAND...: runs one of them, and notes how it ended.
part() {
  local name="$1" limit="$2" start=$SECONDS status
  shift 2
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$folder/log.txt"
  status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - start)) s of $limit" | tee -a "$folder/log.txt"
  [ "$status" -le "$worst" ] || worst=$status
}

: > "$folder/log.txt"
if [ -n "$tiny" ]; then
  part all 240 "$python" -m benchmarks.gpu.run "$output" --device "$device" --tiny
else
  # The first one reads packages from a cold disk, which no other's time is to include.
  part imports 75 "$python" -c "import bitsandbytes, pytest, torch, trl, hf_ensemble.callbacks, benchmarks.gpu.run
torch.zeros(2, device='$device')"
  part capture_8b 75 "$python" -m benchmarks.gpu.run "$output" --device "$device" --parts capture_8b
  part capture_34b 80 "$python" -m benchmarks.gpu.run "$output" --device "$device" --parts capture_34b
  part decoding 60 "$python" -m benchmarks.gpu.run "$output" --device "$device" --parts decoding
  part estimator 60 "$python" -m benchmarks.gpu.run "$output" --device "$device" --parts estimator
fi
if [ "$device" = cuda ]; then
  # Only files with such tests: looking through all others takes longer than the tests.
  mapfile -t files < <(grep -rlE "mark\.gpu|import DEVICES" tests --include="test_*.py")
  workers=()
  "$python" -c "import xdist" 2> /dev/null && workers=(--numprocesses 4)
  part tests 75 "$python" -m pytest -m gpu "${workers[@]}" -q --tb=short -p no:cacheprovider \
    --junitxml "$folder/tests.xml" "${files[@]}"
fi
exit "$worst"
