"""What the three trainings share: the description of a task, the training loop, and how the loss is measured."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

SEED = 0
WARM_UP_STEPS = 3

# The profiler otherwise writes a line to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass
class Task:
    """A training that is the same for every loss function.

    ``batches`` holds the (input, target) pair of every step in order, on the CPU, so that no run can see other data.
    ``loss_arguments`` go to ``CrossEntropyLoss``, torch's or nllx's. ``evaluate`` maps the trained model and its
    device to named scores on held-out data.
    """

    name: str
    description: str
    batches: Sequence[tuple[Tensor, Tensor]]
    build_model: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    evaluate: Callable[[nn.Module, torch.device], dict[str, float]]
    loss_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """The result of one training: the loss of every step, held-out scores, seconds per step, bytes."""

    losses: list[float]
    scores: dict[str, float]
    forward_times: list[float]
    backward_times: list[float]
    total_time: float
    loss_memory: int
    step_memory: int

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps: the loss of a single batch says little."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def make_reproducible() -> None:
    """Make everything but the loss repeat bit for bit, so that two runs differ by their losses alone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Only a warning, because torch's own loss for images has no deterministic implementation on CUDA.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # TF32 rounds to 11 bits: a last-bit difference in float32 that crosses such a step would grow 8000-fold.
    torch.backends.cudnn.allow_tf32 = False


def train(task: Task, loss_function: Callable[..., nn.Module], label: str, device: torch.device) -> Run:
    """Train ``task`` from ``SEED`` with ``loss_function``, a class with the signature of ``CrossEntropyLoss``."""
    model, optimizer, criterion = _start(task, loss_function, device)
    inputs, target = (tensor.to(device) for tensor in task.batches[0])

    # Measured and warmed up on a model that is thrown away: neither belongs to the training nor to its times.
    for _ in range(WARM_UP_STEPS):
        _step(model, optimizer, criterion, inputs, target)
    optimizer.zero_grad()
    step_memory = peak_memory(lambda: _step(model, optimizer, criterion, inputs, target), device)
    logits = model(inputs).detach().requires_grad_()
    loss_memory = peak_memory(lambda: criterion(logits, target).backward(), device)

    model, optimizer, criterion = _start(task, loss_function, device)
    steps = []
    start = time.perf_counter()
    # The bar is for a terminal; in a log, the caller's one line per training is enough.
    for inputs, target in tqdm(task.batches, desc=label, unit="step", leave=False, disable=None):
        steps.append(_step(model, optimizer, criterion, inputs.to(device), target.to(device)))
    total_time = time.perf_counter() - start
    losses, forward_times, backward_times = (list(column) for column in zip(*steps, strict=True))

    model.eval()
    with torch.no_grad():
        scores = task.evaluate(model, device)
    return Run(losses, scores, forward_times, backward_times, total_time, loss_memory, step_memory)


def _start(
    task: Task, loss_function: Callable[..., nn.Module], device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    torch.manual_seed(SEED)
    model = task.build_model().to(device)
    return model, task.build_optimizer(model), loss_function(**task.loss_arguments).to(device)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, inputs: Tensor, target: Tensor
) -> tuple[float, float, float]:
    """One step of training. Returns the loss and the seconds that its forward and its backward took."""
    output = model(inputs)
    # Cutting the graph at the logits lets the backward pass of the loss be timed apart from the model's.
    logits = output.detach().requires_grad_()
    start = _now(logits.device)
    loss = criterion(logits, target)
    middle = _now(logits.device)
    loss.backward()
    end = _now(logits.device)
    optimizer.zero_grad()
    output.backward(logits.grad)
    optimizer.step()
    return loss.item(), middle - start, end - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(action: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors took at any moment of ``action``, beyond those that existed before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    current = peak = 0
    for _, size in allocations:  # negative when freed
        current += size
        peak = max(peak, current)
    return peak
