"""Every scheduler of torch goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from accelerator import Accelerator
from strategies import CPU

ARGUMENTS: dict[str, Any] = {
    "LambdaLR": lambda optimizer: {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": lambda optimizer: {"lr_lambda": lambda step: 0.9},
    "StepLR": lambda optimizer: {"step_size": 2},
    "MultiStepLR": lambda optimizer: {"milestones": [3, 5, 5]},
    "ConstantLR": lambda optimizer: {},
    "LinearLR": lambda optimizer: {},
    "ExponentialLR": lambda optimizer: {"gamma": 0.9},
    "CosineAnnealingLR": lambda optimizer: {"T_max": 5},
    "CosineAnnealingWarmRestarts": lambda optimizer: {"T_0": 3},
    "CyclicLR": lambda optimizer: {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": lambda optimizer: {"max_lr": 0.5, "total_steps": 20},
    "PolynomialLR": lambda optimizer: {},
    "ReduceLROnPlateau": lambda optimizer: {"patience": 1},
    "ChainedScheduler": lambda optimizer: {"schedulers": parts(optimizer)},
    "SequentialLR": lambda optimizer: {"schedulers": parts(optimizer), "milestones": [3]},
}
CLASSES = [name for name in lr_scheduler.__all__ if name != "LRScheduler"]


def parts(optimizer: Any) -> list[Any]:
    return [lr_scheduler.ConstantLR(optimizer, total_iters=2), lr_scheduler.MultiStepLR(optimizer, [2, 5, 5])]


class Run:
    def __init__(self, name: str) -> None:
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = getattr(lr_scheduler, name)(optimizer=optimizer, **ARGUMENTS[name](optimizer))
        self.accelerator = Accelerator(CPU(), timers=False)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(net, optimizer, scheduler)
        self.metric = [1.0] if name == "ReduceLROnPlateau" else []

    def rates(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            self.accelerator.backward(self.model(torch.ones(1, 2)).sum())
            self.optimizer.step()
            self.scheduler.step(*self.metric)
            self.optimizer.zero_grad()
            found.append(float(self.optimizer.param_groups[0]["lr"]))
        return found


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_it_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    first = Run(name)
    before = first.rates(2)
    first.accelerator.save_state(tmp_path / "saved")
    after = first.rates(6)
    assert len({*before, *after}) > 1  # it does something
    second = Run(name)
    second.accelerator.load_state(tmp_path / "saved")
    assert second.rates(6) == after
