"""Compiles the CUDA kernels for the CPU, with g++ and the undefined-behaviour sanitizer, into shared libraries.

What is built lies in ``build/cuda_on_cpu`` under a hash of its sources, so that it is built once.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CACHE = HERE.parents[1] / "build" / "cuda_on_cpu"
INCLUDE = HERE / "include"

COMPILE = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    # No integer is narrowed but where the source says so: what is 64 bits wide, as indices and products are, stays so.
    "-Wconversion",
    "-Werror",
    "-Wno-psabi",
    # Several libraries with the same names are loaded into one process.
    "-fvisibility=hidden",
    "-fno-gnu-unique",
]

# The runtime of the address sanitizer has to be in the process from the start (tools/cuda_check.sh). Local variables are left
# out: fibers change stacks behind its back. A report ends the launch and not the process.
ADDRESS_SANITIZER = os.environ.get("NLLX_EMULATOR_SANITIZER") == "address"
SANITIZE = ["-fsanitize=undefined"]
if ADDRESS_SANITIZER:
    SANITIZE += ["-g1", "-fsanitize=address", "-fsanitize-recover=address", "--param", "asan-stack=0"]


@functools.cache
def compiler() -> str | None:
    """The path of g++, or None."""
    return shutil.which("g++")


def _run(command: Sequence[str | Path]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout


@functools.cache
def _identity() -> str:
    """What the compiler makes of the same sources may differ by this."""
    return "\n".join([_run([str(compiler()), "--version"]), torch.__version__, *COMPILE, *SANITIZE])


def _hash(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Object:
    """The object of a source, whose headers are those of folders; options: of the compiler, beside COMPILE."""

    source: Path
    folders: tuple[Path, ...]
    options: tuple[str, ...] = ()

    @functools.cached_property
    def path(self) -> Path:
        headers = sorted(path for folder in self.folders for path in [*folder.rglob("*.h"), *folder.rglob("*.cuh")])
        parts = [_identity(), *self.options, self.source.name, self.source.read_bytes()]
        for header in headers:
            parts += [header.name, header.read_bytes()]
        return CACHE / "objects" / f"{self.source.stem}-{_hash(parts)}.o"

    def make(self) -> bool:
        """Whether the object is there, compiled now if need be, and not if another process is at it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not self.path.exists():
                partial = self.path.with_suffix(f".{os.getpid()}")
                # torch's headers define the half types, which nvcc brings along.
                system = ["-isystem", Path(torch.__file__).parent / "include"]
                includes = [flag for folder in self.folders for flag in ("-I", folder)]
                how = [*COMPILE, *self.options, *SANITIZE, *includes, *system]
                _run([str(compiler()), *how, "-x", "c++", "-c", self.source, "-o", partial])
                partial.rename(self.path)
            return True


def _make(objects: Sequence[_Object]) -> list[Path]:
    """The files of the objects; processes that want the same ones share the work."""
    missing = [made for made in objects if not made.path.exists()]
    while missing:
        left = [made for made in missing if not made.make()]
        if len(left) == len(missing):
            time.sleep(0.2)
        missing = left
    return [made.path for made in objects]


def library(sources: Iterable[tuple[Path, Path]]) -> Path:
    """A shared library of the emulator and of sources, each with the folder csrc whose headers it includes."""
    wanted = [_Object(HERE / "cuda_emulator.cpp", (INCLUDE,))]
    # Changed sources run a few small cases: half the time to compile is worth more than how long those take.
    wanted += [_Object(source, (INCLUDE, csrc), () if csrc == CSRC else ("-O0",)) for source, csrc in sources]
    objects = _make(wanted)
    made = CACHE / f"{_hash(path.name for path in objects)}.so"
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}")
        # Where there is no static library of the sanitizer, the loader has to find the shared one.
        found = _run([str(compiler()), "-print-file-name=libubsan.a"])
        static = ["-static-libubsan"] if Path(found.strip()).is_absolute() and not ADDRESS_SANITIZER else []
        _run([str(compiler()), "-shared", *SANITIZE, *static, *objects, "-o", partial])
        partial.rename(made)
    return made


def kernels_library(changed: str = "", csrc: Path = CSRC) -> Path:
    """The library of all launches of csrc/cuda/kernels and of ``bindings.cpp``, for ``launches.Kernels``.

    changed: the name of a source that is taken, with its headers, from another folder csrc; it alone is compiled.
    """
    launches = [path.name for path in sorted((CSRC / "cuda" / "kernels").glob("*.cu"))]
    folders = [(name, csrc if name == changed else CSRC) for name in launches]
    sources = [(folder / "cuda" / "kernels" / name, folder) for name, folder in folders]
    host = [(CSRC / "cuda" / "kernels" / name, CSRC) for name in ("counters.cpp", "plan.cpp")]
    return library([(HERE / "bindings.cpp", CSRC), *host, *sources])
