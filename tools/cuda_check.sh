#!/usr/bin/env bash
# The CUDA checks that need no GPU.
#
#   bash tools/cuda_check.sh STAGE...
#
#   build    the whole extension against torch's CUDA build, in .venv-cuda and a copy of the tree: compiled, linked,
#            imported, and the CPU tests run there (a second version of torch); with less than 20 GB of disk free, and
#            none of it installed, the sources are compiled against the headers of the CPU build of torch, and not linked
#   integrations  after build, there: other libraries' models train with nllx's losses (tests/integrations)
#   kernels  registers, spills and 16-byte accesses of every kernel in its machine code for every architecture
#   built-kernels  the same, after build, of what that has compiled
#   on-cpu   the kernels' logic on the CPU
#
# Run after `make build`, whose environment it takes. Where there is no nvcc, it comes as wheels into build/nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
source build/environment.sh

TORCH_WITH_CUDA=2.11.0
NEEDED_GB=20
environment=$PWD/.venv-cuda
tree=$PWD/build/cuda-tree
results=$PWD/build/tests-cuda-build.xml
workers='-n auto --maxprocesses 4 --timeout 600 --timeout-method thread'

find_nvcc() {
    if [ -n "${CUDA_HOME:-}" ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then return; fi
    export CUDA_HOME=$PWD/build/nvcc/nvidia/cu13
    if [ ! -x "$CUDA_HOME/bin/nvcc" ]; then
        echo "There is no nvcc: installing requirements/nvcc.txt into build/nvcc"
        python -m pip install --quiet --disable-pip-version-check --no-deps --target build/nvcc -r requirements/nvcc.txt
        # The linker looks for an unversioned library in lib64.
        ln -sfn lib "$CUDA_HOME/lib64"
        ln -sf libcudart.so.13 "$CUDA_HOME/lib/libcudart.so"
    fi
}

# The kernels are checked in their machine code; a machine without the disassembler gets it as a wheel.
find_cuobjdump() {
    local tools=$PWD/build/cuobjdump
    if command -v cuobjdump >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/cuobjdump" ]; then return; fi
    if [ ! -x "$tools/nvidia/cu13/bin/cuobjdump" ]; then
        python -m pip install --quiet --disable-pip-version-check --no-deps --target "$tools" -r requirements/cuobjdump.txt
    fi
    export PATH=$tools/nvidia/cu13/bin:$PATH
}

# The sources as they are now; what was built of them before stays for the next build.
copy_tree() {
    mkdir -p "$tree"
    find "$tree" -mindepth 1 -maxdepth 1 -not -name build -exec rm -rf {} +
    tar -cf - --exclude='./.*' --exclude=./build --exclude=__pycache__ --exclude='*.so' . | tar -xf - -C "$tree"
}

run_build() {
    local free
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    if [ ! -e "$environment/nllx-requirements/dev.txt" ] && [ "$free" -lt $NEEDED_GB ]; then
        echo "$free GB of disk are free and torch's CUDA build needs $NEEDED_GB: the C++ sources are compiled against a CPU build's headers and not linked."
        python tools/check_cuda_kernels.py --host
        return
    fi
    copy_tree
    (
        export VIRTUAL_ENV=$environment TORCH=$TORCH_WITH_CUDA NLLX_WITHOUT_CUDA=0 MAX_JOBS=${MAX_JOBS:-2}
        unset CC CXX
        make -C "$tree" build
        cd "$tree"
        source build/environment.sh
        python -c '
import torch, nllx
from nllx._C import build_info
info = build_info()
print("torch", torch.__version__, "and nllx", nllx.__version__, "with CUDA", info["cuda"], "for", info["cuda_architectures"])
assert info["cuda"] == torch.version.cuda, info'
        # What torch's version can change. The arithmetic of the kernels is none of it: the tests under the other version have
        # shown it over the whole table, and here a seventh of the table shows that they are reached. Seven has no divisor in
        # common with the numbers of options that cases are multiplied with.
        # shellcheck disable=SC2086
        python -m pytest tests/semantics tests/transforms tests/swapping tests/cuda tests/cpu/test_openmp.py \
            tests/project/test_benchmarks.py tests/project/test_documentation.py -m 'not mutations' --sample 7 \
            $workers --junit-xml="$results"
    )
}

# In that environment because torchvision, which some of the libraries need, has no build for every build of torch.
run_integrations() {
    if [ ! -e "$environment/nllx-requirements/dev.txt" ]; then
        echo "There is no $environment (stage build): the environment of the other tests is taken."
        make integrations
        return
    fi
    copy_tree
    (
        export VIRTUAL_ENV=$environment TORCH=$TORCH_WITH_CUDA NLLX_WITHOUT_CUDA=0 MAX_JOBS=${MAX_JOBS:-2}
        unset CC CXX
        make -C "$tree" integrations
    )
}

run_kernels() {
    find_cuobjdump
    python tools/check_cuda_kernels.py
}

run_built_kernels() {
    local objects
    objects=$(find "$tree/build" -path '*/temp*/csrc/cuda/kernels' -type d 2>/dev/null | head -n 1 || true)
    if [ -z "$objects" ]; then
        run_kernels
        return
    fi
    find_cuobjdump
    python tools/check_cuda_kernels.py --objects "$objects"
}

# With the address sanitizer, whose runtime has to be there first, and C++'s library with it, as torch throws through it.
# Without it the planted mistakes, for which each kernel is compiled anew, and the other orders of threads and chunks of
# many tiles, which access memory like the others.
run_on_cpu() {
    local preloaded='' name
    for name in libasan.so libstdc++.so; do preloaded+=" $(g++ -print-file-name=$name)"; done
    # shellcheck disable=SC2086
    NLLX_EMULATOR_SANITIZER=address LD_PRELOAD=${preloaded# } \
        ASAN_OPTIONS=detect_leaks=0:halt_on_error=0:allocator_may_return_null=1 \
        python -m pytest tests/cuda_on_cpu -k "not every_order and not tiles_of_a_chunk" $workers
    # shellcheck disable=SC2086
    python -m pytest tests/cuda_on_cpu -k "every_order or tiles_of_a_chunk or test_emulator or test_mutations" -m '' \
        $workers
}

find_nvcc
[ $# -gt 0 ] || { echo "cuda_check.sh: name a stage: build, integrations, kernels, built-kernels, on-cpu" >&2 && exit 2; }
for stage in "$@"; do
    case $stage in
    build) run_build ;;
    integrations) run_integrations ;;
    kernels) run_kernels ;;
    built-kernels) run_built_kernels ;;
    on-cpu) run_on_cpu ;;
    *) echo "cuda_check.sh: no stage '$stage' (build, integrations, kernels, built-kernels, on-cpu)" >&2 && exit 2 ;;
    esac
done
