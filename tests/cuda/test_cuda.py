"""What is particular to GPUs: errors that arrive later, streams, graphs, synchronisation and memory."""

from __future__ import annotations

import concurrent.futures
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import Case, Problem, build
from gpus import GPUS
from oracle import answer
from torch import Tensor
from torch.testing import assert_close

import nllx
from nllx import _C

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if not _C.build_info()["cuda"]:
    pytest.skip("nllx was built without CUDA", allow_module_level=True)

_KINDS = [
    Case("rows", "", (64, 1000), ignored="some", weight="positive", label_smoothing=0.1),
    Case("rows_none", "", (64, 1000), reduction="none"),
    Case("wide_rows", "", (8, 50257), dtype=torch.bfloat16, ignored="some"),
    Case("cluster_rows", "", (64, 50257), dtype=torch.bfloat16, ignored="some"),
    Case("planes", "", (4, 21, 33, 35), ignored="some", weight="positive"),
    Case("probabilities", "", (64, 1000), target="probabilities"),
    Case("nll_loss", "", (64, 1000), op="nll_loss", weight="positive"),
    Case("log_softmax", "", (64, 1000), op="log_softmax"),
    Case("log_softmax_clusters", "", (16, 128256), op="log_softmax"),
]
_kinds = pytest.mark.parametrize("case", _KINDS, ids=str)


@pytest.fixture(autouse=True)
def _no_pending_error() -> Iterator[None]:
    yield
    nllx.check_errors()


@pytest.mark.parametrize("index", range(torch.cuda.device_count()))
def test_what_the_device_answers(index: int) -> None:
    """…is what its architecture has: clusters that one failed query has taken away would only show in the time."""
    device, properties = _C.cuda_device(index), torch.cuda.get_device_properties(index)
    assert device["multiprocessors"] == properties.multi_processor_count
    assert device["async_copies"] == (properties.major >= 8)
    known = GPUS.get(f"sm_{properties.major}{properties.minor}")
    if known:
        assert device["shared_bytes"] == known.shared_bytes
    # Code for sm_90 or later may not have been built.
    built = [int(name) for name in re.findall(r"\d+", _C.build_info()["cuda_architectures"].replace(".", ""))]
    if properties.major >= 9 and max(built, default=90) >= 90:
        assert (device["cluster_blocks"], device["cluster_error"]) == (8, "")
    else:
        assert device["cluster_blocks"] == 1
        assert device["cluster_error"]


def _step(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input alone: the path of the kernels."""
    x = problem.input.detach().requires_grad_()
    output = Problem(problem.case, x, problem.target, problem.weight).call(nllx.functional)
    return output.detach(), torch.autograd.grad(output, x, torch.ones_like(output))[0]


@pytest.mark.parametrize("op", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 2000), (5, 7, 3)])
@pytest.mark.parametrize("value", [7_000, -1, 2**32 + 1])
def test_target_out_of_range(op: str, shape: tuple[int, ...], value: int) -> None:
    """A NaN loss and a zero gradient of that row alone; the error comes with check_errors or the next call."""
    function = getattr(nllx.functional, op)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device="cuda")
    expected = torch.autograd.grad(function(x, target, reduction="none").sum(), x)[0]
    target[3] = value
    loss = function(x, target, reduction="none")
    assert loss[3].isnan().all()
    assert loss[:3].isfinite().all()
    with pytest.raises(IndexError, match=rf"Target {value} is out of bounds"):
        nllx.check_errors()
    nllx.check_errors()  # once
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=rf"Target {value} is out of bounds"):
        function(x, target.clamp(0, 1))
    assert (gradient[3] == 0).all()
    assert torch.equal(gradient[:3], expected[:3])
    assert torch.equal(gradient[4], expected[4])


# Larger than the table of cases: rows, tiles and planes of which a block has many, or a cluster one.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape", [(64, 50257), (300, 40001), (300, 130_000), (40, 262_144), (700_000, 10), (8, 21, 512, 512)], ids=str
)
def test_large_problems(shape: tuple[int, ...], smoothing: float, dtype: torch.dtype) -> None:
    """Loss and gradient by both ways against torch in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device="cuda", generator=generator).mul_(3).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda", generator=generator)
    target.view(-1)[::7] = -100
    options = {"reduction": "sum", "label_smoothing": smoothing}
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, target, **options)
    expected.backward()
    loss = nllx.functional.cross_entropy(x, target, **options)
    loss.backward()
    in_place = x.detach().clone()
    value, _ = nllx.functional.cross_entropy_value_and_grad(in_place, target, out=in_place, **options)
    for got, gradient in ((loss, x.grad), (value, in_place)):
        assert_close(got.detach().double(), expected.detach(), rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert_close(gradient.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("plans", ["default", "conservative"])
def test_kernel_families(plans: str) -> None:
    environment = {**os.environ, "NLLX_CUDA_PLAN": plans}
    command = [sys.executable, "-m", "nllx", "--families", "--small"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"CUDA plans         {plans}" in run.stdout
    assert ("cluster," in run.stdout) == (plans == "default" and torch.cuda.get_device_capability() >= (9, 0))


def test_errors_at_once() -> None:
    code = """
import torch, nllx
x = torch.randn(3, 5, device="cuda")
try:
    nllx.functional.cross_entropy(x, torch.tensor([0, 5, 1], device="cuda"))
except IndexError as error:
    assert "Target 5 is out of bounds" in str(error)
else:
    raise SystemExit("no error")
print(nllx.functional.cross_entropy(x, torch.tensor([0, 4, 1], device="cuda")).item())
"""
    environment = {**os.environ, "NLLX_SYNC_ERRORS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_after_a_launch_that_is_cut_off() -> None:
    """…nothing is computed any more: a count that it has left behind is never added to."""
    code = """
import torch, nllx
x, t = torch.randn(512, 1000, device="cuda"), torch.zeros(512, dtype=torch.int64, device="cuda")
expected = torch.nn.functional.cross_entropy(x, t)
torch.testing.assert_close(nllx.functional.cross_entropy(x, t), expected)
torch.nn.functional.cross_entropy(x, t + 5000)  # ends in an assertion on the device
for _ in range(2):
    try:
        print(nllx.functional.cross_entropy(x, t).item())
    except RuntimeError:
        continue
    raise SystemExit("a loss after the context has ended")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@_kinds
def test_no_synchronisation(case: Case) -> None:
    problem = build(case, "cuda")
    _step(problem)  # what is allocated or looked up once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@_kinds
def test_graph_capture(case: Case) -> None:
    problem = build(case, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(problem)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(problem)
    for _ in range(2):
        problem.input.copy_(torch.randn_like(problem.input))
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, _step(problem), strict=True))


@pytest.mark.parametrize("shape", [(512, 1000), (4096, 10), (64, 32000)], ids=str)
def test_compiled_with_cuda_graphs(shape: tuple[int, int]) -> None:
    """Of several chunks, whose blocks count each other in memory that outlives the graph's."""
    x, t = torch.randn(shape, device="cuda"), torch.randint(shape[1], shape[:1], device="cuda")
    compiled = torch.compile(nllx.functional.cross_entropy, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        loss, expected = compiled(ours, t), torch.nn.functional.cross_entropy(theirs, t)
        loss.backward()
        expected.backward()
        assert_close(loss.detach().clone(), expected.detach())
        assert_close(ours.grad, theirs.grad)
        assert_close(nllx.functional.cross_entropy(x, t), expected.detach())  # beside the graph, on the same stream


def test_in_a_pool_of_memory_that_ends() -> None:
    x, t = torch.randn(512, 1000, device="cuda"), torch.zeros(512, dtype=torch.int64, device="cuda")
    expected = torch.nn.functional.cross_entropy(x, t)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            assert_close(nllx.functional.cross_entropy(x, t), expected)
        del pool
        others = [torch.full((1 << 18,), -1, dtype=torch.int32, device="cuda") for _ in range(16)]
        assert_close(nllx.functional.cross_entropy(x, t), expected)
        del others


@_kinds
def test_current_stream(case: Case) -> None:
    """The kernels wait for what came before them in their stream, and for nothing else."""
    problem = build(case, "cuda")
    expected = _step(problem)
    later = Problem(case, torch.zeros_like(problem.input), problem.target, problem.weight)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        later.input.copy_(problem.input)
        got = _step(later)
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@_kinds
def test_many_streams_at_once(case: Case) -> None:
    """What kernels keep between calls belongs to a stream: those of others may run at the same time."""
    problem = build(case, "cuda")
    expected = _step(problem)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]

    def steps(stream: torch.cuda.Stream) -> list[tuple[Tensor, Tensor]]:
        with torch.cuda.stream(stream):
            results = [_step(problem) for _ in range(20)]
            stream.synchronize()
        return results

    with concurrent.futures.ThreadPoolExecutor(len(streams)) as threads:
        for results in threads.map(steps, streams):
            for got in results:
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_threads_with_other_numbers_of_classes() -> None:
    """What a kernel may use of the chip is set for the process: a thread's launch may not take it from another's."""
    torch.cuda.synchronize()

    def train(classes: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.randn(300, classes, device="cuda", dtype=torch.bfloat16)
            target = torch.randint(classes, (300,), device="cuda")
            results = [nllx.functional.cross_entropy_value_and_grad(x, target) for _ in range(200)]
            return all(torch.equal(a, b) for got in results for a, b in zip(got, results[0], strict=True))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(train, [2500, 32000, 10, 32, 50257, 9000]))


def test_backward_in_another_stream() -> None:
    """Autograd runs the backward in the stream of its forward, and the caller's stream waits for it."""
    problem = build(_KINDS[0], "cuda")
    expected = _step(problem)
    x = problem.input.detach().requires_grad_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        output = Problem(problem.case, x, problem.target, problem.weight).call(nllx.functional)
        torch.cuda.current_stream().synchronize()
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert torch.equal(output.detach(), expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one() -> None:
    case = _KINDS[0]
    expected = answer(build(case, "cuda:0"), nllx.functional)
    got = answer(build(case, "cuda:1"), nllx.functional)
    assert got.output.device.index == 1
    assert_close(got.output.cpu(), expected.output.cpu(), rtol=0, atol=0)
    assert torch.cuda.current_device() == 0


def test_mixed_devices() -> None:
    x, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for call in (
        lambda: nllx.functional.cross_entropy(x.cuda(), t),
        lambda: nllx.functional.cross_entropy(x, t.cuda()),
        lambda: nllx.functional.nll_loss(x.cuda(), t.cuda(), torch.ones(5)),
        lambda: nllx.functional.cross_entropy(x.cuda(), x.softmax(1)),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_forward_allocates_no_log_probabilities(reduction: str) -> None:
    x, t = torch.randn(1024, 32000, device="cuda"), torch.zeros(1024, dtype=torch.int64, device="cuda")
    nllx.functional.cross_entropy(x, t, reduction=reduction)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nllx.functional.cross_entropy(x, t, reduction=reduction)
    assert torch.cuda.max_memory_allocated() - before < x.numel() * x.element_size() // 100
