"""The part of the facade that speaks of processes: which one this is, what they exchange, who goes first."""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from strategies import World, collectives
from strategies.accumulation import Accumulation

from . import processes

P = ParamSpec("P")
R = TypeVar("R")


class Ranks:
    """What a script asks of its processes, before `prepare` and after."""

    _accumulation: Accumulation

    def __init__(self, world: World) -> None:
        self._world = world
        self._trigger = False

    # -- collectives ---------------------------------------------------------------------------------------

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Tell observers that the script is in a collective. No decorator, whose frame would name hangs."""
        for observer in self._accumulation.observers:
            observer.collective_begun()
        try:
            yield
        finally:
            for observer in self._accumulation.observers:
                observer.collective_ended()

    def gather(self, tensor: Any) -> Any:
        """Every tensor of any nesting, concatenated over ranks along dimension 0; scalars become (num_processes,).

        Collective. Raises `ShapeMismatchError` on every rank if shapes or dtypes differ. No gradient flows through.
        """
        with self._collective():
            return collectives.gather(tensor, self._world)

    def reduce(self, tensor: Any, reduction: Literal["sum", "mean"] = "sum", scale: float = 1.0) -> Any:
        """Every tensor of any nesting summed, or averaged, over ranks, times `scale`. Collective."""
        with self._collective():
            return collectives.reduce(tensor, self._world, reduction=reduction, scale=scale)

    def broadcast(self, tree: Any) -> Any:
        """The main process's value, tensors or any picklable object, on every rank. Collective."""
        with self._collective():
            return collectives.broadcast(tree, self._world)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
        """Every tensor of any nesting padded along `dim` to the longest of all ranks. Collective."""
        options: dict[str, Any] = {"dim": dim, "pad_index": pad_index, "pad_first": pad_first}
        with self._collective():
            return collectives.pad_across_processes(tensor, self._world, **options)

    def wait_for_everyone(self) -> None:
        """Return once every rank has called it."""
        with self._collective():
            collectives.barrier(self._world)

    def set_trigger(self) -> None:
        """Raise this rank's flag, for `check_trigger` on all ranks. Not a collective."""
        self._trigger = True

    def check_trigger(self) -> bool:
        """Whether any rank raised its flag since the last check; lowers them all. Collective."""
        with self._collective():
            raised = collectives.any_true(self._trigger, self._world)
        self._trigger = False
        return raised

    # -- processes -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._world.device

    @property
    def num_processes(self) -> int:
        """Processes in the job, over all nodes."""
        return self._world.size

    @property
    def process_index(self) -> int:
        """The rank of this process in the job."""
        return self._world.rank

    @property
    def local_process_index(self) -> int:
        """The rank of this process on its node."""
        return self._world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0 of the job."""
        return self._world.is_main

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first process of its node."""
        return self._world.is_local_main

    def print(self, *values: Any, **arguments: Any) -> None:
        """`print` on the main process only."""
        if self._world.is_main:
            builtins.print(*values, **arguments)

    def on_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorate a function so that only the main process runs it; the others return `None` at once."""

        @functools.wraps(function)
        def on_main(*args: P.args, **kwargs: P.kwargs) -> R | None:
            return function(*args, **kwargs) if self._world.is_main else None

        return on_main

    def main_process_first(self) -> AbstractContextManager[None]:
        """A block that rank 0 runs before the others, to download or cache something once. Every rank enters it."""
        return processes.first(self._world.is_main, self._world)

    def local_main_process_first(self) -> AbstractContextManager[None]:
        """A block that the first process of each node runs before the others of its node. Every rank enters it."""
        return processes.first(self._world.is_local_main, self._world)

    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> AbstractContextManager[Any]:
        """This rank's contiguous share of a list, tuple, range, tensor, array, or mapping of them. Not a collective.

        `apply_padding` repeats the last element so that all shares are equally long.
        """
        return processes.split(inputs, self._world, apply_padding=apply_padding)
