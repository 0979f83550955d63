"""What all ranks must have alike of a loader before its epochs are cut: the seed of its order, and what it is over."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, Subset

from .. import collectives, hugging_face
from ..errors import DataError
from ..world import World

_NUM_COMPARED = 1 << 16  # of the indices of a subset: so many that two different draws of them cannot agree


@dataclass(frozen=True)
class Seed:
    """The seed of a loader's order, and whether the script chose it."""

    value: int
    was_given: bool


def agreed_seed(loader: DataLoader[Any], seed: int | None, ordinal: int, world: World, *, dispatch: bool) -> Seed:
    """The seed of a loader's order, the same on all ranks. Collective where there are several.

    Its own `generator` comes first, then the Accelerator's seed, then torch's: nothing is drawn from any of
    them. Loaders that take the Accelerator's are told apart by the order in which they were prepared.
    `dispatch`: rank 0 alone reads an iterable dataset. Raises `DataError` where ranks have different loaders.
    """
    generator = loader.generator or getattr(loader.sampler, "generator", None)
    if generator is not None:
        chosen = generator.initial_seed()
    else:
        chosen = (torch.initial_seed() if seed is None else seed) + 0x9E3779B97F4A7C15 * ordinal
    was_given = generator is not None or seed is not None
    if world.size == 1:
        return Seed(collectives.all_gather_integers([chosen], world)[0][0], was_given)
    brought, version = _brought(loader, dispatch), hugging_face.version_of(loader.dataset)
    rows = collectives.all_gather_integers([chosen, *(zlib.crc32(text.encode()) for text in (brought, version))], world)
    if any(row[1] != rows[0][1] for row in rows):
        everyone = enumerate(collectives.all_gather_objects(brought, world))
        told = "; ".join(f"rank {rank}: {text}" for rank, text in everyone)
        raise DataError(
            f"ranks prepared different loaders ({told}). Each needs the same, over the whole of the same data, which "
            "prepare() cuts. Do not cut it by rank before; seed what draws a part: random_split(..., "
            "generator=torch.Generator().manual_seed(0))."
        )
    if any(row[2] != rows[0][2] for row in rows):
        warnings.warn(
            f"the fingerprints of {type(loader.dataset).__name__} differ between ranks. If it was cut by rank "
            "(split_dataset_by_node, shard) or drawn without a seed, samples come twice or never: give prepare() the "
            "whole, drawn alike. If it was mapped by a function that cannot be hashed, all is well.",
            stacklevel=4,
        )
    return Seed(rows[0][0], was_given)


def _brought(loader: DataLoader[Any], dispatch: bool) -> str:
    """What ranks must have alike of a loader, in words that differ where it does."""
    dataset, settings = loader.dataset, f"batch_size={loader.batch_size}, drop_last={loader.drop_last}"
    if isinstance(dataset, IterableDataset):
        if dispatch:  # what the others hold is not read
            return f"an iterable dataset, {settings}"
        return f"{type(dataset).__name__}, {settings}, num_workers={loader.num_workers}"
    own = loader.batch_sampler
    order = loader.sampler if own is None or (type(own) is BatchSampler and loader.batch_size is not None) else own
    return f"{', '.join(_data(dataset))}, {type(order).__name__}{_length(order)}, {settings}"


def _data(dataset: Any) -> Iterator[str]:
    """The dataset and those that it is a part of or put together from."""
    yield f"{type(dataset).__name__}{_length(dataset)}"
    indices = dataset.indices if isinstance(dataset, Subset) else hugging_face.indices_of(dataset)
    if indices is not None:
        some = indices[:: max(1, len(indices) // _NUM_COMPARED)]
        text = repr(some) if isinstance(some, range) else repr(np.asarray(some).tolist())
        yield f"indices {text[:30]}...{zlib.crc32(text.encode()):08x}"
    within = [dataset.dataset] if isinstance(dataset, Subset) else []
    for one in dataset.datasets if isinstance(dataset, ConcatDataset) else within:
        yield from _data(one)


def _length(held: Any) -> str:
    try:
        return f" of {len(held)}"
    except Exception:  # what has none, or fails, is reported where it is needed
        return ""
