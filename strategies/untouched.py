"""Gradients that are not yet those of their step, where a change that is not linear would be another than was meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import StepError
from .shards import is_sharded

if TYPE_CHECKING:
    from .prepared.optimizer import OptimizerLink


class Untouched:
    """Notices that a loop has written into all gradients of a window, as torch's own clipping does.

    It looks at the first and the last parameter of each optimizer: two tell a change of all from one of some, such as
    rows of an embedding that are kept at zero. Of one parameter alone nothing is known, nor of gradients that are cut
    over ranks: torch does not count what is written into a `DTensor`.
    """

    def __init__(self, optimizers: Sequence[OptimizerLink]) -> None:
        self._optimizers = optimizers
        self._seen: list[int] = []

    def look(self) -> None:
        """Note how often gradients have been written to until now."""
        self._seen = [gradient._version for gradient in self._gradients()]

    def forget(self) -> None:
        """They are not looked after any longer."""
        self._seen = []

    def check(self, *, is_open: bool) -> None:
        """Raise `StepError` if they were written to since `look`."""
        before = self._seen
        if not before:
            return
        now, self._seen = self._gradients(), []
        is_written = all(new._version > old for new, old in zip(now, before, strict=False))
        if is_written and 2 <= len(now) == len(before) and any(map(_has_any, now)):  # else zeroed, to begin anew
            what = (
                "those of a part of the window" if is_open else "still to be divided, by the loss scale or by weights"
            )
            raise StepError(
                f"all gradients were changed in place after backward(), where they are {what}: there, "
                "torch.nn.utils.clip_grad_norm_ clips other numbers than those of the step. Call "
                "accelerator.clip_grad_norm_(model.parameters(), max_norm). For a change of your own call it with "
                "float('inf') before, where accelerator.sync_gradients is true, and they are those of the step."
            )

    def _gradients(self) -> list[Tensor]:
        found = []
        for optimizer in self._optimizers:
            groups = optimizer.original.param_groups
            for parameter in dict.fromkeys([*groups[0]["params"][:1], *groups[-1]["params"][-1:]]):
                gradient = parameter.grad
                if gradient is not None and not is_sharded(gradient):
                    found.append(gradient)
        return found


def _has_any(gradient: Tensor) -> bool:
    return bool((gradient._values() if gradient.is_sparse else gradient).any())
