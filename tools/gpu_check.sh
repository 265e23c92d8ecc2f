#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds in place, runs the tests of the GPU, compute-sanitizer's four tools over a small
# part of them, at the same time, and the quick benchmarks. Uses what the interpreter (PYTHON, by default python3) has
# installed and installs nothing.
#
#   bash tools/gpu_check.sh [STAGE...]    # of build, tests, sanitizers, benchmarks; by default all
#
# Logs and benchmarks.json go to OUT (build/gpu-check). Each stage has a time limit, and all fit in ten minutes. A
# failed stage does not stop the next, but for the build; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

stages=" ${*:-build tests sanitizers benchmarks} "

# Every kernel family on small shapes, forward and backward and both at once, and what only large ones have: rows of a
# cluster, many tiles, wide planes; a sanitizer slows a kernel down a hundredfold.
families="unaligned_bfloat16 or rows_float32_cross_entropy_50257 or rows_bfloat16_cross_entropy_33 or rows_bfloat16_log_softmax_33"
families+=" or blocks_3x17001 or blocks_2x200x7 or blocks_probabilities_3x9001 or few_classes_513x17 or tiles_513 or image or volume"
large="test_large_problems and bfloat16 and (50257 or 700000 or 512)"
sanitized=(tests/semantics/test_values.py tests/semantics/test_inplace.py tests/cuda/test_cuda.py -q -p no:cacheprovider
    -k "(cuda and (no_less_accurate or test_value_and_grad) and ($families)) or ($large)")

device=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("{}.{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name(), sep="\t")')
if [ -z "$device" ]; then
    echo "nllx: $python sees no NVIDIA GPU (torch.cuda.is_available() is false): nothing was checked." >&2
    exit 1
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${device%%$'\t'*}}
echo "${device#*$'\t'}, building for $TORCH_CUDA_ARCH_LIST"

rm -f "$out"/*.log "$out"/*.result
# note NAME RESULT SECONDS TEXT: the stage's line of the summary.
note() { printf '%-12s %-12s %4d s   %s\n' "$1" "$2" "$3" "$(cut -c 1-100 <<<"$4")" >"$out/$1.result"; }

# stage NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, into NAME.log.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0 result=passed lines=3 text
    shift 2
    printf '=== %s (at most %d s): %s\n' "$name" "$limit" "$*" | cut -c 1-160
    timeout --kill-after=2 "$limit" "$@" </dev/null >"$out/$name.log" 2>&1 || status=$?
    if grep -q 'Device not supported' "$out/$name.log"; then
        result=unavailable # the sanitizer needs a debugging interface that some virtual machines do not offer
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
        result=TIMED-OUT lines=25
    elif [ $status -ne 0 ]; then
        result=FAILED lines=25
    fi
    tail -n $lines "$out/$name.log" | cut -c 1-200
    # The last line that says how it went, otherwise the last one.
    text=$(grep -E '[0-9]+ (passed|failed)|ERROR SUMMARY' "$out/$name.log" | tail -n 1)
    note "$name" "$result" $((SECONDS - start)) "${text:-$(tail -n 1 "$out/$name.log")}"
    [ $status -eq 0 ]
}
wanted() { [[ $stages == *" $1 "* ]]; }

sanitize() {
    # Without torch's caching, every allocation has bounds of its own that memcheck can see.
    stage "$1" 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 20 \
        "$python" -m pytest "${sanitized[@]}"
}

if ! wanted build || stage build 180 "$python" setup.py --quiet build_ext --inplace --force; then
    if wanted tests; then
        # Those of the GPU alone, on several cores where pytest-xdist is there.
        workers=$("$python" -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null)
        # torch's own databases of tests need a package that torch does not bring.
        "$python" -c 'import expecttest' 2>/dev/null || workers+=" --ignore=tests/semantics/test_torch_databases.py"
        # shellcheck disable=SC2086
        stage tests 160 "$python" -m pytest tests --ignore=tests/cuda_on_cpu -k cuda -q $workers
    fi
    if wanted sanitizers; then
        if command -v compute-sanitizer >/dev/null; then
            tools=(memcheck racecheck initcheck synccheck)
            pids=()
            for tool in "${tools[@]}"; do
                sanitize "$tool" >"$out/$tool.shown" 2>&1 &
                pids+=($!)
            done
            wait "${pids[@]}"
            for tool in "${tools[@]}"; do
                cat "$out/$tool.shown"
                rm "$out/$tool.shown"
            done
        else
            note sanitizers unavailable 0 "no compute-sanitizer on PATH"
        fi
    fi
    if wanted benchmarks; then
        rm -f "$out/benchmarks.json"
        stage benchmarks 130 "$python" -m benchmarks --device cuda --quick --budget 95 --json "$out/benchmarks.json"
    fi
fi

if [ -e "$out/benchmarks.log" ]; then
    printf '\n'
    grep -E '^memory, GB/s|^nllx not timed' "$out/benchmarks.log"
    sed -n '/ nllx ms /,$p' "$out/benchmarks.log" # the short table; without it, the run did not end
fi
{
    printf '\nSummary: %s, %d s in all\n' "${device#*$'\t'}" $SECONDS
    for name in build tests memcheck racecheck initcheck synccheck sanitizers benchmarks; do
        if [ -e "$out/$name.result" ]; then printf '  %s\n' "$(cat "$out/$name.result")"; fi
    done
} | tee "$out/summary.txt"
! grep -qE 'FAILED|TIMED-OUT' "$out/summary.txt"
