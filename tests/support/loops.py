"""What the tests of windows share: a prepared loop's parts, and the plain loop that it must equal."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerator import Accelerator
from oracle import Case, flat, make_data, make_model, sample_losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)


def prepared(case: Case) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator("ddp" if case.world > 1 else "cpu", gradient_accumulation_steps=case.steps)
    model = make_model()
    return accelerator, *accelerator.prepare(model, sgd(model), DataLoader(make_data(case), batch_size=case.batch_size))


def train_plain(case: Case, windows: list[list[int]] | None = None) -> Tensor:
    """The oracle: one step for each window of samples, those of the case unless others are given."""
    model, (x, y, _) = make_model(), make_data(case).tensors
    optimizer = sgd(model)
    if windows is None:
        windows = [list(chain(*window)) for window in case.windows()]
    for samples in windows:
        optimizer.zero_grad()
        sample_losses(model, x[samples], y[samples]).mean().backward()
        optimizer.step()
    return flat(model)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def step(accelerator: Accelerator, model: Any, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """One micro-batch."""
    with accelerator.accumulate(model):
        accelerator.backward(sample_losses(model, x, y).mean())
        optimizer.step()
        optimizer.zero_grad()
