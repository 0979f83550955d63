"""The ranks of a job as a checkpoint meets them: all do the same, and a failure of one is one of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

from strategies import World
from strategies.errors import AcceleratorError, CollectiveError, StateError
from strategies.process_group import named_failures

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The ranks of `world`, over the process group of training or, in the background, over one of their own."""

    world: World
    group: dist.ProcessGroup | None = None

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, pickled, in rank order. Collective."""
        if self.world.size == 1:
            return [value]
        received: list[Any] = [None] * self.world.size
        with named_failures(self.world):
            dist.all_gather_object(received, value, group=self.group)
        return received

    def together(self, function: Callable[[], T]) -> T:
        """Call `function`; raise `StateError` on every rank if it failed on any, with the reason. Collective."""
        result: list[T] = []
        self.each(lambda: result.append(function()))
        return result[0]

    def each(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns on every rank, pickled; raise as `together` does. Collective."""
        error: Exception | None = None
        result: T | None = None
        try:
            result = function()
        except CollectiveError:  # of all ranks, or the end of this one's collectives
            raise
        except Exception as problem:  # also what the user's own objects raise
            error = problem
        everyone = self.gather((None if error is None else _reason(error), result))
        failed = [(rank, reason) for rank, (reason, _) in enumerate(everyone) if reason is not None]
        if failed:
            rank, reason = failed[0]
            raise StateError(reason if len(failed) == self.world.size else f"rank {rank}: {reason}") from error
        return cast(list[T], [one for _, one in everyone])

    def on_main(self, function: Callable[[], Any]) -> None:
        """Have rank 0 call `function`; raise on every rank if it failed there. Collective."""
        self.together(lambda: function() if self.world.is_main else None)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, AcceleratorError | OSError) else f"{type(error).__name__}: {error}"
