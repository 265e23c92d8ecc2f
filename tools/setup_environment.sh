#!/bin/sh
# Prepares a Python environment for this repository and says what is missing on the machine.
#
#   sh tools/setup_environment.sh ENVIRONMENT GROUP...
#
# ENVIRONMENT is an existing virtual or conda environment, or a folder in which a virtual environment is made. Installs
# torch where it is missing or too old, and requirements/GROUP.txt for each GROUP unless that was done before. Writes
# build/environment.sh, which the Makefile's commands source; that file changes only when the extension must be rebuilt.
#
# Variables: PYTHON (interpreter for a new environment), TORCH (exact version to install instead of the pinned one),
# CXX (C++ compiler), NLLX_WITHOUT_CUDA=1.
set -eu

MINIMUM_TORCH=2.11
environment=$1
shift

fail() {
    printf 'nllx: %s\n' "$1" >&2
    exit 1
}

# older FOUND MINIMUM: whether version FOUND is below MINIMUM, comparing major and minor.
older() {
    printf '%s %s\n' "$1" "$2" | awk '{ split($1, a, "."); split($2, b, "."); exit !(a[1] + 0 < b[1] + 0 || (a[1] + 0 == b[1] + 0 && a[2] + 0 < b[2] + 0)) }'
}

recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

python=$environment/bin/python
if [ ! -x "$python" ]; then
    base=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if recent_python "$candidate"; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        found=$("${PYTHON:-python3}" --version 2>&1) && found="only $found was found" || found="no ${PYTHON:-python3} was found"
        fail "Python 3.10 or newer is needed and $found: install it (Debian, Ubuntu: apt install python3 python3-venv python3-dev) or name one with PYTHON=/path/to/python3."
    fi
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$base has no venv module to make $environment with: install it (Debian, Ubuntu: apt install python3-venv)."
    echo "Making the virtual environment $environment with $("$base" --version)"
    "$base" -m venv "$environment" || fail "the virtual environment $environment could not be made: see the message above."
fi
recent_python "$python" ||
    fail "Python 3.10 or newer is needed and $environment has $("$python" --version 2>&1): activate a newer environment, or deactivate this one to have .venv made."

# The compiler and Python's headers are asked for before anything large is downloaded.
cxx=${CXX:-}
for candidate in c++ g++ clang++; do
    [ -n "$cxx" ] || ! command -v "$candidate" >/dev/null || cxx=$candidate
done
[ -n "$cxx" ] || fail "no C++ compiler was found: install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) or name one with CXX=/path/to/g++."
compiler=$($cxx --version 2>/dev/null | head -n 1) || compiler=
[ -n "$compiler" ] || fail "the C++ compiler '$cxx' does not run: install one (Debian, Ubuntu: apt install g++) or name another with CXX=/path/to/g++."
echo '#include <optional>' | $cxx -std=c++20 -x c++ -fsyntax-only - 2>/dev/null ||
    fail "'$cxx' ($compiler) cannot compile C++20, which torch's headers need: install gcc 10 or clang 10 or newer (Debian, Ubuntu: apt install g++) and name it with CXX=/path/to/g++."
case $compiler in
*clang*) cc=clang ;;
*) cc=gcc ;;
esac
command -v "$cc" >/dev/null || cc=$cxx
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    fail "Python.h, which C++ extensions need, is missing for $("$python" --version): install it (Debian, Ubuntu: apt install python3-dev)."

# pip_install WHAT ARGUMENT...: runs pip install ARGUMENT..., turning its usual failures into one sentence about WHAT.
pip_install() {
    what=$1
    shift
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
        fail "$environment has no pip and cannot get it: install it (Debian, Ubuntu: apt install python3-venv python3-pip)."
    echo "Installing $what into $environment"
    quiet=--quiet
    [ ! -t 1 ] || quiet=
    log=$environment/pip-errors.log
    "$python" -m pip install --disable-pip-version-check $quiet "$@" 2>"$log" && return
    cat "$log" >&2
    if grep -qE 'NewConnectionError|NameResolutionError|name resolution|Network is unreachable|ConnectTimeout|ReadTimeout|Read timed out|ProxyError' "$log"; then
        fail "no network: pip could not reach its package index to install $what; connect, or point pip at one that can be reached (PIP_INDEX_URL, PIP_FIND_LINKS), and run this again."
    elif grep -q 'No space left on device' "$log"; then
        fail "the disk is full: $what could not be installed; free some space (torch built for CUDA takes 7 GB, a CPU build 1 GB) and run this again."
    elif grep -q 'No matching distribution found' "$log"; then
        fail "there is no build of $what for $("$python" --version) on $(uname -sm): use Python 3.10 to 3.13 (PYTHON=python3.12)."
    fi
    fail "pip could not install $what: see its message above."
}

# Prints "version cuda-version-or-nothing", or nothing where torch is missing. Reads files only: importing torch takes a second.
describe_torch() {
    "$python" - <<'END'
import importlib.util, pathlib, re
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    text = pathlib.Path(spec.origin).with_name("version.py").read_text()
    version = re.search(r"__version__ = '(.+)'", text)[1]
    cuda = re.search(r"^cuda\b.*= '(.+)'", text, re.M)
    print(version, cuda[1] if cuda else "")
END
}

torch=$(describe_torch)
if [ -n "${TORCH:-}" ]; then
    case $torch in
    "$TORCH" | "$TORCH"[+\ ]*) ;;
    *) pip_install "torch $TORCH" "torch==$TORCH" ;;
    esac
elif [ -z "$torch" ] || older "${torch%% *}" $MINIMUM_TORCH; then
    pip_install "torch (200 MB to 3 GB to download)" -r requirements/torch.txt
fi
torch=$(describe_torch)

# What was installed is remembered as torch's version and the text of the requirement files. What others require never changes torch, for which
# the extension is built; torchvision comes in the version that fits it.
mkdir -p "$environment/nllx-requirements" build
constraints=$environment/nllx-requirements/constraints
torch_version=${torch%% *}
echo "torch==${torch_version%%+*}" >"$constraints"
for group in "$@"; do
    stamp=$environment/nllx-requirements/$group.txt
    if ! cat "$constraints" requirements/*.txt | cmp -s - "$stamp"; then
        pip_install "requirements/$group.txt" -c "$constraints" -r "requirements/$group.txt"
        cat "$constraints" requirements/*.txt >"$stamp"
    fi
done

# A torch built for CUDA needs nvcc for CUDA kernels; a machine without it still gets the CPU kernels.
without_cuda=${NLLX_WITHOUT_CUDA:-0}
cuda=${torch#* }
if [ -n "$cuda" ] && [ "$without_cuda" = 0 ] && [ -z "${CUDA_HOME:-${CUDA_PATH:-}}" ] &&
    ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    without_cuda=1
    note="torch is built for CUDA $cuda and there is no nvcc, so the extension is built for the CPU alone. For CUDA, install the CUDA $cuda toolkit and set CUDA_HOME to it."
fi

quoted() {
    printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")"
}
directory=$(cd "$environment/bin" && pwd)
file=build/environment.sh
{
    echo "# Written by tools/setup_environment.sh; the extension is rebuilt when this file changes."
    echo "# $("$python" --version), torch and its CUDA: $torch, $compiler"
    echo "# TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-} CUDA_HOME=${CUDA_HOME:-} CFLAGS=${CFLAGS:-} CXXFLAGS=${CXXFLAGS:-}"
    echo "export PATH=$(quoted "$directory"):\"\$PATH\""
    echo "export CC=$(quoted "${CC:-$cc}") CXX=$(quoted "$cxx")"
    echo "export NLLX_WITHOUT_CUDA=$(quoted "$without_cuda")"
} >$file.new
if cmp -s $file.new $file; then
    rm $file.new
else
    mv $file.new $file
    [ -z "${note:-}" ] || echo "$note"
fi
