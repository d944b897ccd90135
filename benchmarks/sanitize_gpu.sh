#!/usr/bin/env bash
# The CUDA kernels under compute-sanitizer: accesses out of bounds or not aligned, memory that was never written, races in
# shared memory. Needs a GPU, the CUDA part of ebdiff._C, and compute-sanitizer on PATH (the CUDA toolkit has it).
#   bash benchmarks/sanitize_gpu.sh [more arguments for pytest]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
# torch's own allocator hands out parts of large blocks, in which an access out of bounds does not show.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck synccheck; do
    printf '\n== compute-sanitizer --tool %s\n' "$tool"
    # Only kernels of ours: torch's are not the question, and would take hours. Graphs need the caching allocator.
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=ebdiff --target-processes all \
        "$python" -m pytest tests/test_cuda.py -p no:cacheprovider -k "not 2_to_the_31 and not graph and not capture" "$@"
done
