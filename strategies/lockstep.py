"""Batches of a stream on several ranks, in step: as many on each, however many samples each one has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from . import collectives
from .errors import DataError
from .process_group import named_failures
from .tree import num_samples
from .world import World


@dataclass(frozen=True)
class Step:
    """What the ranks hold at one step: samples of each, 0 for a ghost; `taken` batches were read here for it."""

    sizes: tuple[int, ...]
    is_last: bool
    taken: int


def alone(batches: Iterator[Any]) -> Iterator[tuple[Any, Step]]:
    """The batches of a single process, read one ahead: only the next one tells whether this is the last."""
    nothing = object()
    batch = next(batches, nothing)
    while batch is not nothing:
        following = next(batches, nothing)
        yield batch, Step((num_samples(batch) or 1,), is_last=following is nothing, taken=1)
        batch = following


def together(batches: Iterator[Any], world: World, compare: Callable[[], None]) -> Iterator[tuple[Any, Step]]:
    """Each rank's own batches, until none has any left. Collective at every step.

    A rank that has no more repeats its last one, to weigh nothing. Where one fails, all raise `DataError`. `compare`
    is called on all ranks once each has read what it has for the first step.
    """
    held: Any = None
    batch, sizes = _read(batches, world)
    compare()
    if any(sizes) and not all(sizes):  # a rank without a single batch needs another's to compute something
        first = next(rank for rank, size in enumerate(sizes) if size)
        carrier = [batch if world.rank == first else None]
        with named_failures(world):
            dist.broadcast_object_list(carrier, src=first)
        held = carrier[0]
    while any(sizes):
        mine = sizes[world.rank] > 0
        held = batch if mine else held
        following, following_sizes = _read(batches, world) if mine else _read(iter(()), world)
        yield held, Step(sizes, is_last=not any(following_sizes), taken=int(mine))
        batch, sizes = following, following_sizes


def dispatched(batches: Iterator[Any] | None, world: World) -> Iterator[tuple[Any, Step]]:
    """Batches that rank 0 reads, `batches` there and `None` elsewhere, one for each rank at every step. Collective.

    They may have any shape. What is missing at the end is made up of ghosts. An exception of rank 0 reaches all.
    """
    following = _group(batches, world.size) if batches is not None else None
    while True:
        payloads: list[Any] | None = None
        error: BaseException | None = None
        if world.is_main:
            assert batches is not None
            group, following = following, None
            if isinstance(group, list) and len(group) == world.size:
                following = _group(batches, world.size)
            payloads, error = _payloads(group, following, world)
        received: list[Any] = [None]
        with named_failures(world):
            dist.scatter_object_list(received, payloads, src=0)
        if error is not None:
            raise error
        if received[0] is None:
            return
        if isinstance(received[0], str):
            raise DataError(f"reading the data failed on rank 0, which reads for all: {received[0]}")
        yield received[0]


def _payloads(group: Any, following: Any, world: World) -> tuple[list[Any], BaseException | None]:
    if isinstance(group, BaseException):
        return [f"{type(group).__name__}: {group}"] * world.size, group
    if not group:
        return [None] * world.size, None
    sizes = tuple((num_samples(batch) or 1) for batch in group) + (0,) * (world.size - len(group))
    step = Step(sizes, is_last=not following, taken=len(group))
    return [(group[min(rank, len(group) - 1)], step) for rank in range(world.size)], None


def _group(batches: Iterator[Any], number: int) -> list[Any] | BaseException:
    group: list[Any] = []
    try:
        for _ in range(number):
            group.append(next(batches))
    except StopIteration:
        pass
    except Exception as error:
        return error
    return group


def _read(batches: Iterator[Any], world: World) -> tuple[Any, tuple[int, ...]]:
    """This rank's next batch, and how many samples each rank's has: 0 at its end."""
    failed: Exception | None = None
    batch, size = None, 0
    try:
        batch = next(batches)
        size = num_samples(batch) or 1
    except StopIteration:
        pass
    except Exception as error:
        failed, size = error, -1
    sizes = tuple(collectives.meet("the next batch of an iterable dataset", world, size))
    if min(sizes) < 0:
        words = collectives.all_gather_objects(f"{type(failed).__name__}: {failed}" if failed else "", world)
        if failed is not None:
            raise failed
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(words) if text)
        raise DataError(f"reading the data failed on another rank, and this one cannot go on alone: {told}")
    return batch, sizes
