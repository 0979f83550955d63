"""What the wrapper costs per step on two DDP processes: ratios to the hand-written DDP loop.

An MLP of 12 layers of 512, accumulation 4, AdamW, batches of 8 per process, loader included; wall time.
Run: python tests/benchmarks/bench_ddp.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from interleaved import ratios_over_ranks, start_two
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

STEPS, BATCH, NUM_BATCHES, LAYERS, WIDTH = 4, 8, 16, 12, 512


def parts() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(LAYERS) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])
    num_samples = NUM_BATCHES * BATCH * dist.get_world_size()
    return model, TensorDataset(torch.randn(num_samples, WIDTH), torch.randn(num_samples, WIDTH))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def by_hand() -> Callable[[], None]:
    module, data = parts()
    model = nn.parallel.DistributedDataParallel(module)
    optimizer = optimizer_of(model)
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))

    def run() -> None:
        for index, (x, y) in enumerate(loader):
            closing = (index + 1) % STEPS == 0
            model.require_backward_grad_sync = closing
            loss = nn.functional.mse_loss(model(x), y)
            (loss / STEPS).backward()
            if closing:
                optimizer.step()
                optimizer.zero_grad()

    return run


def with_accumulate(accelerator: Any) -> Callable[[], None]:
    module, data = parts()
    model, optimizer, loader = accelerator.prepare(module, optimizer_of(module), DataLoader(data, batch_size=BATCH))

    def run() -> None:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    return run


def with_fabric() -> Callable[[], None]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    module, data = parts()
    model, optimizer = fabric.setup(module, optimizer_of(module))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=BATCH))

    def run() -> None:
        for index, (x, y) in enumerate(loader):
            closing = (index + 1) % STEPS == 0
            with fabric.no_backward_sync(model, enabled=not closing):
                loss = nn.functional.mse_loss(model(x), y)
                fabric.backward(loss / STEPS)
            if closing:
                optimizer.step()
                optimizer.zero_grad()

    return run


def worker() -> None:
    import accelerate

    from accelerator import Accelerator

    torch.set_num_threads(1)
    ours = Accelerator("ddp", gradient_accumulation_steps=STEPS)  # joins the process group that all arms use
    arms = {
        "by hand": by_hand(),
        "by hand, again": by_hand(),  # what two of the same differ by
        "torch-accelerator": with_accumulate(ours),
        "Accelerate": with_accumulate(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=STEPS)),
        "Fabric": with_fabric(),
    }
    ratios_over_ranks(arms, baseline="by hand", rounds=61)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker()
    else:
        print(f"DDP, 2 processes, MLP of {LAYERS} layers of {WIDTH}")
        start_two(__file__)
