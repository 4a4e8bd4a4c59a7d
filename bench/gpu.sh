#!/usr/bin/env bash
# Everything that a GPU is wanted for, in steps of under ten minutes each, from a checkout that need not be installed.
#
#     bench/gpu.sh OUTPUT [STEP ...]        steps: tests sanitize goals tune rest; all of them by default
#
# `goals`, `tune` and `rest` have parts of under ten minutes, each a step of its own by the name of its log: goal-1-1000,
# tune-tail, rest-float32-10 and so on.
# Each step writes its log and results into OUTPUT and goes on where another failed. PYTHON names the interpreter. It needs
# torch, Triton, NumPy, safetensors and pytest; with Hypothesis, cuda-bindings, ONNX Runtime and matplotlib more is tested,
# compared and drawn.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
output=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD" OMP_NUM_THREADS=8
python=${PYTHON:-python3}
results="$output/head-cuda.json"
"$python" -c '
import sys
try:
    import numpy, pytest, safetensors, torch, triton
except ImportError as error:
    sys.exit(f"gpu.sh: {sys.executable}: {error}")
if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch finds no CUDA GPU here, and every step needs one")
' || exit 2
[ $# -gt 0 ] || set -- tests sanitize goals tune rest

step() {
    local name=$1
    shift
    case $what in tests | sanitize | goals | tune | rest | "$name") ;; *) return ;; esac
    ran=$name
    echo "== $name: $*"
    timeout 590 "$@" >"$output/$name.log" 2>&1
    echo "$? $name" | tee -a "$output/steps.txt"
}

bench() {
    "$python" bench/head.py --output "$results" --budget 480 "$@"
}

for what in "$@"; do
    ran=
    case $what in
    tests)
        step tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels
        ;;
    sanitize | memcheck | racecheck)
        if tool=$(command -v compute-sanitizer); then
            for check in memcheck racecheck; do
                step "$check" "$tool" --tool "$check" --error-exitcode 1 "$python" -m pytest -q -m gpu \
                    -p no:cacheprovider tests/kernels/test_parity.py -k "test_parity and not real_sizes"
            done
        else
            echo "compute-sanitizer is not installed" | tee "$output/sanitize.log"
            ran=nothing
        fi
        ;;
    goals | goal-*)
        for shape in "1 1000 float32" "1 1000 float32 plain" "1 1048576 bfloat16" "512 65536 bfloat16"; do
            set -- $shape
            export -f bench && export python results
            step "goal-$1-$2${4:+-$4}" bash -c "bench --images $1 --classes $2 --dims 512 --dtypes $3 ${4:+--layout $4} \
                --contenders authors,eager,fused"
        done
        ;;
    tune | tune-*)
        export -f bench && export python results
        for kernel in attend_image attend_few attend_tile score_tile,sum_tile tail,tail_few; do
            step "tune-${kernel%%,*}" bash -c "bench --tune --kernels $kernel --dims 512 --shapes none"
        done
        cp kernels/tuning.json "$output/"
        ;;
    rest | rest-*)
        export -f bench && export python results
        for dtype in float32 bfloat16; do
            for classes in 10,1000 65536 1048576; do
                step "rest-$dtype-${classes%%,*}" bash -c "bench --dims 512 --dtypes $dtype --classes $classes"
            done
        done
        ;;
    esac
    if [ -z "$ran" ]; then
        echo "$what: no such step" >&2
        exit 2
    fi
done
