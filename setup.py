"""Builds nllx._C: for CPU where torch is a CPU build, for CPU and CUDA where torch is a CUDA build.

Environment: NLLX_WITHOUT_CUDA=1 leaves CUDA out; TORCH_CUDA_ARCH_LIST names the GPU architectures (default below);
CUDA_HOME names the toolkit; MAX_JOBS bounds the compilers that run at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)
# Turing to Blackwell, and PTX for what comes after; toolkits that no longer or not yet know one leave it out.
DEFAULT_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


def fail(sentence: str) -> None:
    """Ends the build with one sentence instead of a traceback."""
    sys.exit(f"nllx: {sentence}")


def import_torch():
    try:
        import torch
    except ImportError:
        fail(
            "torch is not installed. nllx is built against the torch that it runs with: install torch >= 2.11 first, "
            "then run `pip install --no-build-isolation .`"
        )
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        fail(f"torch {torch.__version__} is too old: nllx needs torch >= 2.11; run `pip install --upgrade torch`")
    return torch


def nvcc_release(nvcc: str) -> tuple[str, str]:
    """The release of a CUDA compiler ("13.0") and the folder of its toolkit.

    The folder is asked of nvcc itself: the nvcc on PATH may be a wrapper or a link elsewhere.
    """
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if release is None:
        fail(f"`{nvcc} --version` does not name a release; set CUDA_HOME to a CUDA toolkit, or NLLX_WITHOUT_CUDA=1")
    with tempfile.NamedTemporaryFile(suffix=".cu") as source:
        dryrun = subprocess.run([nvcc, "--dryrun", source.name], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    return release.group(1), str(home)


def find_cuda(wanted: str) -> str:
    """The toolkit's folder, checked to be of the major release that torch was built with."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    hint = (
        f"install the CUDA {wanted} toolkit and set CUDA_HOME to it, or set NLLX_WITHOUT_CUDA=1 to build for CPU only"
    )
    if not Path(nvcc).exists():
        fail(f"torch is a CUDA {wanted} build, but there is no nvcc at {nvcc}; {hint}")
    release, top = nvcc_release(nvcc)
    if release.split(".")[0] != wanted.split(".")[0]:
        fail(f"torch is a CUDA {wanted} build, but {nvcc} is release {release}; {hint}")
    return top


def architectures(nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST as given, or the default less what this nvcc cannot compile for."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    return ";".join(a for a in DEFAULT_ARCHITECTURES if a.split("+")[0].replace(".", "") in known)


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) and not shutil.which("g++"):
        fail(f"no C++ compiler: `{compiler}` is not on PATH; install one (on Debian or Ubuntu `apt install g++`)")
    command = os.environ.get("CXX", "c++").split() if shutil.which(compiler) else ["g++"]
    openmp = subprocess.run(
        [*command, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"],
        input="#include <omp.h>\n",
        capture_output=True,
        text=True,
    )
    if openmp.returncode:
        fail(
            f"`{' '.join(command)}` does not compile with OpenMP (-fopenmp), without which every loss would run on one "
            "thread; install OpenMP for it (for clang on Debian or Ubuntu `apt install libomp-dev`) or set CXX=g++"
        )


def main() -> None:
    torch = import_torch()
    check_compiler()
    with_cuda = torch.version.cuda is not None and os.environ.get("NLLX_WITHOUT_CUDA", "0") in ("", "0")
    macros: list[tuple[str, str | None]] = [("NLLX_TORCH_VERSION", f'"{torch.__version__}"')]
    sources = [
        source for folder in ("", "operators/", "cpu/**/") for source in sorted(ROOT.glob(f"csrc/{folder}*.cpp"))
    ]
    # Needs no CUDA, and `_C.cuda_plan` answers without it too.
    sources.append(ROOT / "csrc" / "cuda" / "kernels" / "plan.cpp")
    # Without -fopenmp at::parallel_for, which is inlined from torch's headers, runs on one thread and says nothing.
    cxx = ["-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    # As fast as -O3 -g, which Python adds, for kernels that are vectorised by hand, and compiled in half the time.
    cxx += ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-g0"]
    # Hardening that costs nothing: copies of known size are checked, and no table of addresses stays writable.
    cxx += ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
    link = ["-Wl,-z,relro", "-Wl,-z,now"] if sys.platform.startswith("linux") else []
    flags = {"cxx": cxx}
    if with_cuda:
        os.environ["CUDA_HOME"] = find_cuda(torch.version.cuda)
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")))
        sources += sorted({*ROOT.glob("csrc/cuda/**/*.cpp"), *ROOT.glob("csrc/cuda/**/*.cu")} - {*sources})
        macros += [
            ("NLLX_WITH_CUDA", None),
            ("NLLX_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("NLLX_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
        ]
        flags["nvcc"] = ["-O3", "-lineinfo"]
    # Reads CUDA_HOME when it is imported.
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    depends = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.inl"), *ROOT.glob("csrc/**/*.cuh")]
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "nllx._C",
        [os.path.relpath(source, ROOT) for source in sources],
        depends=[os.path.relpath(path, ROOT) for path in depends],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
        # Linked without -fopenmp: the runtime is the one that libtorch_cpu brings. A second one is a second thread pool.
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})


main()
