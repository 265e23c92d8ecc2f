#!/usr/bin/env bash
# Builds and runs tests/fuzz: the CPU kernels on problems made of random bytes, against the definition, under sanitizers.
#
#   bash tools/fuzz.sh WAY SECONDS [SEED]
#
#   address   address and undefined-behaviour sanitizers, random bytes
#   thread    thread sanitizer, the chunks of a problem on three threads
#   guided    address and undefined-behaviour sanitizers, libFuzzer's bytes, and the coverage of csrc at the end;
#             needs clang with its runtime (Debian, Ubuntu: apt install clang libclang-rt-14-dev llvm)
#   valgrind  no sanitizer, under valgrind's memcheck: what depends on memory that no one wrote; it knows no AVX-512
#   emulated  no sanitizer, on CPUs that qemu emulates (apt install qemu-user): one without AVX, one with AVX but not
#             AVX2, one with AVX2 but not AVX-512; an instruction that they do not have ends the run
#
# CXX is the compiler of all but guided (g++). What is built is kept in build/fuzz.
set -euo pipefail
cd "$(dirname "$0")/.."

way=${1:-address} seconds=${2:-60} seed=${3:-1}
compiler=${CXX:-g++}
# No integer is narrowed but where the source says so: what is 64 bits wide, as indices and products of sizes are, stays so.
# For a shared library too: tools/sanitize_extension.sh links the same objects.
options=(-std=c++17 -fPIC -O1 -g1 -ffp-contract=fast -Wno-psabi -fno-omit-frame-pointer -Wconversion -Wno-sign-conversion -Werror)
main=(-DNLLX_STANDALONE)
objects=$way
case $way in
address)
    # Calls instead of inline checks, and no more of the second sanitizer than these, for compiling takes long. Its checks of
    # null and overflowing pointers would double that; the address sanitizer finds those that are used, and `guided` has all.
    options+=(-fsanitize=address --param asan-instrumentation-with-call-threshold=0)
    options+=(-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow)
    options+=(-fno-sanitize-recover=all)
    ;;
valgrind | emulated)
    options+=(-O2)
    main+=(-DNLLX_VALGRIND) # its marks cost nothing elsewhere
    objects=plain
    ;;
thread) options+=(-fsanitize=thread) main+=(-DNLLX_THREADS) ;;
guided)
    compiler=${CLANG:-clang++}
    options+=(-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fprofile-instr-generate -fcoverage-mapping)
    main=(-fsanitize=fuzzer)
    ;;
*) echo "fuzz.sh: no way '$way' (address, thread, guided, valgrind, emulated)" >&2 && exit 2 ;;
esac

folder=build/fuzz/$objects
mkdir -p "$folder"
# build NAME SOURCE OPTION...: compiles where the sources, or what is compiled with, changed.
build() {
    local name=$1 source=$2
    shift 2
    local mark
    mark=$( (echo "${options[@]}" "$@" && "$compiler" "${options[@]}" "$@" -E "$source") | cksum)
    [ -e "$folder/$name.o" ] && [ "$(cat "$folder/$name.mark" 2>/dev/null)" = "$mark" ] && return
    echo "fuzz.sh: compiling $source for $way"
    "$compiler" "${options[@]}" "$@" -c "$source" -o "$folder/$name.o"
    echo "$mark" >"$folder/$name.mark"
}
for capability in default avx2 avx512; do
    build "$capability" "csrc/cpu/kernels/kernels_$capability.cpp" &
done
build main tests/fuzz/fuzz_cpu_kernels.cpp "${main[@]}" -Itests/fuzz/include -Wall
# A background job's failure is that of its wait.
for job in $(jobs -p); do wait "$job"; done
"$compiler" "${options[@]}" "${main[@]}" "$folder"/{main,default,avx2,avx512}.o -pthread -o "$folder/fuzz"

case $way in
guided)
    mkdir -p "$folder/corpus"
    # Problems of the larger kind take a while under coverage.
    LLVM_PROFILE_FILE=$folder/profile.raw "$folder/fuzz" "$folder/corpus" -max_total_time="$seconds" -seed="$seed" \
        -max_len=96 -len_control=0 -verbosity=0 -print_final_stats=1 -artifact_prefix="$folder/"
    llvm-profdata merge -o "$folder/profile" "$folder/profile.raw"
    llvm-cov report "$folder/fuzz" -instr-profile="$folder/profile" csrc
    ;;
valgrind) valgrind --quiet --error-exitcode=1 "$folder/fuzz" "$seconds" "$seed" ;;
emulated)
    for cpu in Nehalem IvyBridge Haswell; do
        printf '%s: ' "$cpu"
        qemu-x86_64 -cpu "$cpu" "$folder/fuzz" "$seconds" "$seed"
    done
    ;;
*) "$folder/fuzz" "$seconds" "$seed" ;;
esac
