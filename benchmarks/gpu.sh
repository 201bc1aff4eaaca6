#!/usr/bin/env bash
# Everything that wants a GPU, in one command and under eight minutes, from a bare checkout with torch, Triton and pytest:
# the tests that need a GPU, then the benchmarks. Writes benchmarks/results/*.json and prints a short table last.
#
#   bash benchmarks/gpu.sh            on a GPU: the base model at 32 and 128 clips
#   bash benchmarks/gpu.sh --smoke    anywhere: tiny sizes, benchmarks/results stays as it is; also what happens without a GPU
#
# PYTHON names the Python to use (default: python3). XKD_BENCHMARK_SECONDS: no benchmark begins later than this (default: 270);
# what was not reached is listed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

if [[ $# -gt 1 || "${1:---smoke}" != --smoke ]]; then
    echo "error: unknown arguments $*; the only one is --smoke" >&2
    exit 2
fi
flags=(--benchmark)
"$python" -c 'import torch, triton, pytest' || { echo "error: $python lacks torch, Triton or pytest" >&2; exit 2; }
begun=$(date +%s)
if [[ "${1:-}" == --smoke ]] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    XKD_BENCHMARK_RESULTS=$(mktemp -d)
    export XKD_BENCHMARK_RESULTS
    trap 'rm -rf "$XKD_BENCHMARK_RESULTS"' EXIT
    echo "no GPU is used: tiny sizes, benchmarks/results stays as it is"
    flags=()
fi
export XKD_BENCHMARK_SECONDS=${XKD_BENCHMARK_SECONDS:-270}

# The fast model against the reference, and the kernels, on the GPU where there is one.
failed=0
tests=(tests/model/test_fast_model.py tests/model/test_graphs.py tests/model/test_attention.py)
[[ ${#flags[@]} -gt 0 ]] && tests+=(tests/kernels --ignore=tests/kernels/test_resources.py)  # interpreted they take minutes
"$python" -m pytest -q -p no:cacheprovider -o addopts= "${tests[@]}" || failed=1
"$python" -m pytest -q -s -rs -p no:cacheprovider -o addopts= benchmarks/test_attention.py benchmarks/test_step.py "${flags[@]}" || failed=1
"$python" -m benchmarks.table "$begun"
exit $failed
