"""What the wrapper costs per step on one process: ratios to the hand-written loop.

Accumulation 4, AdamW, LambdaLR, batches of 8, loader included; thread CPU time, so that other load on the
machine counts less. Run: python tests/benchmarks/bench_step.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from interleaved import ratios
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 4
BATCH = 8
NUM_BATCHES = 60


def parts(layers: int, width: int) -> tuple[nn.Module, Any, Any, DataLoader[Any], Callable[..., torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    data = TensorDataset(torch.randn(NUM_BATCHES * BATCH, width), torch.randn(NUM_BATCHES * BATCH, width))
    return model, optimizer, scheduler, DataLoader(data, batch_size=BATCH), nn.functional.mse_loss


def by_hand(layers: int, width: int) -> Callable[[], None]:
    model, optimizer, scheduler, loader, loss_fn = parts(layers, width)

    def run() -> None:
        for index, (x, y) in enumerate(loader):
            loss = loss_fn(model(x), y)
            (loss / STEPS).backward()
            if (index + 1) % STEPS == 0 or index + 1 == len(loader):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    return run


def with_accumulate(accelerator: Any, layers: int, width: int) -> Callable[[], None]:
    model, optimizer, scheduler, loader, loss_fn = parts(layers, width)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def run() -> None:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    return run


def with_fabric(layers: int, width: int) -> Callable[[], None]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer, scheduler, loader, loss_fn = parts(layers, width)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)

    def run() -> None:
        for index, (x, y) in enumerate(loader):
            closing = (index + 1) % STEPS == 0 or index + 1 == len(loader)
            with fabric.no_backward_sync(model, enabled=not closing):
                loss = loss_fn(model(x), y)
                fabric.backward(loss / STEPS)
            if closing:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    return run


def main() -> None:
    import accelerate

    from accelerator import Accelerator

    torch.set_num_threads(1)
    for layers, width in ((8, 32), (2, 8)):
        print(f"MLP of {layers} layers of {width}")
        arms = {
            "by hand": by_hand(layers, width),
            "torch-accelerator": with_accumulate(Accelerator("cpu", gradient_accumulation_steps=STEPS), layers, width),
            "Accelerate": with_accumulate(
                accelerate.Accelerator(cpu=True, gradient_accumulation_steps=STEPS), layers, width
            ),
            "Fabric": with_fabric(layers, width),
        }
        ratios(arms, baseline="by hand", rounds=101, clock=time.thread_time)


if __name__ == "__main__":
    main()
