"""Count the collectives that really run: a lost saving changes no number, so only counting can see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_REDUCING = ("allreduce", "all_reduce", "reduce", "alltoall", "all_to_all")


class Communication:
    """The collectives begun inside a `with` block, by Python or by C++ (DDP's reducer), forward or backward.

    Every backend of torch.distributed is called through operators of torch's dispatcher, where they are counted.
    What a strategy sends by other means, from threads of its own, or inside a compiled program is not seen.
    """

    def __init__(self) -> None:
        self.num_collectives = 0
        self.num_reductions = 0
        self.num_reduced_elements = 0
        self._observer = _Observer(self._note)
        self._stack = ExitStack()

    def __enter__(self) -> Communication:
        self._stack.enter_context(self._observer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _note(self, name: str, arguments: tuple[Any, ...]) -> None:
        if "wait" in name or "wrap" in name or "barrier" in name:
            return
        self.num_collectives += 1
        if name.lstrip("_").startswith(_REDUCING):
            self.num_reductions += 1
            self.num_reduced_elements += max((_num_elements(argument) for argument in arguments), default=0)


class _Observer(TorchDispatchMode):
    """Passes every operator on, and tells of those of torch.distributed."""

    def __init__(self, note: Callable[[str, tuple[Any, ...]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func._opname, args)
        return func(*args, **(kwargs or {}))


def _num_elements(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel()
    if isinstance(argument, list | tuple):
        return sum(_num_elements(part) for part in argument)
    return 0
