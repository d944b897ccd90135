#!/usr/bin/env bash
# Everything that needs a CUDA device, in under 9 minutes: bash benchmarks/gpu_suite.sh OUT
# Runs from the checkout with the installed dependencies (PYTHON chooses the interpreter) and leaves JSON under OUT.
# Never run on a GPU so far; without one it says so and measures nothing. Nothing has to be built yet.
set -euo pipefail

out=${1:?usage: bash benchmarks/gpu_suite.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 MPLBACKEND=Agg

# Run a command under a limit in seconds; print its exit code, keep its output.
limited() {
    local name=$1 limit=$2 code=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 40 "$out/$name.log" >&2
    echo "$code"
}

cuda=$("$python" -c 'import torch; print("true" if torch.cuda.is_available() else "false")')
tests=$(limited tests 240 "$python" -m pytest -m gpu)
[ "$tests" != 5 ] || tests=0 # pytest's 5: no test is marked gpu yet
benchmarks=null
if [ "$cuda" = true ]; then
    benchmarks=$(limited benchmarks 270 "$python" -m pytest benchmarks/ --benchmark-only --device cuda --results "$out")
else
    echo "no CUDA device: nothing measured" >&2
fi
printf '{"cuda": %s, "tests": %s, "benchmarks": %s, "seconds": %s}\n' "$cuda" "$tests" "$benchmarks" "$SECONDS" |
    tee "$out/suite.json"
[ "$tests" = 0 ] && { [ "$benchmarks" = null ] || [ "$benchmarks" = 0 ]; }
