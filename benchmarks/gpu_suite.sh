#!/usr/bin/env bash
# Everything that needs a CUDA device, in under 9 minutes: bash benchmarks/gpu_suite.sh OUT
# Runs from the checkout with the installed dependencies (PYTHON chooses the interpreter) and leaves JSON under OUT.
# Never run on a GPU so far; without one it says so and measures nothing. Builds the compiled part first.
set -euo pipefail

out=${1:?usage: bash benchmarks/gpu_suite.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 MPLBACKEND=Agg

# Everything has ended after so many seconds. All that runs does so under a limit; those of what comes before the
# benchmarks add up to 385, kills counted, so that some time is left for them.
deadline=535

# Run a command under a limit in seconds; print its exit code, keep its output.
limited() {
    local name=$1 limit=$2 left=$((deadline - 10 - SECONDS)) code=0
    shift 2
    limit=$((limit < left ? limit : left))
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 40 "$out/$name.log" >&2
    echo "$code"
}

# The start of an interpreter that asks one thing.
ask() { timeout --kill-after=5 20 "$python" -c "$1"; }

# For this machine's architecture alone, in place: the package is imported from here.
missing=$(ask 'import importlib.util as u, shutil
print(*(n for n in ("setuptools", "pybind11", "ninja") if not u.find_spec(n) and not shutil.which(n)))')
if [ -z "$missing" ]; then
    built=$(EBDIFF_BUILD=require EBDIFF_CUDA_ARCHS=${EBDIFF_CUDA_ARCHS:-90} \
        limited build 90 "$python" setup.py build_ext --inplace)
else
    built=null
    echo "the compiled part is not built: pip install $missing" >&2
fi
ask 'from ebdiff.info import installation; print(*installation(), sep="\n")' | tee "$out/info.log" >&2

cuda=$(ask 'import torch; print("true" if torch.cuda.is_available() else "false")')
tests=$(limited tests 200 "$python" -m pytest -m gpu)
[ "$tests" != 5 ] || tests=0 # pytest's 5: no test is marked gpu yet
benchmarks=null
if [ "$cuda" = true ]; then
    benchmarks=$(limited benchmarks 215 "$python" -m pytest benchmarks/ --benchmark-only --device cuda --results "$out")
else
    echo "no CUDA device: nothing measured" >&2
fi
printf '{"cuda": %s, "built": %s, "tests": %s, "benchmarks": %s, "seconds": %s}\n' \
    "$cuda" "$built" "$tests" "$benchmarks" "$SECONDS" | tee "$out/suite.json"
case "$built $tests $benchmarks" in *[1-9]*) exit 1 ;; esac
