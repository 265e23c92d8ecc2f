#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds in place, runs the whole test suite, compute-sanitizer over a small part of it,
# and the benchmarks. Uses what the interpreter (PYTHON, by default python3) has installed and installs nothing.
#
#   bash tools/gpu_check.sh
#
# Logs and benchmarks.json go to OUT (build/gpu-check). Each stage has a time limit, and all fit in ten minutes. A
# failed stage does not stop the next; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

# Forward and backward of every kernel family on small shapes; the sanitizers slow a kernel down a hundredfold.
sanitized=(tests/test_values.py -k "no_less_accurate and cuda and (unaligned or masked or image or volume or rows_bfloat16)" -q)

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

summary=()
failed=0
# note NAME RESULT SECONDS: adds a line to the summary.
note() {
    summary+=("$(printf '%-12s %-12s %4d s   %s' "$1" "$2" "$3" "$(tail -n 1 "$out/$1.log" 2>/dev/null | cut -c 1-100)")")
}

# stage NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, into NAME.log.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0 result=passed
    shift 2
    printf '\n=== %s (at most %d s): %s\n' "$name" "$limit" "$*"
    timeout --kill-after=5 "$limit" "$@" </dev/null >"$out/$name.log" 2>&1 || status=$?
    if grep -q 'Device not supported' "$out/$name.log"; then
        result=unavailable # the sanitizer needs a debugging interface that some virtual machines do not offer
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
        result=TIMED-OUT failed=1
    elif [ $status -ne 0 ]; then
        result=FAILED failed=1
    fi
    tail -n 15 "$out/$name.log"
    note "$name" "$result" $((SECONDS - start))
    [ $status -eq 0 ]
}

sanitize() {
    # Without torch's caching, every allocation has bounds of its own that memcheck can see.
    stage "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 20 \
        "$python" -m pytest "${sanitized[@]}"
}

if stage build 180 "$python" setup.py --quiet build_ext --inplace --force; then
    # The tests of the CPU are as many as those of the GPU: on several cores where pytest-xdist is there.
    workers=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
    # shellcheck disable=SC2086
    stage tests 240 "$python" -m pytest tests -q $workers
    if command -v compute-sanitizer >/dev/null; then
        sanitize memcheck 60
        sanitize racecheck 45
    else
        summary+=("memcheck, racecheck: unavailable, no compute-sanitizer on PATH")
    fi
    stage benchmarks 60 "$python" -m benchmarks --device cuda --quick --json "$out/benchmarks.json"
fi

{
    printf '\nSummary: %s, %d s in all\n' "${device#*$'\t'}" $SECONDS
    printf '  %s\n' "${summary[@]}"
} | tee "$out/summary.txt"
exit $failed
