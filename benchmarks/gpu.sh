#!/usr/bin/env bash
# Everything that wants a GPU, in one command and under eight minutes, from a bare checkout with torch, Triton and pytest:
# the tests that need a GPU, then the benchmarks. Writes benchmarks/results/*.json and prints a short table last.
#
#   bash benchmarks/gpu.sh            on a GPU: the base model at 32 and 128 clips
#   bash benchmarks/gpu.sh --smoke    anywhere: tiny sizes, nothing written; also what happens without a GPU
#
# PYTHON names the Python to use (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

if [[ $# -gt 1 || "${1:---smoke}" != --smoke ]]; then
    echo "error: unknown arguments $*; the only one is --smoke" >&2
    exit 2
fi
flags=(--benchmark)
if [[ "${1:-}" == --smoke ]] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU is used: tiny sizes, nothing is written"
    flags=()
fi

# The fast model against the reference, on the CPU and on the GPU where there is one.
failed=0
"$python" -m pytest -q -p no:cacheprovider -o addopts= tests/model/test_fast_model.py tests/model/test_graphs.py || failed=1
"$python" -m pytest -q -s -p no:cacheprovider -o addopts= benchmarks/test_attention.py benchmarks/test_step.py "${flags[@]}" || failed=1
if [[ ${#flags[@]} -gt 0 ]]; then
    "$python" -m benchmarks.table
fi
exit $failed
