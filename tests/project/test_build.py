"""The set-up and the build say in one sentence what is missing, and the CUDA check reads ptxas right."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ["awk", "cat", "cmp", "grep", "head", "mkdir", "mv", "rm", "sed", "sh", "uname"]

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="the set-up script is a POSIX shell script"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree"),
]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A copy of the set-up files, with bin/ as the whole PATH: the shell's tools, no interpreter, no compiler."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(found)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_environment.sh", tmp_path / "tools")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def program(machine: Path, name: str, script: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def set_up(machine: Path, **variables: str) -> str:
    """Runs the set-up, which has to fail, and returns the last line it wrote as an error."""
    result = subprocess.run(
        ["sh", "tools/setup_environment.sh", ".venv", "dev"],
        cwd=machine,
        env={"PATH": str(machine / "bin"), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, result
    *of_others, sentence = result.stderr.splitlines()
    assert sentence.startswith("nllx: ")
    assert not any(line.startswith("nllx: ") for line in of_others)
    return sentence


def environment(machine: Path, script: str) -> None:
    """An environment that exists already, with this script as its interpreter."""
    (machine / ".venv" / "bin").mkdir(parents=True)
    program(machine, "../.venv/bin/python", script)


WORKING_COMPILER = 'case "$1" in --version) echo "g++ 12.2.0" ;; esac; cat >/dev/null'


def test_no_python(machine: Path) -> None:
    assert "Python 3.10 or newer is needed and no python3 was found" in set_up(machine)


def test_python_too_old(machine: Path) -> None:
    program(machine, "python3", 'case "$1" in --version) echo "Python 3.8.18" ;; *) exit 1 ;; esac')
    sentence = set_up(machine)
    assert "Python 3.10 or newer is needed and only Python 3.8.18 was found" in sentence
    assert "apt install python3" in sentence


def test_python_of_the_environment_too_old(machine: Path) -> None:
    environment(machine, 'case "$1" in --version) echo "Python 3.9.2" ;; *) exit 1 ;; esac')
    assert ".venv has Python 3.9.2: activate a newer environment" in set_up(machine)


def test_no_venv_module(machine: Path) -> None:
    program(machine, "python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    assert "apt install python3-venv" in set_up(machine)


def test_no_compiler(machine: Path) -> None:
    environment(machine, "exit 0")
    assert "no C++ compiler was found" in set_up(machine)
    assert "'missing-g++' does not run" in set_up(machine, CXX="missing-g++")


def test_compiler_too_old(machine: Path) -> None:
    environment(machine, "exit 0")
    program(machine, "g++", 'case "$1" in --version) echo "g++ 8.3.0" ;; *) exit 1 ;; esac')
    sentence = set_up(machine)
    assert "'g++' (g++ 8.3.0) cannot compile C++20" in sentence
    assert "gcc 10 or clang 10" in sentence


def test_no_python_headers(machine: Path) -> None:
    environment(machine, 'case "$*" in *Python.h*) exit 1 ;; --version) echo "Python 3.11.2" ;; esac')
    program(machine, "c++", WORKING_COMPILER)
    assert "Python.h" in (sentence := set_up(machine))
    assert "apt install python3-dev" in sentence


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        ("ERROR: something else\\n", "pip could not install torch"),
        ("ERROR: No matching distribution found for torch==2.13.0\\n", "use Python 3.10 to 3.13"),
        ("OSError: [Errno 28] No space left on device\\n", "the disk is full"),
        (
            "NameResolutionError: name resolution\\nERROR: No matching distribution found for torch==2.13.0\\n",
            "no network",
        ),
    ],
)
def test_pip_fails(machine: Path, pip_says: str, sentence: str) -> None:
    environment(machine, f'case "$*" in *" install "*) printf "{pip_says}" >&2; exit 1 ;; esac')
    program(machine, "c++", WORKING_COMPILER)
    assert sentence in set_up(machine)


# An interpreter that answers the queries about torch like one that has the version in the file installed-torch, and
# whose pip notes what it was asked to install. The other queries go to the real one.
RECORDING_PYTHON = f"""
case "$*" in
*"-m pip install"*) echo "$*" >>installed ;;
*"-m pip"*) ;;
-) cat >/dev/null; cat installed-torch ;;
*) exec {sys.executable} "$@" ;;
esac"""


CONSTRAINTS = ".venv/nllx-requirements/constraints"
INSTALLS_DEV = f"-c {CONSTRAINTS} -r requirements/dev.txt"


def recorded(machine: Path, torch: str, **variables: str) -> list[str]:
    """What is installed beside a torch that is already there; empty at once if the set-up is run again."""
    (machine / "installed-torch").write_text(torch)
    if not (machine / ".venv").exists():
        environment(machine, RECORDING_PYTHON)
        program(machine, "c++", WORKING_COMPILER)
    command = ["sh", "tools/setup_environment.sh", ".venv", "dev"]
    variables = {"PATH": str(machine / "bin"), **variables}
    log = machine / "installed"
    log.unlink(missing_ok=True)
    subprocess.run(command, cwd=machine, env=variables, check=True, capture_output=True, timeout=120)
    return [line.partition(" --quiet ")[2] for line in log.read_text().splitlines()] if log.exists() else []


def test_torch_is_kept_unless_too_old(machine: Path) -> None:
    assert recorded(machine, "2.11.0+cu130 13.0") == [INSTALLS_DEV]
    assert (machine / CONSTRAINTS).read_text() == "torch==2.11.0\n"
    assert recorded(machine, "2.11.0+cu130 13.0") == []
    # What was installed beside another torch may not fit this one: torchvision.
    assert recorded(machine, "2.20.0+cpu ") == [INSTALLS_DEV]
    assert recorded(machine, "2.9.1+cpu ") == ["-r requirements/torch.txt", INSTALLS_DEV]
    assert recorded(machine, "") == ["-r requirements/torch.txt", INSTALLS_DEV]
    assert recorded(machine, "2.13.0+cpu ", TORCH="2.11.0") == ["torch==2.11.0", INSTALLS_DEV]
    assert recorded(machine, "2.11.0+cpu ", TORCH="2.11.0") == [INSTALLS_DEV]


def test_requirements_are_installed_again_when_they_change(machine: Path) -> None:
    assert recorded(machine, "2.13.0 ") == [INSTALLS_DEV]
    (machine / "requirements" / "build.txt").write_text("ninja\n")
    assert recorded(machine, "2.13.0 ") == [INSTALLS_DEV]
    assert recorded(machine, "2.13.0 ") == []


def test_environment_file_changes_only_with_what_the_build_depends_on(machine: Path) -> None:
    file = machine / "build" / "environment.sh"
    recorded(machine, "2.13.0+cpu ")
    before = file.stat().st_mtime_ns
    recorded(machine, "2.13.0+cpu ")
    assert file.stat().st_mtime_ns == before
    text = file.read_text()
    for torch, variables in [("2.11.0+cpu ", {}), ("2.11.0+cpu ", {"NLLX_WITHOUT_CUDA": "1"})]:
        recorded(machine, torch, **variables)
        assert file.read_text() != text
        text = file.read_text()


def test_everything_is_pinned() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        for line in file.read_text().splitlines():
            requirement = line.partition("#")[0].strip()
            assert not requirement or requirement.startswith("-r ") or "==" in requirement, f"{file.name}: {line}"


def run_setup_py(
    tmp_path: Path, torch_version: str, cuda: str | None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """setup.py beside a stand-in for torch that has only the attributes from which the kind of build is decided."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import types\n__version__ = {torch_version!r}\nversion = types.SimpleNamespace(cuda={cuda!r})\n"
    )
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_setup_without_nvcc(tmp_path: Path) -> None:
    result = run_setup_py(tmp_path, "2.11.0+cu130", "13.0", CUDA_HOME=str(tmp_path), NLLX_WITHOUT_CUDA="0")
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert f"no nvcc at {tmp_path}/bin/nvcc" in sentence
    assert "NLLX_WITHOUT_CUDA=1" in sentence


def test_setup_with_the_wrong_nvcc(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path, "nvcc", 'echo "Cuda compilation tools, release 11.8, V11.8.89"')
    result = run_setup_py(tmp_path, "2.11.0+cu130", "13.0", CUDA_HOME=str(tmp_path), NLLX_WITHOUT_CUDA="0")
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert "is release 11.8" in sentence


def test_setup_with_an_old_torch(tmp_path: Path) -> None:
    result = run_setup_py(tmp_path, "2.10.1", None)
    assert result.returncode == 1
    assert "torch 2.10.1 is too old" in result.stderr


def test_setup_without_openmp(tmp_path: Path) -> None:
    """A clang without libomp-dev, for example: torch's headers would leave every loop on one thread, and say nothing."""
    (tmp_path / "bin").mkdir()
    program(tmp_path, "compiler", "echo \"error: 'omp.h' file not found\" >&2; exit 1")
    result = run_setup_py(tmp_path, "2.11.0", None, CXX=f"{tmp_path}/bin/compiler -m64")
    assert result.returncode == 1
    assert "bin/compiler -m64` does not compile with OpenMP" in result.stderr


PTXAS_OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4nllx27_GLOBAL__N__2c81ab3b_4_k_cu10row_kernelIfLi4EEEvPKT_' for 'sm_90'
ptxas info    : Function properties for _ZN4nllx27_GLOBAL__N__2c81ab3b_4_k_cu10row_kernelIfLi4EEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compile time = 11.0 ms
ptxas info    : Compiling entry function '_Z12plane_kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z12plane_kernelPf
    64 bytes stack frame, 60 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


MACHINE_CODE = """\
		Function : _Z10row_kernelPf
        /*0090*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00a0*/                   STG.E desc[UR4][R6.64], R4 ;
		Function : _Z12other_kernelPf
        /*0090*/                   @P0 LDG.E.128.CONSTANT R4, [R2] ;
        /*00a0*/                   STG.E.EF.128 [R6], R4 ;
        /*00b0*/                   LDL.128 R4, [R1] ;
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module tools/check_cuda_kernels.py."""
    spec = importlib.util.spec_from_file_location("check_cuda_kernels", ROOT / "tools" / "check_cuda_kernels.py")
    check = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_cuda_kernels", check)
    spec.loader.exec_module(check)
    return check


def test_reading_machine_code(monkeypatch: pytest.MonkeyPatch, check: ModuleType) -> None:
    monkeypatch.setattr(check, "VECTORS", {"row_kernel": (True, True), "other_kernel": (True, True)})
    assert check.without_vectors(MACHINE_CODE, "90") == ["row_kernel (_Z10row_kernelPf) has no 16-byte store on sm_90"]


RESOURCES = """
Fatbin elf code:
================
arch = sm_75
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4nllx10row_kernelIfEEvPf:
  REG:40 STACK:0 SHARED:272 LOCAL:0 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_120
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN4nllx10row_kernelIfEEvPf:
  REG:48 STACK:16 SHARED:1296 LOCAL:8 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_reading_resources(check: ModuleType) -> None:
    assert check.parse_resources(RESOURCES) == [
        check.Usage(kernel="row_kernel", architecture="75", registers=40, spilled=0, shared=272),
        check.Usage(kernel="row_kernel", architecture="120", registers=48, spilled=24, shared=272),
    ]


def test_reading_ptxas(monkeypatch: pytest.MonkeyPatch, check: ModuleType) -> None:
    usages = check.parse_ptxas(PTXAS_OUTPUT, "90")
    assert usages == [
        check.Usage(kernel="row_kernel", architecture="90", registers=40, spilled=0, shared=128),
        check.Usage(kernel="plane_kernel", architecture="90", registers=255, spilled=124, shared=0),
    ]
    monkeypatch.setattr(check, "REGISTER_BUDGETS", {"row_kernel": 40, "plane_kernel": 255})
    assert check.failures(usages) == ["plane_kernel on sm_90 spills 124 bytes"]
    monkeypatch.setattr(check, "REGISTER_BUDGETS", {"row_kernel": 39})
    assert check.failures(usages) == [
        "plane_kernel has no register budget in check_cuda_kernels.py",
        "plane_kernel on sm_90 spills 124 bytes",
        "row_kernel on sm_90 uses 40 registers, its budget is 39",
    ]


# What of csrc a folder may include beside itself: folders, files; "." are the files that lie in csrc itself.
_ARROWS = {
    "cpu/kernels": {"problem.h", "online_softmax.h"},
    "cuda/kernels": {"problem.h", "online_softmax.h"},
    "entries": {"."},
    "cpu": {".", "entries", "cpu/kernels"},
    "cuda": {".", "entries", "cuda/kernels"},
    "operators": {"."},
}


@pytest.mark.parametrize("folder", _ARROWS)
def test_includes_run_one_way(folder: str) -> None:
    csrc = ROOT / "csrc"
    for path in sorted((csrc / folder).iterdir()):
        if path.is_dir():
            continue
        text = path.read_text()
        if folder.endswith("kernels"):
            assert not re.findall(r"#include <(?:ATen|c10|torch)/", text), f"{path} sees torch"
        for name in re.findall(r'#include "([^"]+)"', text):
            included = (path.parent / name).resolve().relative_to(csrc)
            place = included.parent.as_posix()
            assert place == folder or {place, included.as_posix()} & _ARROWS[folder], f"{path} includes {included}"


def test_every_package_is_installed() -> None:
    """setuptools takes the folders of Python files that it is told of, and a package that is missing is seen by users first."""
    folders = {path.parent for path in (ROOT / "nllx").rglob("*.py")}
    found = setuptools.find_packages(str(ROOT), include=["nllx*"])
    assert {ROOT / name.replace(".", "/") for name in found} == folders
    assert 'include = ["nllx*"]' in (ROOT / "pyproject.toml").read_text()
