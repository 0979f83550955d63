"""What the wrapper costs per step on two FSDP processes, and clipping sharded gradients against torch's own.

Twelve blocks of two layers of 512, accumulation 4, AdamW, batches of 8 per process, loader included; then the
gradients of 150 parameters clipped. Neither Accelerate nor Fabric shards on a CPU. Wall time, two processes.
Run: python tests/benchmarks/bench_fsdp.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from interleaved import ratios_over_ranks, start_two
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from accelerator import Accelerator
from strategies import FSDP, clipping

STEPS, BATCH, NUM_BATCHES, DEPTH, WIDTH = 4, 8, 16, 12, 512


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def parts() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    num_samples = NUM_BATCHES * BATCH * dist.get_world_size()
    data = TensorDataset(torch.randn(num_samples, WIDTH), torch.randn(num_samples, WIDTH))
    return nn.Sequential(*[Block(WIDTH) for _ in range(DEPTH)]), data


def by_hand() -> Callable[[], None]:
    model, data = parts()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(data, batch_size=BATCH, sampler=DistributedSampler(data, shuffle=False))

    def run() -> None:
        for index, (x, y) in enumerate(loader):
            closing = (index + 1) % STEPS == 0
            model.set_requires_gradient_sync(closing)  # type: ignore[operator]
            loss = nn.functional.mse_loss(model(x), y)
            (loss / STEPS).backward()
            if closing:
                optimizer.step()
                optimizer.zero_grad()

    return run


def prepared(accelerator: Accelerator) -> Callable[[], None]:
    module, data = parts()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(module, optimizer, DataLoader(data, batch_size=BATCH))

    def run() -> None:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    return run


def clips() -> dict[str, Callable[[], None]]:
    """150 parameters of 128 x 128 with gradients, cut over the ranks."""
    model = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(150)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def of_torch() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).full_tensor()  # type: ignore[attr-defined]

    return {"torch": of_torch, "torch-accelerator": lambda: clipping.clip_grad_norm(parameters, 1.0) and None}


def worker() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(FSDP(), gradient_accumulation_steps=STEPS)  # joins the process group that all arms use
    arms = {"by hand": by_hand(), "torch-accelerator": prepared(accelerator)}
    ratios_over_ranks(arms, baseline="by hand", rounds=61)
    accelerator.print("clip_grad_norm_, 150 sharded parameters")
    ratios_over_ranks(clips(), baseline="torch", rounds=61)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker()
    else:
        print(f"FSDP, 2 processes, {DEPTH} blocks of two layers of {WIDTH}")
        start_two(__file__)
