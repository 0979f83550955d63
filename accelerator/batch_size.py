"""The largest batch size that memory suffices for, found by trying, with one answer on all ranks."""

from __future__ import annotations

import functools
import gc
import logging
import re
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from strategies.errors import ConfigurationError, StepError
from strategies.process_group import close_groups, meeting_store

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED|RESOURCE_EXHAUSTED", re.IGNORECASE)
_SETTLE_SECONDS = 5.0  # for word of another rank's lack of memory to come after its connection has closed
_log = logging.getLogger("accelerator")


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    *,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[int], int] = lambda size: int(size * 0.9),
) -> Any:
    """Decorate a function whose first argument is a batch size: it runs with ever smaller ones until memory suffices.

    The caller leaves that argument out. When any rank runs out of memory all ranks begin again, with the size that
    `reduce_batch_size_fn` makes of the last one. On several ranks the function builds its own `Accelerator`: that of a
    failed attempt is gone with its process group. Every rank calls it. Raises `ConfigurationError` where several ranks
    have an Accelerator already or sizes do not fall, `StepError` when no size is left; all else passes through.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )

    @functools.wraps(function)
    def search(*args: Any, **kwargs: Any) -> Any:
        ranks = _Ranks()
        size, attempt = starting_batch_size, 0
        while size >= 1:
            ranks.attempt = attempt
            enough, result = _try(function, ranks, size, args, kwargs)
            if enough:
                return result
            smaller = reduce_batch_size_fn(size)
            if smaller >= size:
                raise ConfigurationError(
                    f"reduce_batch_size_fn made {smaller} of {size}; expected a smaller batch size"
                )
            _log.warning("batch size %d needs more memory than there is; trying %d", size, smaller)
            size, attempt = smaller, attempt + 1
        raise StepError(f"memory suffices for no batch size: {starting_batch_size} and all below it were tried")

    return search


def _try(
    function: Callable[..., Any], ranks: _Ranks, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, Any]:
    """Whether memory sufficed on all ranks, and what the function returned here."""
    result = None
    try:
        result = function(size, *args, **kwargs)
        mine = "done"
    except Exception as error:
        mine = "memory" if _is_out_of_memory(error) else "error"
        if mine == "error" and not (isinstance(error, RuntimeError) and ranks.any_short_of_memory()):
            ranks.tell(mine)
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the model, and everything on the device
    ranks.tell(mine)
    if mine != "done":
        _let_go()  # ranks that wait for this one learn by its closed connections
    if not ranks.wait_for_all():
        return True, result
    if mine == "done":
        _let_go()
    return False, None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _let_go() -> None:
    """Free what the attempt held, and leave its process groups."""
    gc.collect()
    close_groups()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


class _Ranks:
    """How an attempt ended on each rank, in a store that outlives the process groups of attempts."""

    def __init__(self) -> None:
        self.attempt = 0
        self._rank, self._size, self._store = meeting_store()
        if self._size > 1 and dist.is_initialized():
            raise ConfigurationError(
                f"find_executable_batch_size found an Accelerator on {self._size} processes, whose process group "
                "cannot outlive an attempt. Build the Accelerator inside the function."
            )

    def tell(self, ending: str) -> None:
        """Say how the attempt ended here."""
        self._store.set(self._key(self._rank), ending)

    def any_short_of_memory(self) -> bool:
        """Whether another rank says, now or within seconds, that it ran out of memory."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._size > 1 and time.monotonic() < deadline:
            told = [self._key(rank) for rank in range(self._size) if self._store.check([self._key(rank)])]
            if any(self._store.get(key) == b"memory" for key in told):
                return True
            if len(told) == self._size - 1:
                return False
            time.sleep(0.05)
        return False

    def wait_for_all(self) -> bool:
        """Wait until every rank's attempt has ended. Returns whether any ran out of memory."""
        return any(self._store.get(self._key(rank)) == b"memory" for rank in range(self._size))

    def _key(self, rank: int) -> str:
        return f"accelerator/batch_size/{self.attempt}/{rank}"
