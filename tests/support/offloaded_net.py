"""The small network of blocks with its weights on the disk, and what is trained beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from accelerator.bigmodel import init_empty_weights, load_checkpoint_and_dispatch
from blocks_net import Net


def offloaded(folder: Path, **options: object) -> Net:
    with init_empty_weights():
        model = Net()
    return load_checkpoint_and_dispatch(model, folder, {"": "disk"}, **options)  # type: ignore[arg-type, return-value]


def check_equal(model: nn.Module, expected: nn.Module, times: int = 3) -> None:
    for seed in range(times):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))


class Adapted(nn.Module):
    """A frozen model with something trainable beside each of its blocks."""

    def __init__(self, base: Net) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        torch.manual_seed(7)
        self.adapters = nn.ModuleList(nn.Linear(8, 8) for _ in base.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base.first(x)
        for layer, adapter in zip(self.base.layers, self.adapters, strict=True):
            x = layer(x) + adapter(x)
        return self.base.head(x).squeeze(1)


def train(model: Adapted, steps: int = 4) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.adapters.parameters(), lr=0.05)
    losses = []
    for seed in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(parameter.detach() for parameter in model.adapters.parameters())]
