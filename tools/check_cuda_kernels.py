"""Compiles every CUDA source for every architecture and checks what ptxas says of the kernels.

Fails where a kernel spills registers to memory, uses more of them or of shared memory than its budget below, or has no
16-byte load or store in its machine code where its plan says vectors, no asynchronous copy or no barrier of a cluster
where it should have them. Needs nvcc, cuobjdump and the headers of any
build of torch; no GPU, no CUDA build of torch.

    python tools/check_cuda_kernels.py          # the table, exit status 1 on a failure
    python tools/check_cuda_kernels.py --objects build/temp*/csrc/cuda/kernels   # of a CUDA build, and compiles nothing
    python tools/check_cuda_kernels.py --host   # compiles csrc's C++ sources instead, as a CUDA build would
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]

# The most registers a thread of each kernel may use, over all of its instantiations (float64 needs the most). They are
# allocated in steps of 8, and 65536 of them per multiprocessor leave room for 2048 / budget warps.
REGISTER_BUDGETS = {
    "checked_target_kernel": 40,
    "cross_entropy_backward_planes_kernel": 96,
    "cross_entropy_backward_rows_kernel": 128,
    "cross_entropy_backward_tile_rows_kernel": 88,
    "cross_entropy_block_rows_kernel": 200,
    "cross_entropy_divisor_kernel": 56,
    "cross_entropy_options_backward_planes_kernel": 120,
    "cross_entropy_options_backward_rows_kernel": 120,
    "cross_entropy_options_planes_kernel": 168,
    "cross_entropy_options_rows_kernel": 112,
    "cross_entropy_planes_kernel": 216,
    "cross_entropy_register_rows_kernel": 248,
    "cross_entropy_tile_rows_kernel": 128,
    "cross_entropy_value_and_grad_block_rows_kernel": 216,
    "log_softmax_backward_block_rows_kernel": 152,
    "log_softmax_backward_planes_kernel": 88,
    "log_softmax_backward_register_rows_kernel": 168,
    "log_softmax_forward_block_rows_kernel": 128,
    "log_softmax_forward_planes_kernel": 128,
    "log_softmax_forward_register_rows_kernel": 168,
    "loss_sum_kernel": 40,
    "mse_loss_backward_kernel": 80,
    "mse_loss_forward_kernel": 80,
    "nll_loss_backward_kernel": 48,
    "nll_loss_forward_kernel": 80,
    "probability_mass_planes_kernel": 72,
    "probability_mass_rows_kernel": 80,
    "softmax_statistics_backward_planes_kernel": 96,
    "softmax_statistics_backward_rows_kernel": 120,
    "softmax_statistics_planes_kernel": 208,
    "softmax_statistics_rows_kernel": 96,
}


# What the plan calls vectors is 16 bytes in one instruction, in every instantiation of these kernels: (loads, stores).
# Planes move 8 bytes, where their plan says vectors.
VECTORS = {
    "cross_entropy_backward_rows_kernel": (True, True),
    "cross_entropy_backward_tile_rows_kernel": (True, True),
    "cross_entropy_block_rows_kernel": (True, False),
    "cross_entropy_options_backward_rows_kernel": (True, True),
    "cross_entropy_options_rows_kernel": (True, False),
    "cross_entropy_register_rows_kernel": (True, False),
    "cross_entropy_tile_rows_kernel": (True, True),
    "cross_entropy_value_and_grad_block_rows_kernel": (True, True),
    "log_softmax_backward_block_rows_kernel": (True, True),
    "log_softmax_backward_register_rows_kernel": (True, True),
    "log_softmax_forward_block_rows_kernel": (True, True),
    "log_softmax_forward_register_rows_kernel": (True, True),
    "mse_loss_backward_kernel": (True, True),
    "mse_loss_forward_kernel": (True, True),
    "nll_loss_backward_kernel": (False, True),
    "softmax_statistics_backward_rows_kernel": (True, True),
    "softmax_statistics_rows_kernel": (True, False),
}
# Kernels of which some instances take elements one by one: the part of a mangled name that says that one does not.
IN_VECTORS = dict.fromkeys(("mse_loss_backward_kernel", "mse_loss_forward_kernel"), "Lb1E")
# What goes through shared memory ahead of the arithmetic, by the part of its mangled name that says so (not float32 without
# coefficients, and of planes those in vectors), and which blocks exchange the states of their parts in clusters.
CLUSTERS = {
    "cross_entropy_block_rows_kernel",
    "cross_entropy_value_and_grad_block_rows_kernel",
    "log_softmax_backward_block_rows_kernel",
    "log_softmax_forward_block_rows_kernel",
}
ASYNCHRONOUS = {
    **dict.fromkeys(CLUSTERS, ""),
    "cross_entropy_block_rows_kernel": "kernelI(?!fLb0E)",
    "cross_entropy_planes_kernel": "Li[24]E",
    "cross_entropy_tile_rows_kernel": "",
    "cross_entropy_backward_tile_rows_kernel": "",
}
# Static shared memory of a block: two blocks of the largest fit the 64 KB of the smallest multiprocessor.
SHARED_BUDGET = 17 << 10


@dataclass(frozen=True)
class Usage:
    """What one instantiation of a kernel takes: registers a thread, bytes spilled, bytes of static shared memory."""

    kernel: str
    architecture: str
    registers: int
    spilled: int
    shared: int


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not shutil.which(nvcc):
        sys.exit(f"nllx: there is no nvcc at {nvcc}: install the CUDA toolkit and set CUDA_HOME to it.")
    return nvcc


def torch_headers() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("nllx: torch is not installed, and its headers (c10) are needed: run `make build` first.")
    include = Path(spec.origin).parent / "include"
    return [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{sysconfig.get_paths()['include']}"]


def compile_source(nvcc: str, source: Path, arguments: list[str], object_file: Path) -> str:
    """Compiles one source and returns what the compiler printed."""
    command = [nvcc, "-std=c++17", "-O3", *torch_headers(), *arguments, "-c", str(source), "-o", str(object_file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stdout}{result.stderr}\nnllx: {source} does not compile: {shlex.join(command)}")
    return result.stdout + result.stderr


def parse_ptxas(output: str, architecture: str) -> list[Usage]:
    """The usage of every kernel in the output of `nvcc -Xptxas -v`."""
    usages = []
    for entry in re.split(r"ptxas info\s*: Compiling entry function ", output)[1:]:
        mangled = re.match(r"'(\w+)'", entry)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        if not (mangled and spills and registers):
            sys.exit(f"nllx: this output of ptxas is not understood:\n{entry}")
        usages.append(
            Usage(
                kernel=kernel_name(mangled[1]),
                architecture=architecture,
                registers=int(registers[1]),
                spilled=int(spills[1]) + int(spills[2]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return usages


def by_architecture(output: str) -> dict[str, str]:
    """What cuobjdump prints of an object, by the architecture of the code."""
    parts = re.split(r"^arch = sm_(\d+)$", output, flags=re.MULTILINE)[1:]
    found: dict[str, str] = defaultdict(str)
    for architecture, text in zip(parts[::2], parts[1::2], strict=True):
        found[architecture] += text  # of one there may be machine code and PTX
    return found


def parse_resources(output: str) -> list[Usage]:
    """The usage of every kernel in the output of `cuobjdump -res-usage`. Without spills no kernel has a stack."""
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usages = []
    for architecture, text in by_architecture(output).items():
        # From sm_90 on what the system takes of a block's shared memory is counted there.
        system = 1024 if int(architecture) >= 90 else 0
        for mangled, registers, stack, shared, local in re.findall(pattern, text):
            spilled = int(stack) + int(local)
            usages.append(Usage(kernel_name(mangled), architecture, int(registers), spilled, int(shared) - system))
    return usages


def kernel_name(mangled: str) -> str:
    """The plain name in an Itanium-mangled one: the last of its leading length-prefixed names.

    `_ZN4nllx4cuda15forward_kernelXIfEEvv` holds nllx, cuda and forward_kernelX; nvcc writes an anonymous namespace as
    a name that starts with _GLOBAL__N_ or _INTERNAL_.
    """
    position = re.match(r"_ZN?", mangled)
    if position is None:  # extern "C"
        return mangled
    name, at = mangled, position.end()
    while length := re.match(r"\d+", mangled[at:]):
        at += length.end()
        name = mangled[at : at + int(length[0])]
        at += int(length[0])
    return name


def failures(usages: Iterable[Usage]) -> list[str]:
    """One sentence for every kernel and architecture that spills, is over its budget, or has none."""
    found = []
    for usage in usages:
        budget = REGISTER_BUDGETS.get(usage.kernel)
        where = f"{usage.kernel} on sm_{usage.architecture}"
        if usage.spilled:
            found.append(f"{where} spills {usage.spilled} bytes")
        if budget is None:
            found.append(f"{usage.kernel} has no register budget in {Path(__file__).name}")
        elif usage.shared > SHARED_BUDGET:
            found.append(f"{where} has {usage.shared} bytes of static shared memory, the budget is {SHARED_BUDGET}")
        elif usage.registers > budget:
            found.append(f"{where} uses {usage.registers} registers, its budget is {budget}")
    return sorted(set(found))


def find_cuobjdump(nvcc: str) -> str:
    beside = Path(shutil.which(nvcc) or nvcc).resolve().with_name("cuobjdump")
    found = shutil.which("cuobjdump") or shutil.which(str(beside))
    if not found:
        sys.exit("nllx: there is no cuobjdump, which disassembles kernels: it is a part of the CUDA toolkit.")
    return found


def disassemble(cuobjdump: str, object_file: Path) -> str:
    return subprocess.run([cuobjdump, "-sass", str(object_file)], check=True, capture_output=True, text=True).stdout


def without_vectors(machine_code: str, architecture: str) -> list[str]:
    """One sentence for every disassembled kernel that should move 16 bytes of device memory at once and does not."""
    found = []
    for function in re.split(r"\bFunction : ", machine_code)[1:]:
        mangled = function.split(maxsplit=1)[0]
        name = kernel_name(mangled)
        vectors = VECTORS.get(name, ()) if IN_VECTORS.get(name, "") in mangled else ()
        for wanted, what, opcode in zip(vectors, ("load", "store"), ("LDG(STS)?", "STG"), strict=False):
            if wanted and not re.search(rf"\b{opcode}\.E(\.\w+)*\.128\b", function):
                found.append(f"{name} ({mangled}) has no 16-byte {what} on sm_{architecture}")
        if name not in ASYNCHRONOUS:
            continue
        streams = re.search(ASYNCHRONOUS[name], mangled) is not None
        for wanted, what, opcode in (
            (int(architecture) >= 80 and streams, "asynchronous copy", r"LDGSTS\.E(\.\w+)*\.(64|128)"),
            (int(architecture) >= 90 and name in CLUSTERS, "barrier of a cluster", "UCGABAR_ARV"),
        ):
            if wanted != bool(re.search(rf"\b{opcode}\b", function)):
                found.append(f"{name} ({mangled}) has {'no' if wanted else 'an'} {what} on sm_{architecture}")
    return found


def check_object(cuobjdump: str, object_file: Path) -> tuple[list[Usage], list[str]]:
    """The usage of the kernels of an object for all architectures, and what is wrong with their machine code."""
    command = [cuobjdump, "-res-usage", str(object_file)]
    usages = parse_resources(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    machine_code = by_architecture(disassemble(cuobjdump, object_file))
    found = []
    for architecture in ARCHITECTURES:
        code = machine_code.get(architecture, "")
        kernels, functions = sum(usage.architecture == architecture for usage in usages), code.count("Function : ")
        if not kernels or functions != kernels:
            found.append(f"{object_file.name} has {kernels} kernels for sm_{architecture}, {functions} in machine code")
        found += without_vectors(code, architecture)
    return usages, found


def print_table(usages: list[Usage]) -> None:
    by_kernel = defaultdict(list)
    for usage in usages:
        by_kernel[usage.kernel].append(usage)
    width = max(map(len, by_kernel), default=6)
    print("Registers a thread, the most over a kernel's instantiations")
    architectures = [f"{'sm_' + architecture:>6}" for architecture in ARCHITECTURES]
    print(f"{'kernel':{width}} {'count':>5} {'budget':>6}", *architectures, f"{'spills':>6} {'shared':>6}")
    for kernel, its in sorted(by_kernel.items()):
        most = [max((u.registers for u in its if u.architecture == a), default=0) for a in ARCHITECTURES]
        count = sum(u.architecture == ARCHITECTURES[-1] for u in its)
        print(
            f"{kernel:{width}} {count:5} {REGISTER_BUDGETS.get(kernel, '-'):>6}",
            *(f"{m:6}" for m in most),
            f"{max(u.spilled for u in its):6} {max(u.shared for u in its):6}",
        )


def compile_host(nvcc: str, folder: str, pool: ThreadPoolExecutor) -> int:
    """Compiles the C++ sources that include CUDA's headers or depend on NLLX_WITH_CUDA; returns how many."""
    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/operators/*.cpp"), *ROOT.glob("csrc/cuda/**/*.cpp")])
    names = ["NLLX_TORCH_VERSION", "NLLX_CUDA_VERSION", "NLLX_CUDA_ARCHITECTURES"]
    # A CPU build of torch has c10's CUDA headers but for this one, which says how c10 was built.
    macros_header = Path(folder, "c10", "cuda", "impl", "cuda_cmake_macros.h")
    macros_header.parent.mkdir(parents=True)
    macros_header.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    flags = ["-DNLLX_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C", *(f'-D{name}=""' for name in names), f"-I{folder}"]
    list(pool.map(lambda source: compile_source(nvcc, source, flags, Path(folder, f"{source.name}.o")), sources))
    return len(sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", action="store_true", help="compile csrc's C++ sources instead, as a CUDA build would")
    parser.add_argument("--objects", type=Path, help="check the objects in this folder, and compile nothing")
    arguments = parser.parse_args()
    nvcc, start = find_nvcc(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        if arguments.host:
            count = compile_host(nvcc, folder, pool)
            print(f"{count} C++ sources compile for CUDA ({time.perf_counter() - start:.0f} s)")
            return

        cuobjdump = find_cuobjdump(nvcc)
        sources = sorted(ROOT.glob("csrc/cuda/kernels/*.cu"))
        if not sources:
            sys.exit("nllx: no CUDA source was found in csrc/cuda/kernels.")

        def check(source: Path, architecture: str) -> tuple[list[Usage], list[str]]:
            target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            object_file = Path(folder, f"{source.name}.{architecture}.o")
            output = compile_source(nvcc, source, [target, "-Xptxas", "-v"], object_file)
            usages = parse_ptxas(output, architecture)
            machine_code = disassemble(cuobjdump, object_file)
            found = without_vectors(machine_code, architecture)
            functions = machine_code.count("Function : ")
            if functions != len(usages):
                found.append(f"{source.name} has {len(usages)} kernels, {functions} of them in its machine code")
            return usages, found

        if arguments.objects:
            objects = [arguments.objects / f"{source.stem}.o" for source in sources]
            checked = list(pool.map(check_object, [cuobjdump] * len(objects), objects))
        else:
            jobs = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
            checked = list(pool.map(check, *zip(*jobs, strict=True)))

    usages = [usage for found, _ in checked for usage in found]
    print_table(usages)
    failed = failures(usages) + [sentence for _, found in checked for sentence in found]
    print(
        f"{len(sources)} sources, {len(usages) // len(ARCHITECTURES)} kernels, {len(ARCHITECTURES)} architectures, "
        f"{time.perf_counter() - start:.0f} s, {len(failed)} failures"
    )
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
