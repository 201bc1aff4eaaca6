#!/usr/bin/env bash
# Everything that wants a GPU, in one command and under eight minutes, from a bare checkout with torch, Triton and pytest:
# the tests that need a GPU, then the benchmarks. Writes benchmarks/results/*.json and prints a short table last.
#
#   bash benchmarks/gpu.sh            on a GPU: the base model at 32 and 128 clips, then single kernels
#   bash benchmarks/gpu.sh --kernels  on a GPU: single kernels, optimiser, attention and objectives alone
#   bash benchmarks/gpu.sh --tune     on a GPU: single kernels alone, after a search for faster launches of each
#   bash benchmarks/gpu.sh --data     decoding by a GPU's engines alone: tests, threads, source files, and steps fed from shards; needs
#                                     all packages of this project with DALI; without a GPU at tiny sizes
#   bash benchmarks/gpu.sh --ablate   on a GPU: the step without one technique at a time alone, at 32 and 128 clips
#   bash benchmarks/gpu.sh --smoke    anywhere: tiny sizes, benchmarks/results stays as it is; also what happens without a GPU
#
# PYTHON names the Python to use (default: python3). XKD_BENCHMARK_SECONDS (default on a GPU: 410): no measurement begins later
# than that after the start of this script, and one in progress has 45 s more; what matters most comes first, the rest is listed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
# two contestants share the allocator, and what one has freed must serve the other
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
python=${PYTHON:-python3}
begun=$(date +%s)

if [[ $# -eq 1 && "$1" =~ ^(-h|--help)$ ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' benchmarks/gpu.sh
    exit 0
fi
if [[ $# -gt 1 || ! "${1:---smoke}" =~ ^--(smoke|kernels|tune|ablate|data)$ ]]; then
    echo "error: unknown arguments $*; it takes --smoke, --kernels, --tune, --data or --ablate" >&2
    exit 2
fi
if [[ ! "${XKD_BENCHMARK_SECONDS:-0}" =~ ^[0-9]+$ ]]; then
    echo "error: XKD_BENCHMARK_SECONDS=$XKD_BENCHMARK_SECONDS must be a whole number of seconds" >&2
    exit 2
fi
command -v "$python" >/dev/null || { echo "error: PYTHON=$python is not found" >&2; exit 2; }
if ! { told=$("$python" -c 'import torch, triton, pytest' 2>&1 >&3); } 3>&1; then
    echo "error: $python needs torch, Triton and pytest: $(tail -n 1 <<<"$told")" >&2
    exit 2
fi
if [[ "${1:-}" == --data ]]; then # what decodes and prepares, and what its tests import, by the names they are installed by
    if ! missing=$("$python" - <<'END'
import importlib
import sys

NEEDED = {
    "av": "av", "hypothesis": "hypothesis", "numpy": "numpy", "nvidia.dali.fn": "NVIDIA DALI", "pydantic": "pydantic",
    "rich": "rich", "safetensors": "safetensors", "yaml": "PyYAML",
}


def lacks(module):
    try:
        importlib.import_module(module)
    except (ImportError, OSError):  # or a library that it loads is not there
        return True
    return False


missing = [name for module, name in NEEDED.items() if lacks(module)]
print(", ".join(missing))
sys.exit(bool(missing))
END
    ); then
        echo "error: --data is left out, not installed for $python: $missing; pip install '.[cuda13,test]' brings it (cuda12 for CUDA 12)" >&2
        exit 2
    fi
fi

late=75 # what a command ends with that was not begun
aside=() # folders that go at the end
trap 'rm -rf "${aside[@]}"' EXIT
tests=(tests/model/test_{fast_model,fp8,attention,graphs}.py)
if [[ "${1:-}" == --smoke ]] || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    XKD_BENCHMARK_RESULTS=$(mktemp -d)
    export XKD_BENCHMARK_RESULTS
    aside+=("$XKD_BENCHMARK_RESULTS")
    echo "smoke run: tiny sizes, benchmarks/results stays as it is"
    tests+=(tests/kernels/test_{bias_gelu,adamw_ema}.py) # the others, interpreted, take minutes
    [[ "${1:-}" != --data ]] || tests=(tests/data/test_gpu_data.py)
    flags=() seconds=${XKD_BENCHMARK_SECONDS:-86400}
    within() { "${@:2}"; }
else
    case "${1:-}" in
        --tune) tests=(tests/kernels tests/model/test_kernels.py) ;;
        --kernels | --ablate) tests=(tests/model/test_fast_model.py) ;;
        --data) tests=(tests/data/test_gpu_data.py tests/data/test_decode.py) ;;
        *) tests=(tests/kernels tests/model/test_kernels.py "${tests[@]}") ;; # the kernels first
    esac
    tests+=(--ignore=tests/kernels/test_{resources,native}.py) # which compile for GPUs that are not here
    flags=(--benchmark) seconds=${XKD_BENCHMARK_SECONDS:-410}
    # SECONDS COMMAND...: interrupted when so many seconds have passed since the start, and not begun later than that
    within() {
        local left=$(($1 - $(date +%s) + begun))
        ((left > 0)) || return "$late"
        timeout -s INT -k 10 $left "${@:2}"
    }
fi
run=("$python" -m pytest -q -p no:cacheprovider -o addopts=)

# The compiled operators, where the machine has what compiles them.
if [[ ${#flags[@]} -gt 0 && -z "${XKD_NATIVE:-}" ]]; then
    native=$(mktemp -d)
    aside+=("$native")
    if cmake -S . -B "$native" -DCMAKE_CUDA_ARCHITECTURES=native >"$native/log" 2>&1 && cmake --build "$native" >>"$native/log" 2>&1; then
        export XKD_NATIVE=$native
    else
        echo "the compiled operators are not built: $(tail -n 1 "$native/log")" >&2
    fi
fi

# The fast model against the reference, and the kernels against their twins, on the GPU where there is one.
failed=0
within 180 "${run[@]}" -m "not further" "${tests[@]}" || failed=1
bench() {
    local code=0
    export XKD_BENCHMARK_SECONDS=$((seconds - $(date +%s) + begun))
    within $((seconds + 45)) "${run[@]}" -s -rs "$@" "${flags[@]}" || code=$?
    if [[ $code -eq $late ]]; then
        echo "$*: not reached"
    elif [[ $code -ne 0 ]]; then
        failed=1
    fi
}
# The other cases of the kernels' tests, each of which a GPU's compiler takes a second or two for, as far as time goes.
further() {
    local code=0
    within $((seconds + 45)) "${run[@]}" -x -m further tests/kernels --ignore=tests/kernels/test_{resources,native}.py || code=$?
    if [[ $code -eq $late || $code -eq 124 || $code -eq 137 ]]; then # not begun, interrupted, or killed
        echo "further cases of the kernels' tests: not all reached"
    elif [[ $code -ne 0 ]]; then
        failed=1
    fi
}
# The engine's step on one rank with NCCL, at ZeRO 0 and 1; a bare checkout lacks what it needs.
under_nccl() {
    if "$python" -c 'import deepspeed, psutil, pydantic, safetensors' >/dev/null 2>&1; then
        local code=0
        within $((seconds + 45)) "${run[@]}" -k on_gpu tests/engine/test_engine.py || code=$?
        if [[ $code -eq $late || $code -eq 124 || $code -eq 137 ]]; then
            echo "the engine with NCCL: not reached"
        elif [[ $code -ne 0 ]]; then
            failed=1
        fi
    else
        echo "the engine with NCCL: left out, DeepSpeed or what else it needs is not installed"
    fi
}
kernels=(benchmarks/test_{kernels,optimizer,attention,objectives}.py)
if [[ "${1:-}" == --tune ]]; then
    echo "further cases of the kernels' tests: left out"
    XKD_BENCHMARK_TUNE=1 bench benchmarks/test_kernels.py
elif [[ "${1:-}" == --ablate && ${#flags[@]} -gt 0 ]]; then
    bench benchmarks/test_ablation.py
elif [[ "${1:-}" == --data ]]; then
    if [[ -z "${XKD_BENCHMARK_MEDIA:-}" ]]; then # what one of them renders and prepares serves the others
        XKD_BENCHMARK_MEDIA=$(mktemp -d)
        export XKD_BENCHMARK_MEDIA
        aside+=("$XKD_BENCHMARK_MEDIA")
    fi
    bench benchmarks/test_feeding.py -k concurrency
    bench benchmarks/test_data.py -k source_files
    bench benchmarks/test_feeding.py -k "not concurrency"
elif [[ "${1:-}" == --kernels && ${#flags[@]} -gt 0 ]]; then
    bench "${kernels[@]}"
else
    bench benchmarks/test_step.py -k xkd-bfloat16
    bench "${kernels[@]}"
    bench benchmarks/test_step.py -k "not xkd-bfloat16"
    if [[ ${#flags[@]} -gt 0 ]]; then
        under_nccl
        further
    else
        bench benchmarks/test_ablation.py
    fi
    "$python" -m benchmarks.table "$begun"
fi
exit $failed
