"""Which sampler stands in for the user's in a prepared dataloader, and which loaders cannot have one."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ..drawn import DrawnOrder, ListedBatchSampler, check_weights
from ..errors import DataError
from ..sharding import ComputedOrder, Cut, Order, ShardedBatchSampler, ShardedSampler
from ..world import World
from .options import DataOptions
from .stream import Stream

PlannedSampler: TypeAlias = ShardedBatchSampler | ListedBatchSampler


def sampler_for(loader: DataLoader[Any], world: World, *, seed: int, options: DataOptions) -> PlannedSampler | None:
    """This rank's sampler of `loader`'s order; `None` for a stream. Raises `DataError` for what cannot be cut."""
    _refuse_sharded(loader)
    sampler = _sampler(loader, world, seed, options)
    dataset = type(loader.dataset).__name__
    if sampler is None and options.seed_samples:
        raise DataError(
            f"seed_samples=True, and the samples of {dataset} have no index: it is an iterable "
            "dataset, or its sampler has no length. Draw from a generator seeded by what a sample holds, or use "
            "seed_samples=False."
        )
    if sampler is None and options.split_batches and world.size > 1:
        raise DataError(
            f"{dataset} is an iterable dataset and split_batches=True. Processes read their own "
            "batches of it: use split_batches=False and a batch_size for each process."
        )
    return sampler


def refuse_unpadded(loader: DataLoader[Any], sampler: PlannedSampler | Stream, *, pads: bool) -> None:
    """Raise `DataError` for a pass with gradients over batches that `pad_batches` cannot make of one length."""
    if not pads or loader.drop_last or type(sampler) is ShardedBatchSampler or not torch.is_grad_enabled():
        return
    if loader.batch_size is None:
        what = "come from a batch_sampler of its own" if loader.batch_sampler is not None else "are the dataset's own"
    else:
        what = "come from an iterable dataset, or a sampler without a length"
    raise DataError(
        f"pad_batches=True, and the batches of the loader over {type(loader.dataset).__name__} {what}: their lengths "
        "are not the library's to choose. Use drop_last=True if it takes one; or pad_batches=False, a collate_fn that "
        "pads, and backward(losses, weight=rows) with rows 1 for samples and 0 for padding."
    )


def _sampler(loader: DataLoader[Any], world: World, seed: int, options: DataOptions) -> PlannedSampler | None:
    split_batches, seed_samples = options.split_batches, options.seed_samples
    if isinstance(loader.dataset, IterableDataset):
        return None
    own = loader.batch_sampler
    check_weights(loader.sampler if own is None else own)
    if own is not None and (type(own) is not BatchSampler or loader.batch_size is None):
        length = _length_of(own, world, "batch_sampler")
        if length is None:
            return None
        drawn = DrawnOrder(own, length, seed, loader.generator, marks_repeats=seed_samples, of_batches=True)
        return ListedBatchSampler(drawn, world.rank, world.size, split=split_batches)
    order = _order(loader, world, seed, seed_samples)
    if order is None:
        return None
    if own is None:
        cut = Cut(order.length, world.size, world.size, drop_last=False, counts_samples=False)
        return ShardedSampler(cut, world.rank, order)
    assert loader.batch_size is not None
    global_batch = loader.batch_size if split_batches else loader.batch_size * world.size
    cut = Cut(length=order.length, global_batch=global_batch, world_size=world.size, drop_last=loader.drop_last)
    pads = options.pad_batches and not loader.drop_last
    if split_batches and global_batch < world.size:
        raise DataError(
            f"batch_size is {global_batch} and split_batches=True, fewer than the {world.size} processes. "
            "Give a batch_size of at least the number of processes."
        )
    if cut.num_batches == 0:
        raise DataError(
            f"the dataset has {order.length} samples, fewer than one global batch of {global_batch}, and "
            "drop_last=True drops them all. Use a smaller batch_size or drop_last=False."
        )
    return ShardedBatchSampler(cut, world.rank, order, pads=pads)


def length_now(loader: DataLoader[Any], sampler: PlannedSampler) -> int:
    """How many samples the order of `loader` would have if it were prepared now."""
    own = sampler.order.sampler if isinstance(sampler.order, DrawnOrder) else loader.dataset
    return len(own)  # type: ignore[arg-type]  # it had a length when it was prepared


def _order(loader: DataLoader[Any], world: World, seed: int, seed_samples: bool) -> Order | None:
    sampler = loader.sampler
    if type(sampler) is SequentialSampler:
        return ComputedOrder(_length(loader), seed, shuffle=False)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return ComputedOrder(_length(loader), seed, shuffle=True)
    length = _length_of(sampler, world, "sampler")
    if length is None:
        return None
    return DrawnOrder(sampler, length, seed, loader.generator, marks_repeats=seed_samples)


def _length_of(sampler: Any, world: World, name: str) -> int | None:
    """The length of a sampler of the user's own; `None` if it has none, which one process can do without."""
    try:
        length = len(sampler)
    except TypeError:
        if world.size == 1:
            return None
        raise DataError(
            f"{name}={type(sampler).__name__} has no __len__, so that it cannot be cut over {world.size} processes: "
            "they would not know when to stop. Give it one, or make the dataset an IterableDataset."
        ) from None
    if length == 0:
        raise DataError(f"{name}={type(sampler).__name__} has length zero: a loader without samples trains nothing.")
    return length


def _length(loader: DataLoader[Any]) -> int:
    try:
        length = len(loader.dataset)  # type: ignore[arg-type]  # the error below is for those without
    except TypeError:
        raise DataError(
            f"{type(loader.dataset).__name__} has no __len__. Give it one, or make it an IterableDataset."
        ) from None
    if length == 0:
        raise DataError(f"{type(loader.dataset).__name__} is empty: a loader of length zero trains nothing.")
    return length


def _refuse_sharded(loader: DataLoader[Any]) -> None:
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        replicas = getattr(sampler, "num_replicas", 1) if hasattr(sampler, "rank") else 1
        if isinstance(sampler, DistributedSampler) or replicas not in (1, None):
            raise DataError(
                f"the loader already has a {type(sampler).__name__}; cutting its part again would lose samples. Give a "
                "plain loader (shuffle=True instead of the sampler): prepare() cuts it."
            )
    if not loader.in_order:
        raise DataError(
            "in_order=False lets workers hand batches over in any order, so that no batch's place in the epoch is "
            "known. Use in_order=True."
        )
