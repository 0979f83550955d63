"""The prepared scheduler against plain PyTorch: one step per optimizer step that was really taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from accelerator import Accelerator
from oracle import Case, make_data, make_model, sample_losses

KINDS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=12),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[2],
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "warm restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("built", ["before prepare", "after prepare"])
def test_follows_the_steps_taken(kind: str, built: str) -> None:
    case = Case(length=9, steps=2)
    accelerator = Accelerator("cpu", gradient_accumulation_steps=case.steps)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = KINDS[kind](optimizer) if built == "before prepare" else None
    loader = DataLoader(make_data(case), batch_size=case.batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = accelerator.prepare(scheduler if scheduler is not None else KINDS[kind](optimizer))

    plain = torch.optim.SGD(make_model().parameters(), lr=0.1, momentum=0.9)
    expected = KINDS[kind](plain)
    for _ in range(2):
        for x, y, _ in loader:
            with accelerator.accumulate(model):
                accelerator.backward(sample_losses(model, x, y).mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                plain.step()
                expected.step()
            assert scheduler.get_last_lr() == expected.get_last_lr()
            assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            assert optimizer.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]
