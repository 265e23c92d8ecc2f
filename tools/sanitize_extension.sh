#!/usr/bin/env bash
# Builds nllx._C with address and undefined-behaviour sanitizers in a copy of the tree, build/sanitized, and runs tests there.
#
#   bash tools/sanitize_extension.sh PYTEST_ARGUMENT...
#
# The kernels are those that tools/fuzz.sh compiles. No integer of csrc is narrowed but where the source says so: what is
# 64 bits wide, as indices and products of sizes are, stays so (-Wconversion; torch's own headers are left alone).
# Needs the environment of the build, g++ and its sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
source build/environment.sh

bash tools/fuzz.sh address 0
tree=build/sanitized/tree objects=build/sanitized/objects
mkdir -p "$tree" "$objects"

ask() { python -c "import pybind11, sysconfig, torch; print($1)"; }
torch=$(ask 'torch.__path__[0]')
include=(-isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include")
include+=(-isystem "$(ask 'pybind11.get_include()')" -isystem "$(ask 'sysconfig.get_path("include")')")
defines=(-DTORCH_EXTENSION_NAME=_C "-DNLLX_TORCH_VERSION=\"$(ask 'torch.__version__')\"")
sanitizers=(-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
# Calls instead of inline checks: compiled in three quarters of the time.
options=(-std=c++20 -O1 -fPIC -fopenmp -fno-omit-frame-pointer -fvisibility=hidden "${sanitizers[@]}")
options+=(--param asan-instrumentation-with-call-threshold=0)
options+=(-Wall -Wconversion -Werror -Wno-psabi "${defines[@]}" "${include[@]}")

compile() {
    local source=$1 name=${1//\//_} mark
    mark=$( (echo "${options[@]}" && "${CXX:-g++}" "${options[@]}" -E "$source") | cksum)
    [ "$(cat "$objects/$name.mark" 2>/dev/null)" = "$mark" ] && return
    echo "sanitize_extension.sh: compiling $source"
    "${CXX:-g++}" "${options[@]}" -c "$source" -o "$objects/$name.o"
    echo "$mark" >"$objects/$name.mark"
}
sources=(csrc/cuda/kernels/plan.cpp)
for source in csrc/*.cpp csrc/operators/*.cpp csrc/cpu/*.cpp; do
    case $source in */kernels_*) ;; *) sources+=("$source") ;; esac
done
for source in "${sources[@]}"; do
    compile "$source" &
    while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do wait -n; done
done
for job in $(jobs -p); do wait "$job"; done

find "$tree" -mindepth 1 -maxdepth 1 -exec rm -rf {} +
tar -cf - --exclude='./.*' --exclude=./build --exclude=__pycache__ --exclude='*.so' . | tar -xf - -C "$tree"
"${CXX:-g++}" -shared "${sanitizers[@]}" "$objects"/*.o build/fuzz/address/{default,avx2,avx512}.o -L"$torch/lib" \
    -lc10 -ltorch -ltorch_cpu -ltorch_python -Wl,-rpath,"$torch/lib" \
    -o "$tree/nllx/_C$(ask 'sysconfig.get_config_var("EXT_SUFFIX")')"

# torch and Python are not instrumented: their own leaks at exit are not of interest, and the runtime has to be there
# before them. C++ exceptions cross torch's libraries, so the C++ library has to be there too.
cd "$tree"
LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=. python -m pytest -p no:cacheprovider -n auto --maxprocesses 4 "$@"
