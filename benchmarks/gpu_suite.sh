#!/usr/bin/env bash
# What needs a CUDA device, in under 9 minutes: the tests marked gpu and the benchmarks; or a slice of the evidence.
#   bash benchmarks/gpu_suite.sh OUT
#   bash benchmarks/gpu_suite.sh OUT evidence --data FILE.npz [--cells PATTERN... --seeds N,...]
# Runs from the checkout with the installed dependencies (PYTHON chooses the interpreter, PYTHONPATH adds to them) and
# leaves logs, suite.json and all results in one archive under OUT. The second form again goes on where it stopped, as
# long as runs/evidence is there. Never run on a GPU so far; without one it says so and measures nothing. Builds the
# compiled part first.
set -euo pipefail

out=${1:?usage: bash benchmarks/gpu_suite.sh OUT [evidence ARGUMENT...]}
part=${2:-kernels}
case "$part" in kernels | evidence) ;; *) echo "gpu_suite: nothing or evidence after OUT, got $part" >&2 && exit 2 ;; esac
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 MPLBACKEND=Agg

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
tests=null benchmarks=null evidence=null
results=runs/gpu
[ "$part" = kernels ] || results=runs/evidence
if [ "$part" = kernels ]; then
    tests=$(limited tests 200 "$python" -m pytest -m gpu)
    [ "$tests" != 5 ] || tests=0 # pytest's 5: no test is marked gpu yet
fi
if [ "$cuda" != true ]; then
    echo "no CUDA device: nothing measured" >&2
elif [ "$part" = kernels ]; then
    benchmarks=$(limited benchmarks 215 "$python" -m pytest benchmarks/ --benchmark-only --device cuda \
        --results "$results")
else
    left=$((deadline - 40 - SECONDS)) # what is at work then has 20 seconds to end
    evidence=$(limited evidence $((left + 20)) "$python" -m benchmarks.evidence --suite gpu-cifar32 --jobs 1 \
        --minutes "$((left / 60)).$(printf %02d $((left % 60 * 100 / 60)))" --results "$results/results" "${@:3}")
fi
# One archive, without networks and checkpoints, which the next slice finds where they are.
[ ! -d "$results" ] || tar -czf "$out/results.tar.gz" --exclude='*.safetensors' --exclude=tensorboard "$results"
printf '{"cuda": %s, "built": %s, "tests": %s, "benchmarks": %s, "evidence": %s, "seconds": %s}\n' \
    "$cuda" "$built" "$tests" "$benchmarks" "$evidence" "$SECONDS" | tee "$out/suite.json"
case "$built $tests $benchmarks $evidence" in *[1-9]*) exit 1 ;; esac
