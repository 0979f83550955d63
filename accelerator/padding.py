"""Batches of one length, for hardware that compiles a program for each: short ones are filled up, with weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from strategies.errors import ConfigurationError, DataError


@dataclass(frozen=True)
class PadBatches:
    """A `collate_fn` that makes every batch `length` samples long, and gives `(batch, weights)`.

    A short batch gets its first sample again until it is full. `weights`, float32 of shape (length,), are 1 for its
    samples and 0 for these ghosts. Only the loop can leave ghosts out of its loss, and it must, with `each` the losses
    of the samples, of shape (length,):

        loss = (each * weights).sum() / weights.sum()
        accelerator.backward(loss, weight=weights.sum())

    The gradient is then that of the samples, for a model and a loss that look at each sample by itself. Batch
    normalisation, and losses that compare samples, see ghosts as well: leave the last batch short there, or drop it.
    `length` is that of a full batch on one rank, the loader's `batch_size`; `collate` makes a batch of samples.

    Raises `ConfigurationError` for a length below 1, `DataError` for a longer batch and for what is no list of samples.
    """

    length: int
    collate: Callable[[list[Any]], Any] = default_collate

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigurationError(f"length is {self.length}; expected at least 1: the loader's batch_size")

    @property
    def pads_to(self) -> int:
        """The length of every batch, by which `gather_for_metrics` knows what belongs to it in nested loops."""
        return self.length

    def __call__(self, samples: list[Any]) -> tuple[Any, Tensor]:
        """The batch of `samples` and ghosts, and the weights of its rows."""
        if not isinstance(samples, list):
            raise DataError(
                f"PadBatches got {type(samples).__name__} instead of a list of samples. Give the loader a batch_size; "
                "without one it hands over single items."
            )
        missing = self.length - len(samples)
        if missing < 0:
            raise DataError(
                f"PadBatches(length={self.length}) got a batch of {len(samples)} samples. Give it the loader's "
                "batch_size."
            )
        weights = torch.ones(self.length)
        weights[len(samples) :] = 0.0
        ghosts = [copy.copy(samples[0]) for _ in range(missing)]  # a collate function may take samples apart
        return self.collate([*samples, *ghosts]), weights
