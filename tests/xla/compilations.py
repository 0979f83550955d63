"""Loops that compile too often, or read inside a window, as a script: prints the warnings of each as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from accelerator import Accelerator
from training import BATCH, MODES, each_loss, make_data, make_net, make_sgd

Change = Callable[[int, Tensor], Tensor]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def warnings_of(loop: Callable[[Accelerator, Any, Any, Any], None], length: int = 12 * BATCH, **options: Any) -> Any:
    kept = Kept()
    logging.getLogger("accelerator").addHandler(kept)
    accelerator = Accelerator(MODES[sys.argv[1]], **options)
    net = make_net()
    loader = DataLoader(make_data(length), batch_size=BATCH, drop_last=options.get("drop_last", False))
    loop(accelerator, *accelerator.prepare(net, make_sgd(net), loader))
    accelerator.end_training()
    logging.getLogger("accelerator").removeHandler(kept)
    return kept.messages


def steady(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    """Two epochs with a short last batch, values read where they should be, an evaluation in between."""
    for _ in range(2):
        losses = []
        for x, y, _ in loader:
            with accelerator.accumulate(model):
                loss = each_loss(model, x, y).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                losses[-1].item()
        torch.stack(losses).mean().item()
        test_loader = accelerator.prepare(DataLoader(make_data(19), batch_size=BATCH))
        with torch.no_grad():
            for x, y, _ in test_loader:
                each_loss(model, x, y).mean().item()


def reading(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            loss = each_loss(model, x, y).mean()
            loss.item()  # the line to be named
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def printing(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    for x, y, _ in loader:
        with accelerator.accumulate(model):
            loss = each_loss(model, x, y).mean()
            print(loss, file=sys.stderr)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def changing_shapes(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    samples = [(torch.randn(n, 32), torch.randn(n, 32)) for n in (4, 4, 4, 4, 4, 5, 6, 7, 8, 5)]
    lengths = DataLoader(samples, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    for x, y in accelerator.prepare(lengths):
        with accelerator.accumulate(model):
            accelerator.backward(each_loss(model, x, y).mean())
            optimizer.step()
            optimizer.zero_grad()


def changing_number(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
    for number, (x, y, _) in enumerate(loader):
        with accelerator.accumulate(model):
            accelerator.backward(each_loss(model, x, y)[: 2 + number % 7].mean())
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    results = {
        "steady": warnings_of(steady, 12 * BATCH + 3),
        "steady windows": warnings_of(steady, 17 * BATCH + 3, gradient_accumulation_steps=3),
        "reading": warnings_of(reading),
        "printing": warnings_of(printing),
        "shapes": warnings_of(changing_shapes),
        "number": warnings_of(changing_number),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
