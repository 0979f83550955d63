"""Who does what among the processes: one first, one only, or each its share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strategies import ConfigurationError, World, collectives


@contextmanager
def first(goes_first: bool, world: World) -> Iterator[None]:
    """Run the block on the ranks where `goes_first` is true, then on the others. Every rank enters it.

    If the block raises on a rank that goes first, the others do not wait for it for ever: they go on, and
    the rank that raised takes its own way.
    """
    if not goes_first:
        collectives.barrier(world)
    try:
        yield
    finally:
        if goes_first:
            collectives.barrier(world)


@contextmanager
def split(inputs: Any, world: World, *, apply_padding: bool = False) -> Iterator[Any]:
    """This rank's contiguous share of a list, tuple, range, tensor (along dimension 0) or mapping of those.

    The lengths of shares differ by at most one, the longer ones first. `apply_padding` repeats the last
    element so that all are equally long. Not a collective.
    """
    yield _share(inputs, world, apply_padding)


def _share(inputs: Any, world: World, apply_padding: bool) -> Any:
    if isinstance(inputs, Mapping):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise ConfigurationError(
                f"split_between_processes got values of different lengths: {lengths}; expected one length"
            )
        return {key: _share(value, world, apply_padding) for key, value in inputs.items()}
    if not isinstance(inputs, list | tuple | range | Tensor | np.ndarray):
        raise ConfigurationError(
            f"split_between_processes got {type(inputs).__name__} {inputs!r:.60}; expected a list, tuple, range, "
            "tensor, array or mapping. Of a dataset, split the indices: range(len(dataset))."
        )
    each, more = divmod(len(inputs), world.size)
    start = world.rank * each + min(world.rank, more)
    share = inputs[start : start + each + (world.rank < more)]
    if not apply_padding or not more or len(share) > each or not len(inputs):
        return share
    last: Any = inputs[-1:]
    if isinstance(share, Tensor):
        return torch.cat([share, last])
    if isinstance(share, np.ndarray):
        return np.concatenate([share, last])
    return (*share, *last) if isinstance(share, tuple) else [*share, *last]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_apart(seed: int, world: World) -> None:
    """Give each rank but the first random numbers of its own, so that dropout masks differ between ranks.

    Called once the models are prepared: until then all ranks draw alike, so that they initialise alike.
    """
    if world.rank > 0:
        words = np.random.SeedSequence((seed, world.rank)).generate_state(2, np.uint32)
        seed_everything(int(words[0]) << 31 ^ int(words[1]))
