#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, for ten minutes at the most: what says most about the kernels comes first. Uses what the
# interpreter (PYTHON, by default python3) has installed and installs nothing.
#
#   bash tools/gpu_check.sh [STAGE...]    # by default all, in this order
#
#   machine      nvidia-smi -q
#   build        in place, for the architecture of this GPU alone
#   families     python -m nllx, each launch waited for: a kernel that hangs is the last one in the log
#   conservative the same with NLLX_CUDA_PLAN=conservative, the way back
#   cuda         tests/cuda/test_cuda.py, to the first failure
#   graphs       torch.compile(mode="reduce-overhead"), in three processes
#   racecheck, synccheck, memcheck    compute-sanitizer over nllx's kernels alone, the smaller shapes of the families
#   tests        all tests of the GPU
#   benchmarks   the quick ones, with Liger and QuACK beside where they are installed
#   counters     ncu, one launch of each kernel and shape
#   bad-targets  four million rows that are all out of range, timed
#
# Each has a time limit and a log in OUT (build/gpu-check), written as it goes, and summary.txt has a line as soon as it has
# ended: a run that is cut off leaves what was learnt. A failed stage does not stop the next, but for the build; the exit
# status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
total=600
export PYTHONUNBUFFERED=1

all="machine build families conservative cuda graphs racecheck synccheck memcheck tests benchmarks counters bad-targets"
stages=" ${*:-$all} "
for name in $stages; do
    [[ " $all " == *" $name "* ]] || { echo "gpu_check.sh: no stage '$name' ($all)" >&2 && exit 2; }
done

device=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("{}.{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name(), sep="\t")')
if [ -z "$device" ]; then
    echo "nllx: $python sees no NVIDIA GPU (torch.cuda.is_available() is false): nothing was checked." >&2
    exit 1
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${device%%$'\t'*}}
mkdir -p "$out"
rm -f "$out"/*.log "$out"/benchmarks.json
echo "${device#*$'\t'}, building for $TORCH_CUDA_ARCH_LIST" | tee "$out/summary.txt"

# note NAME RESULT SECONDS TEXT: the stage's line of the summary.
note() { printf '%-12s %-12s %4d s   %s\n' "$1" "$2" "$3" "$(cut -c 1-100 <<<"$4")" | tee -a "$out/summary.txt"; }

# stage NAME LIMIT COMMAND...: runs it, if it is wanted, for at most LIMIT seconds and what is left of the ten minutes, into
# NAME.log.
stage() {
    local name=$1 limit=$2 start=$SECONDS status=0 result=passed program text
    shift 2
    [[ $stages == *" $name "* ]] || return 0
    program=$1
    [ "$program" != env ] || program=$(printf '%s\n' "${@:2}" | grep -v = | head -n 1)
    if ! command -v "$program" >/dev/null; then
        note "$name" unavailable 0 "no $program on PATH"
        return 0
    fi
    [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ "$limit" -le 0 ]; then
        note "$name" left-out 0 "$total seconds are over"
        return 0
    fi
    printf '=== %s (at most %d s): %s\n' "$name" "$limit" "$*" | cut -c 1-160
    timeout --kill-after=2 "$limit" "$@" </dev/null >"$out/$name.log" 2>&1 || status=$?
    if grep -q 'Device not supported\|ERR_NVGPUCTRPERM' "$out/$name.log"; then
        result=unavailable # some virtual machines offer no debugging interface, or no performance counters
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
        result=TIMED-OUT
    elif [ $status -ne 0 ]; then
        result=FAILED
    fi
    [[ $result == passed ]] || tail -n 25 "$out/$name.log" | cut -c 1-200
    # The last line that says how it went, otherwise the last one.
    text=$(grep -E '[0-9]+ (passed|failed)|ERROR SUMMARY|DIFFER' "$out/$name.log" | tail -n 1)
    note "$name" $result $((SECONDS - start)) "${text:-$(tail -n 1 "$out/$name.log")}"
    [ $status -eq 0 ]
}

# Without torch's caching, every allocation has bounds of its own that memcheck can see.
sanitize() {
    stage "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=nllx \
        --error-exitcode 99 --print-limit 20 "$python" -m nllx --families --small
}

# What decides the open questions of benchmarks/README.md.
metrics=smsp__issue_active.avg.pct_of_peak_sustained_active,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread,launch__shared_mem_config_size
metrics+=,launch__occupancy_limit_registers,launch__occupancy_limit_shared_mem,launch__occupancy_limit_blocks
metrics+=,sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active
metrics+=,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum,lts__t_sector_hit_rate.pct,gpu__time_duration.sum
for reason in membar barrier long_scoreboard; do
    metrics+=,smsp__average_warps_issue_stalled_${reason}_per_issue_active.ratio
done

# Those of the GPU alone, on several cores where pytest-xdist is there; torch's own databases of tests need a package that
# torch does not bring.
tests=(tests --ignore=tests/cuda_on_cpu -k cuda -q)
"$python" -c 'import xdist' 2>/dev/null && tests+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
"$python" -c 'import expecttest' 2>/dev/null || tests+=(--ignore=tests/semantics/test_torch_databases.py)

stage machine 10 nvidia-smi -q
if stage build 150 "$python" setup.py --quiet build_ext --inplace --force; then
    stage families 60 env CUDA_LAUNCH_BLOCKING=1 "$python" -m nllx --families
    stage conservative 40 env NLLX_CUDA_PLAN=conservative CUDA_LAUNCH_BLOCKING=1 "$python" -m nllx --families
    stage cuda 60 "$python" -m pytest tests/cuda/test_cuda.py -x -q -k "not cuda_graphs and not families"
    stage graphs 90 bash -c 'for run in 1 2 3; do "$0" -m pytest tests/cuda/test_cuda.py -x -q -k cuda_graphs || exit; done' \
        "$python"
    sanitize racecheck 60
    sanitize synccheck 30
    sanitize memcheck 30
    stage tests 150 "$python" -m pytest "${tests[@]}"
    stage benchmarks 100 "$python" -m benchmarks --device cuda --quick --budget 75 --json "$out/benchmarks.json"
    stage counters 60 ncu --csv --kernel-name-base mangled --kernel-name regex:nllx --filter-mode per-launch-config \
        --launch-count 1 --metrics "$metrics" "$python" -m nllx --families --small
    stage bad-targets 20 "$python" tools/time_bad_targets.py
fi

if [ -e "$out/benchmarks.log" ]; then
    printf '\n'
    grep -E '^memory, GB/s|^nllx not timed' "$out/benchmarks.log"
    sed -n '/ nllx ms /,$p' "$out/benchmarks.log" # the short table; without it, the run did not end
fi
printf '\nSummary, %d s in all: ' $SECONDS
cat "$out/summary.txt"
! grep -qE 'FAILED|TIMED-OUT' "$out/summary.txt"
