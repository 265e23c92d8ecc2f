"""``python -m nllx``: what was built, what this machine has, and whether the kernels agree with torch here.

Takes a few seconds. On a GPU every kernel family that the plan has for it runs. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

import nllx
from nllx import _C, _families

# Error allowed against torch in float64, as a multiple of the dtype's epsilon, relative to the largest value. In float64
# torch's own error counts too; in half precision log_softmax hands its rounded output to its backward, as torch does.
TOLERANCE = {torch.float64: 64.0, torch.float32: 8.0, torch.bfloat16: 4.0, torch.float16: 4.0}

# Rows and planes, class counts around the vector widths and the GPU kernels' families.
SHAPES = [(5,), (3, 2), (33, 10), (7, 257), (2, 5003), (2, 21, 9, 11), (1, 150, 40)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def devices() -> list[torch.device]:
    """The CPU, and the GPUs that this build has kernels for."""
    found = [torch.device("cpu")]
    if _C.build_info()["cuda"] and torch.cuda.is_available():
        found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return found


def print_build() -> None:
    info = _C.build_info()
    print(f"nllx               {nllx.__version__} ({os.path.dirname(nllx.__file__)})")
    print(f"torch              {torch.__version__} (built against {info['torch']})")
    print(f"compiler           {info['compiler']}")
    print(f"CUDA architectures {info['cuda_architectures'] or 'none: built for CPU only'}")
    print(f"CPU capability     {_C.cpu_capability()}, {torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(d) for d in devices() if d.type == "cuda"]
    print(f"GPUs               {', '.join(names) or 'none'}")
    print(f"CUDA plans         {_C.cuda_plans()} (NLLX_CUDA_PLAN)")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the tolerance, relative to the largest expected value (at least 1)."""
    if actual.shape != expected.shape or not torch.equal(actual.isnan().cpu(), expected.isnan()):
        return float("inf")
    scale = max(1.0, float(expected.nan_to_num().abs().max())) if expected.numel() else 1.0
    difference = (actual.detach().double().cpu() - expected).nan_to_num()
    allowed = scale * torch.finfo(actual.dtype).eps * TOLERANCE[actual.dtype]
    return float(difference.abs().max()) / allowed if expected.numel() else 0.0


def checks(device: torch.device) -> Iterator[tuple[str, float]]:
    """Name and error of each comparison of a loss or gradient with torch's in float64."""
    generator = torch.Generator().manual_seed(0)
    for shape, dtype, reduction in itertools.product(SHAPES, DTYPES, ("mean", "sum", "none")):
        dim = 0 if len(shape) == 1 else 1
        rows = shape[:dim] + shape[dim + 1 :]
        logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        index = torch.randint(0, shape[dim], rows, generator=generator)
        if index.numel() > 2:
            index.view(-1)[1] = -100
        probabilities = torch.rand(shape, generator=generator).to(dtype)
        weight = torch.rand(shape[dim], generator=generator).to(dtype)
        options = [
            (index, None, 0.0),
            (index, weight, 0.1),
            (probabilities, weight, 0.1),
        ]
        for target, w, smoothing in options:
            name = f"cross_entropy {tuple(shape)} {str(dtype)[6:]} {reduction}"
            ours = logits.to(device, copy=True).requires_grad_()
            theirs = logits.to(torch.float64, copy=True).requires_grad_()
            kwargs: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
            moved = None if w is None else w.to(device)
            actual = nllx.functional.cross_entropy(ours, target.to(device), moved, **kwargs)
            wide = target.double() if target.is_floating_point() else target
            expected = torch.nn.functional.cross_entropy(theirs, wide, None if w is None else w.double(), **kwargs)
            yield from compare(name, actual, expected, ours, theirs, dtype)
        ours, theirs = (
            logits.to(device, copy=True).requires_grad_(),
            logits.to(torch.float64, copy=True).requires_grad_(),
        )
        actual = nllx.functional.nll_loss(ours, index.to(device), weight.to(device), reduction=reduction)
        expected = torch.nn.functional.nll_loss(theirs, index, weight.double(), reduction=reduction)
        yield from compare(
            f"nll_loss {tuple(shape)} {str(dtype)[6:]} {reduction}", actual, expected, ours, theirs, dtype
        )
        ours, theirs = (
            logits.to(device, copy=True).requires_grad_(),
            logits.to(torch.float64, copy=True).requires_grad_(),
        )
        actual, expected = nllx.functional.log_softmax(ours, dim), torch.log_softmax(theirs, dim)
        yield from compare(f"log_softmax {tuple(shape)} {str(dtype)[6:]}", actual, expected, ours, theirs, dtype)
        ours, theirs = (
            logits.to(device, copy=True).requires_grad_(),
            logits.to(torch.float64, copy=True).requires_grad_(),
        )
        actual = torch.stack(nllx.functional.softmax_statistics(ours, index.to(device), dim=dim)[:3])  # type: ignore[arg-type]
        yield from compare(
            f"softmax_statistics {tuple(shape)} {str(dtype)[6:]}",
            actual,
            statistics(theirs, index, dim),
            ours,
            theirs,
            dtype,
        )
        ours, theirs = (
            logits.to(device, copy=True).requires_grad_(),
            logits.to(torch.float64, copy=True).requires_grad_(),
        )
        actual = nllx.functional.mse_loss(ours, probabilities.to(device), reduction=reduction)
        expected = torch.nn.functional.mse_loss(theirs, probabilities.double(), reduction=reduction)
        yield from compare(
            f"mse_loss {tuple(shape)} {str(dtype)[6:]} {reduction}", actual, expected, ours, theirs, dtype
        )


def statistics(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Log-probability, logsumexp and entropy of the rows that count, by torch."""
    counts = index != -100
    log_p = torch.log_softmax(x, dim)
    chosen = log_p.gather(dim, index.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    return torch.stack([chosen, x.logsumexp(dim), -(log_p.exp() * log_p).sum(dim)]) * counts


def compare(
    name: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[str, float]]:
    if not expected.detach().abs().max() > torch.finfo(dtype).max:  # a sum that float16 cannot hold is infinite in both
        yield name, error(actual, expected.detach())
    gradient = torch.linspace(0.5, 1.5, max(expected.numel(), 1)).reshape(expected.shape).to(dtype)
    actual.backward(gradient.to(actual.device))
    expected.backward(gradient.double())
    assert ours.grad is not None
    assert theirs.grad is not None
    yield f"{name}, gradient", error(ours.grad, theirs.grad)


def check_families(device: torch.device, small: bool) -> int:
    """Every kernel family on a GPU, after what the device answered; how many differ."""
    answered = _C.cuda_device(device.index)
    print(f"{device!s:<18} " + ", ".join(f"{name} {value or 'none'}" for name, value in answered.items()))
    gpu = {
        "multiprocessors": answered["multiprocessors"],
        "shared_bytes": answered["shared_bytes"],
        "cluster_blocks": answered["cluster_blocks"],
        "async_copies": answered["async_copies"],
        "conservative": _C.cuda_plans() == "conservative",
    }
    return _families.check(device, gpu, small)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m nllx", description=__doc__)
    parser.add_argument("--families", action="store_true", help="only the kernel families of the GPUs")
    parser.add_argument("--small", action="store_true", help="of those the smaller shapes, for sanitizers")
    options = parser.parse_args(arguments)
    print_build()
    wrong = 0
    for device in devices():
        if device.type == "cuda":
            wrong += check_families(device, options.small)
        if options.families:
            continue
        count, worst = 0, 0.0
        for name, value in checks(device):
            count += 1
            worst = max(worst, value)
            if not value <= 1.0:
                wrong += 1
                print(f"  DIFFERS on {device}: {name}: {value:.3g} times the tolerance", file=sys.stderr)
        print(
            f"self-check         {device}: {count} comparisons with torch, largest error {worst:.0%} of the tolerance"
        )
    has_gpu = any(device.type == "cuda" for device in devices())
    if options.families and not has_gpu:
        print("nllx: there is no GPU that this build has kernels for: nothing was checked", file=sys.stderr)
        return 1
    print("self-check         " + (f"{wrong} DIFFER" if wrong else "passed"))
    if wrong and has_gpu:
        print(
            f"The CUDA kernels ran by the {_C.cuda_plans()} plans: docs/limits.md has the way back, under "
            '"If something is wrong on your GPU"',
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
