"""A loop that is killed at any moment and started again: every sample that it saw, and the weights it ends with.

Dropout, accumulation 2, a shuffled loader, a checkpoint after every micro-batch, every other one in the background.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelerator import Accelerator
from datasets_of_numbers import Sines

BATCH = 4


class Seen:
    def __init__(self) -> None:
        self.samples: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = state["samples"]


class WithIndices(Sines):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index), index


def train(
    strategy: Any, folder: str | Path, length: int, begin: Callable[[int], object]
) -> tuple[list[Tensor], list[int]]:
    """Go on from `folder` to the end of one epoch of `length` samples; `begin` is called with the rank before.

    Returns the weights, and the samples in the order in which they were seen.
    """
    accelerator = Accelerator(strategy, project_dir=folder, seed=0, split_batches=True, gradient_accumulation_steps=2)
    net = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(WithIndices(length, 16), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    seen = Seen()
    accelerator.register_for_checkpointing(seen)
    begin(accelerator.process_index)
    accelerator.resume()
    while loader.state_dict()["epoch"] < 1:
        for x, index in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            seen.samples = seen.samples + accelerator.gather_for_metrics(index).tolist()
            place = Path(folder) / "checkpoints" / f"step-{len(seen.samples):09d}"
            accelerator.save_state(place, keep_last=2, async_=len(seen.samples) % (2 * BATCH) == 0)
    weights = [value.clone() for value in accelerator.get_state_dict(model).values()]
    accelerator.end_training()
    return weights, seen.samples
