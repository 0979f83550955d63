"""Observers are told what happens in a loop, in order, and a loop without them is as before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accelerator import Accelerator
from strategies.observer import Observer

EVENTS = [name for name in vars(Observer) if not name.startswith("_")]


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        return self._note(name) if name in EVENTS else super().__getattribute__(name)

    def _note(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.lines.append(name)


def loop(accelerator: Accelerator, diary: Any, *, scale: float = 1.0, clip: bool = True) -> list[Any]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(6, 2) * scale), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator._accumulation.observers.append(diary)
    for (x,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            if clip:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return diary.lines


def test_the_events_of_a_loop_come_in_order() -> None:
    open_one = ["batch_wanted", "batch_taken", "micro_batch_begun", "backward_begun", "backward_ended"]
    update = ["gradients_ready", "gradients_clipped", "update_begun", "update_ended"]
    told = loop(Accelerator("cpu", gradient_accumulation_steps=2), Diary())
    closed = [*open_one, *update, "micro_batch_ended"]
    assert told == [*open_one, "micro_batch_ended", *closed, *closed, "batch_wanted"]


class Outcomes(Observer):
    """Writes down which updates were taken."""

    def __init__(self) -> None:
        self.lines: list[bool] = []

    def update_ended(self, optimizer: Any, taken: bool) -> None:
        self.lines.append(taken)


def test_a_skipped_update_is_told_as_one() -> None:
    assert loop(Accelerator("cpu", mixed_precision="fp16"), Outcomes(), scale=math.inf, clip=False) == [False] * 3


def test_an_exception_is_told_and_goes_on_its_way() -> None:
    accelerator, diary = Accelerator("cpu"), Diary()
    model = accelerator.prepare(nn.Linear(2, 1))
    accelerator._accumulation.observers.append(diary)
    with pytest.raises(KeyError), accelerator.accumulate(model):
        raise KeyError("lost")
    assert diary.lines == ["micro_batch_begun", "raised"]
