"""Per-sample gradients with `torch.func.vmap`, clipped one by one: the step of differentially private training.

DP-SGD (Abadi et al., 2016) clips the gradient of each sample to a norm, adds them up, and adds noise. `vmap(grad(loss))`
gives all of them in one call; the loss of all samples is one call of nllx's kernels.

    python examples/per_sample_gradients.py
"""

import time

import torch
from show import DEVICE, curve, progress, synchronize, table
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap

import nllx

CLASSES, FEATURES, SAMPLES, STEPS, CLIP, NOISE = 10, 32, 256, 80, 1.0, 0.01

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.Tanh(), torch.nn.Linear(64, CLASSES)).to(DEVICE)
parameters = {name: p.detach() for name, p in net.named_parameters()}
truth = torch.randn(CLASSES, FEATURES, device=DEVICE)


def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
    """Of one sample."""
    return nllx.functional.cross_entropy(functional_call(net, parameters, (x,)), target)


gradients = vmap(grad_and_value(loss), in_dims=(None, 0, 0))
losses, norms = [], []
for _ in progress(range(STEPS), "clipped steps"):
    x = torch.randn(SAMPLES, FEATURES, device=DEVICE)
    target = (x @ truth.T).argmax(1)
    each, values = gradients(parameters, x, target)
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    scale = (CLIP / norm.clamp(min=1e-12)).clamp(max=1)
    for name, g in each.items():
        step = (g * scale.view(-1, *[1] * (g.dim() - 1))).sum(0) + NOISE * CLIP * torch.randn_like(g[0])
        parameters[name] = parameters[name] - 2.0 / SAMPLES * step
    losses.append(values.mean().item())
    norms.append(norm.median().item())


def milliseconds(package: object) -> float:
    """The best of a few calls for the gradients with respect to logits of many samples."""
    logits, target = torch.randn(4096, 1000, device=DEVICE), torch.randint(1000, (4096,), device=DEVICE)
    function = vmap(grad(package.cross_entropy))  # type: ignore[attr-defined]
    best = float("inf")
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        function(logits, target)
        synchronize()
        best = min(best, 1e3 * (time.perf_counter() - start))
    return best


curve(losses, "loss")
curve(norms, "median norm")
ours, theirs = milliseconds(nllx.functional), milliseconds(torch.nn.functional)
table([["vmap(grad), 4096 × 1000", "ms"], ["torch", theirs], ["nllx", ours]])
assert losses[-1] < 0.7 * losses[0], "it should have learned"
