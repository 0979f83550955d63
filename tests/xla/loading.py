"""Datasets that fail, in the loop's process and in forked workers: what comes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from accelerator import Accelerator
from strategies import XLA, DataError


class Failing(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise ValueError("sample 7 cannot be read")
        return torch.full((4,), float(index))


def exceptions(strategy: XLA) -> Any:
    """How many batches come before the dataset's own exception, without and with forked workers."""
    found = {}
    for num_workers in (0, 2):
        accelerator = Accelerator(strategy)
        loader = accelerator.prepare(DataLoader(Failing(), batch_size=2, num_workers=num_workers))
        number = 0
        try:
            for _ in loader:
                number += 1
        except ValueError as error:
            found[num_workers] = [number, "sample 7 cannot be read" in str(error)]
    return found


class OnTheDevice(Dataset[Any]):
    """What no dataset should be: samples that are on the device already."""

    def __init__(self, samples: Tensor) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]


def workers(strategy: XLA) -> Any:
    """What a forked worker that uses the device does to the loop, which would wait for it for ever."""
    accelerator = Accelerator(strategy)
    samples = torch.ones(4, 3, device=accelerator.device)
    loader = accelerator.prepare(DataLoader(OnTheDevice(samples), batch_size=2, num_workers=1, timeout=60))
    try:
        next(iter(loader))
    except DataError as error:
        return str(error)
    return "nothing was raised"
