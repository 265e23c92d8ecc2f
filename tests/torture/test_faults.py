"""Failures that are not the caller's: memory that runs out, hooks that raise, interrupts, files that are damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nllx

ROOT = Path(nllx.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's limits, signals and files")


def _python(program: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True, timeout=500
    )


_NO_MEMORY = """
import resource, torch, nllx
torch.set_num_threads(1)
def virtual():
    return int(open("/proc/self/statm").read().split()[0]) * 4096
logits = torch.randn(4096, 8192, requires_grad=True)  # 128 MiB
target = torch.randint(8192, (4096,))
small, few = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
expected = torch.autograd.grad(nllx.functional.cross_entropy(small, few), small)[0]
loss = nllx.functional.cross_entropy(logits, target)
torch.autograd.grad(loss, logits, retain_graph=True)  # what is loaded and kept once is there
import gc; gc.collect()
resource.setrlimit(resource.RLIMIT_AS, (virtual() + (32 << 20),) * 2)
before, raised = virtual(), 0
for i in range({calls}):
    call = [lambda: torch.autograd.grad(loss, logits, retain_graph=True),
            lambda: nllx.functional.log_softmax(logits, 1),
            lambda: nllx.functional.cross_entropy_value_and_grad(logits.detach(), target)][i % 3]
    try:
        call()
    except RuntimeError as error:
        assert "allocate memory" in str(error) or "alloc" in str(error).lower(), error
        raised += 1
print(raised, virtual() - before)
actual = torch.autograd.grad(nllx.functional.cross_entropy(small, few), small)[0]
assert torch.equal(actual, expected)
"""


def test_memory_that_runs_out(amount: Callable[[int, int], int], note: Callable[..., None]) -> None:
    """torch's error, and nothing leaks; what fits goes on working."""
    calls = amount(300, 10_000)
    run = _python(_NO_MEMORY.format(calls=calls), NLLX_CPU_KEEP_MEMORY="0")
    assert run.returncode == 0, run.stderr[-2000:]
    raised, grown = map(int, run.stdout.split())
    note(calls=calls, raised=raised, grown_bytes=grown)
    assert raised == calls
    assert grown < 1 << 20


def test_exception_in_a_hook() -> None:
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    hidden = x * 2
    hidden.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nllx.functional.cross_entropy(hidden, target).backward()
    torch.testing.assert_close(
        torch.autograd.grad(nllx.functional.cross_entropy(x * 2, target), x),
        torch.autograd.grad(torch.nn.functional.cross_entropy(x * 2, target), x),
    )


def test_error_while_another_is_under_way() -> None:
    """Each is raised where it belongs, the first is kept as the context of the second, and nothing is left pending."""
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])

    def fails_again() -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            nllx.functional.cross_entropy(x, target + 2)

    with pytest.raises(IndexError, match="Target 5 is out of bounds") as raised:
        fails_again()
    assert isinstance(raised.value.__context__, ZeroDivisionError)

    class Dies:
        def __del__(self) -> None:  # runs while the stack of an error is taken down
            with contextlib.suppress(IndexError):
                nllx.functional.cross_entropy(x, target + 2)

    def fails() -> None:
        held = Dies()
        nllx.functional.nll_loss(x, target[:3])
        del held

    with pytest.raises(ValueError, match="batch_size"):
        fails()

    hidden = x * 2
    hidden.register_hook(lambda gradient: nllx.functional.nll_loss(gradient, target + 2))
    with pytest.raises(IndexError, match="nll_loss: Target 5"):  # out of a backward that has begun
        nllx.functional.cross_entropy(hidden, target).backward()
    nllx.check_errors()
    torch.testing.assert_close(nllx.functional.cross_entropy(x, target), torch.nn.functional.cross_entropy(x, target))


_INTERRUPTED = """
import os, signal, threading, time, torch, nllx
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
logits, target = torch.randn(4096, 8192), torch.randint(8192, (4096,))
expected = nllx.functional.cross_entropy(logits, target)
hits = 0
for delay in (0.002, 0.005, 0.01, 0.02):
    try:  # around the start of the timer too, which takes longer than the delay on a busy machine
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            nllx.functional.cross_entropy_value_and_grad(logits, target)
    except KeyboardInterrupt:
        hits += 1
assert torch.equal(nllx.functional.cross_entropy(logits, target), expected)
print(hits)
"""


def test_interrupts_during_a_call() -> None:
    """KeyboardInterrupt comes when the call is done, and the next one is as ever."""
    run = _python(_INTERRUPTED)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["4"]


def _copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "nllx", folder / "nllx", ignore=shutil.ignore_patterns("__pycache__"))
    (extension,) = (folder / "nllx").glob("_C.*.so")
    return extension


@pytest.mark.parametrize("kept", [0, 30, 100, 0.5, 0.8, 0.99])
def test_damaged_extension(kept: float, tmp_path: Path) -> None:
    """A file that was cut off (a full disk, a copy that broke) is an ImportError, and no crash."""
    extension = _copy_of_the_package(tmp_path)
    size = extension.stat().st_size
    os.truncate(extension, int(kept if kept > 1 else size * kept))
    run = _python("import nllx", tmp_path)
    assert run.returncode == 1, (run.returncode, run.stderr[-500:])
    assert "ImportError" in run.stderr
    assert "is damaged: it has been cut off; rebuild it" in run.stderr, run.stderr[-500:]


def test_read_only_file_system(tmp_path: Path) -> None:
    """The package on a file system that cannot be written, for root neither."""
    _copy_of_the_package(tmp_path)
    # Locals of a mount namespace of its own: gone when the shell ends.
    script = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} && ! touch {tmp_path}/written"
    command = ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, script], capture_output=True).returncode:
        pytest.skip("no right to mount")
    run = subprocess.run(
        [*command, f"{script} && exec {sys.executable} -m nllx"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "self-check         passed" in run.stdout, run.stderr[-500:]


def test_nothing_is_written_beside_the_package(tmp_path: Path) -> None:
    """So that it may be installed where users cannot write."""
    _copy_of_the_package(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = _python("import runpy, nllx; runpy.run_module('nllx', run_name='__main__')", tmp_path)
    assert "self-check         passed" in run.stdout, run.stderr[-500:]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NLLX_CPU_CAPABILITY", "avx1024", "NLLX_CPU_CAPABILITY"),
        ("NLLX_CPU_CAPABILITY", "", None),
        ("NLLX_CPU_KEEP_MEMORY", "no", None),
        ("NLLX_SYNC_ERRORS", "yes", None),
    ],
)
def test_bad_environment_variables(variable: str, value: str, message: str | None) -> None:
    program = "import torch, nllx; print(nllx.functional.cross_entropy(torch.zeros(1, 2), torch.tensor([0])).item())"
    run = _python(program, **{variable: value})
    if message is None:
        assert run.returncode == 0, run.stderr[-500:]
        assert abs(float(run.stdout) - 0.6931) < 1e-3
    else:
        assert run.returncode == 1
        assert message in run.stderr.splitlines()[-1]
