"""Mixed precision: half-precision logits go into the loss as they are, and the loss comes out in float32.

Under `torch.autocast` torch casts the logits to float32 first, which writes and reads a copy twice their size; nllx reads the
half-precision logits and computes in float32. float16 needs a `GradScaler`, whose scale the gradient carries.

    python examples/mixed_precision.py
"""

import time

import torch
from show import DEVICE, curve, progress, synchronize, table

import nllx

CLASSES, FEATURES, BATCH, STEPS = 8192, 64, 512, 12


def train(name: str, dtype: torch.dtype, package: object) -> tuple[list[float], float]:
    """Losses of all steps, and the median milliseconds of loss and gradient."""
    torch.manual_seed(0)
    net = torch.nn.Linear(FEATURES, CLASSES, device=DEVICE)
    centers = torch.randn(CLASSES, FEATURES, device=DEVICE)
    criterion = package.CrossEntropyLoss()  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-1)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses, times = [], []
    for _ in progress(range(STEPS), name):
        target = torch.randint(64, (BATCH,), device=DEVICE)
        x = centers[target] + 0.3 * torch.randn(BATCH, FEATURES, device=DEVICE)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            logits = net(x)
            assert logits.dtype == dtype
            synchronize()
            start = time.perf_counter()
            loss = criterion(logits, target)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(scaler.scale(loss), logits)
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        assert gradient.dtype == dtype
        logits.backward(gradient)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sorted(times)[len(times) // 2]


rows: list[list[object]] = [["logits", "torch, ms", "nllx, ms", "torch, last loss", "nllx, last loss"]]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    name = str(dtype).removeprefix("torch.")
    theirs = train(f"torch, {name}", dtype, torch.nn)
    ours = train(f"nllx, {name}", dtype, nllx)
    curve(ours[0], f"nllx, {name}")
    rows.append([name, theirs[1], ours[1], theirs[0][-1], ours[0][-1]])
    assert ours[0][-1] < 0.5 * ours[0][0], "it should have learned"
table(rows)
