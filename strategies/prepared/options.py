"""What a script asks of all its dataloaders."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a script asks of all its loaders.

    `split_batches`: a loader's `batch_size` is that of all ranks together. `dispatch_batches`: rank 0 alone reads
    iterable datasets, and sends the others their batches. `seed_samples`: the random draws of a sample are functions
    of seed, epoch and index. `pad_batches`: short batches are filled up with ghosts in passes with gradients.
    """

    split_batches: bool = False
    dispatch_batches: bool = False
    seed_samples: bool = False
    pad_batches: bool = False
