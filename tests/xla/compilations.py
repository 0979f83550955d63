"""Loops that compile too often, or read inside a window: the warnings of each, and whether it raised."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from accelerator import Accelerator
from strategies import XLA
from training import BATCH, each_loss, make_data, make_net, make_sgd, steps

Loop = Callable[[Accelerator, Any, Any, Any], None]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def warnings_of(strategy: XLA, loop: Loop, length: int = 12 * BATCH, **options: Any) -> list[str]:
    kept = Kept()
    logging.getLogger("accelerator").addHandler(kept)
    accelerator = Accelerator(strategy, **options)
    net = make_net()
    loader = DataLoader(make_data(length), batch_size=BATCH)
    try:
        loop(accelerator, *accelerator.prepare(net, make_sgd(net), loader))
    except RuntimeError as error:
        kept.messages.append(" ".join([f"raised {error}", *getattr(error, "__notes__", ())]))
    accelerator.end_training()
    logging.getLogger("accelerator").removeHandler(kept)
    return kept.messages


def steady(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """Two epochs with a short last batch, values read where they should be, an evaluation in between."""
    for _ in range(2):
        losses = []
        for each in steps(accelerator, model, optimizer, loader):
            losses.append(each.mean())
            if accelerator.sync_gradients:
                losses[-1].item()
        torch.stack(losses).mean().item()
        test_loader = accelerator.prepare(DataLoader(make_data(19), batch_size=BATCH))
        with torch.no_grad():
            for x, y, _ in test_loader:
                each_loss(model, x, y).mean().item()


def evaluating_inside(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """An evaluation that reads values while a window is open, and a look at the data that is left by break."""
    test_loader = accelerator.prepare(DataLoader(make_data(19), batch_size=BATCH))
    for number, _ in enumerate(steps(accelerator, model, optimizer, loader)):
        if number == 1:
            with torch.no_grad():
                for x, y, _ in test_loader:
                    each_loss(model, x, y).mean().item()
    x, *_ = next(iter(loader))
    x.sum().item()


def saving(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """Checkpoints, most of them inside a window."""
    with tempfile.TemporaryDirectory() as folder:
        for number, _ in enumerate(steps(accelerator, model, optimizer, loader)):
            if number % 3 == 1 or number % 7 == 0:
                accelerator.save_state(Path(folder) / str(number))


def reading(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    def read(loss: Tensor) -> None:
        loss.item()  # the line to be named

    run(steps(accelerator, model, optimizer, loader, inside=read))


def reading_now_and_then(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    def loss_of(each: Tensor, number: int) -> Tensor:
        if number % 10 == 9:
            float(each.mean())  # the line to be named
        return each.mean()

    run(steps(accelerator, model, optimizer, loader, loss_of=loss_of))


def masking(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """An operation whose result is as long as its values say, where gradients are off but nothing is evaluated."""

    def read(loss: Tensor) -> None:
        with torch.no_grad():
            loss.expand(4)[loss.expand(4) > 0]  # the line to be named

    run(steps(accelerator, model, optimizer, loader, inside=read))


def printing(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    run(steps(accelerator, model, optimizer, loader, inside=lambda loss: print(loss, file=sys.stderr)))


def changing_shapes(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    samples = [(torch.randn(n, 32), torch.randn(n, 32)) for n in (4, 4, 4, 4, 4, 5, 6, 7, 8, 5)]
    lengths = DataLoader(samples, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    run(steps(accelerator, model, optimizer, accelerator.prepare(lengths)))


def changing_number(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    def loss_of(each: Tensor, number: int) -> Tensor:
        return each[: 2 + number % 7].mean()

    run(steps(accelerator, model, optimizer, loader, loss_of=loss_of))


def run(loop: Any) -> None:
    for _ in loop:
        pass


def loops(strategy: XLA) -> Any:
    forbidding = replace(strategy, full_graph=True)
    return {
        "steady": warnings_of(strategy, steady, 12 * BATCH + 3),
        "steady windows": warnings_of(strategy, steady, 17 * BATCH + 3, gradient_accumulation_steps=3),
        "steady, forbidden to read": warnings_of(forbidding, steady, 12 * BATCH + 3),
        "evaluating, forbidden to read": warnings_of(forbidding, evaluating_inside, gradient_accumulation_steps=3),
        "saving, forbidden to read": warnings_of(forbidding, saving, 21 * BATCH, gradient_accumulation_steps=3),
        "reading": warnings_of(strategy, reading),
        "reading, forbidden": warnings_of(forbidding, reading),
        "reading now and then": warnings_of(strategy, reading_now_and_then, 33 * BATCH),
        "masking": warnings_of(strategy, masking),
        "printing": warnings_of(strategy, printing),
        "shapes": warnings_of(strategy, changing_shapes),
        "number": warnings_of(strategy, changing_number),
    }
