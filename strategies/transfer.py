"""Batches on their way to the loop: what torch does around each, and the copy to a device beside the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter, _SingleProcessDataLoaderIter

from .tree import move

T = TypeVar("T")


def unrecorded(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, without the range that torch opens around each for a profiler, while none is running.

    That range takes 6 us, as much as all that a prepared loop adds to a micro-batch. Only what the loop's own
    process reads: worker processes are waited for much longer.
    """
    is_torchs = isinstance(batches, _SingleProcessDataLoaderIter)
    if not is_torchs or type(batches).__next__ is not _BaseDataLoaderIter.__next__:
        return batches
    return _unrecorded(batches)


def _unrecorded(batches: Any) -> Iterator[Any]:
    is_profiled, next_data = torch.autograd._profiler_enabled, batches._next_data
    try:
        while True:
            yield next(batches) if is_profiled() else next_data()
    except StopIteration:
        return


def to_device(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The same batches on `device`, as they are on a CPU.

    On CUDA, from worker processes, each is copied while the step before it runs: without waiting if the loader has
    `pin_memory=True`. What the loop's own process reads is not read ahead: its random draws would come early, and a
    checkpoint would hold them.
    """
    if device.type == "cpu":
        return batches
    workers: int = vars(batches).get("_num_workers", 0) if hasattr(batches, "__dict__") else 0
    if device.type == "cuda" and workers:
        return _overlapped(batches, device)
    return (move(batch, device) for batch in batches)


def _overlapped(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    side = torch.cuda.Stream(device)

    def copied() -> Iterator[tuple[Any, torch.cuda.Event]]:
        for batch in batches:
            # Memory that the copy is given again may be in use by steps that were queued, and by none later.
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                moved = move(batch, device)
            yield moved, side.record_event()

    for batch, arrived in one_ahead(copied()):
        torch.cuda.current_stream(device).wait_event(arrived)
        yield batch


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each taken before the one ahead of it is given out. An exception comes in its place."""
    nothing = object()
    held: Any = next(items, nothing)
    while held is not nothing:
        failure: Exception | None = None
        following: Any = nothing
        try:
            following = next(items, nothing)
        except Exception as error:
            failure = error
        yield held
        if failure is not None:
            raise failure
        held = following
