"""What every micro-batch weighs in its window.

At every optimizer step the gradient is that of the mean loss over all samples of the window, over all
ranks. A micro-batch of n samples on one rank of W therefore enters backward with the factor n * W / N,
where N is the number of samples of the whole window and W undoes the mean over ranks. N is known from the
plan of the epoch before the window begins, so the usual window needs no communication. Where it is not
known (explicit weights, a stream, a batch skipped or used twice), micro-batches enter with a reference
in place of N, and the gradients are rescaled once by the true sum when the window closes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import collectives
from .errors import StepError
from .sources import Cursor
from .world import World

_CALL = "the sum of a window's weights (for weight=, a stream, or a batch that was skipped)"


class Weighting:
    """The weights of one window, from its first micro-batch to its close.

    `alone`: `world` is this rank only, which then divides by samples of its own; the plan counts those of all ranks.
    """

    def __init__(self, world: World, *, alone: bool = False) -> None:
        self._world = world
        self._alone = alone
        # Mean explicit weight of a micro-batch, from the last window that had any (in the first one, from the
        # first that weighs anything: one all-reduce). It keeps gradients near their true size until the true sum is
        # known, so that float16 does not overflow; it is the same on all ranks, as the reference must be.
        self.unit: float | Tensor | None = None
        self.latest: float | Tensor = 0.0  # of the micro-batch that had a backward last
        self._num_parts = 1
        self._reference: float | Tensor | None = 1.0
        self._deferred = False
        self._explicit: bool | None = None
        self._sum: float | Tensor = 0.0
        self._last: float | Tensor = 0.0
        self._left: float | None = None  # samples that a restored window was still to have

    @property
    def is_deferred(self) -> bool:
        """Whether gradients are to be rescaled when the window closes."""
        return self._deferred

    def begin(self, cursor: Cursor | None, steps: int) -> None:
        """Begin a window of at most `steps` micro-batches, the first of which `cursor` holds."""
        self._num_parts = steps * self._world.size
        self._explicit = None
        self._sum = 0.0
        if cursor is None:  # no prepared loader: every micro-batch weighs the same
            self._deferred = False
            self._reference = float(self._num_parts)
        elif not cursor.is_planned or cursor.cut is None:  # sizes are not known in advance; of a stream, nor the end
            self._deferred = self._num_parts > 1
            self._reference = steps * (cursor.mean_samples * self._world.size or float(cursor.samples))
        else:
            self._deferred = False
            self._reference = float(cursor.cut.window_samples(cursor.index, steps))
        self._deferred = self._deferred or self._alone

    def leave_plan(self) -> None:
        """Note that the loop takes another micro-batch than was planned; the true sum then decides."""
        self._deferred = True

    def go_on(self, cursor: Cursor | None, steps: int) -> None:
        """Compare what a restored window was to have with the `steps` micro-batches that it has, from `cursor` on.

        Over another global batch, or with another `drop_last`, they may be other samples; the true sum then decides.
        """
        if cursor is None or not cursor.is_planned or cursor.cut is None:
            return  # micro-batches are counted, or the sum decides anyhow
        if cursor.cut.window_samples(cursor.index, steps) != self._left:
            self.leave_plan()

    @property
    def has_any(self) -> bool:
        """Whether a micro-batch of this window had a backward."""
        return self._explicit is not None

    def factor(self, cursor: Cursor | None, weight: float | Tensor | None, *, again: bool) -> float | Tensor:
        """What the loss of this micro-batch is multiplied by. `again`: it had a backward before.

        Raises `StepError` for a weight that is no count, or where weights are given for some losses only.
        """
        explicit = weight is not None
        if self._explicit is not None and self._explicit != explicit:
            raise StepError(
                "backward() got weight= in some micro-batches of one window and not in others. Give it in all or none."
            )
        if weight is None:
            known: float | Tensor = float(cursor.samples) if cursor is not None else 1.0
        else:
            known = self._given(_checked(weight), cursor, again)
        self._explicit, self.latest = explicit, known
        if not again:
            self._sum = self._sum + known
        if self._reference is None:  # nothing has weighed anything yet, on any rank
            return 0.0
        return known * self._world.size / self._reference

    def correction(self) -> float | Tensor | None:
        """What the window's gradients are multiplied by at its close, if its weight was not known before.

        One small all-reduce where it was not and there are several ranks. A window in which nothing weighed
        anything (every token masked, say) has the gradient of no sample: zero.
        """
        if not self._deferred:
            return None
        if self._world.size == 1 and not isinstance(self._sum, Tensor):
            if self._sum == 0 or self._reference is None:
                return 0.0
            correction = float(self._reference) / self._sum
            if self._explicit:
                self.unit = self._sum / self._num_parts
            return correction
        if self._reference is None:
            return 0.0
        total = collectives.sum_scalar(self._sum, self._world, _CALL)
        some = total > 0
        if self._explicit and self.unit is not None:
            self.unit = torch.where(some, total / self._num_parts, self.unit)
        scaled = self._reference / total.clamp(min=torch.finfo(total.dtype).tiny)
        return torch.where(some, scaled, torch.zeros_like(total))

    def state_dict(self) -> dict[str, Any]:
        """What an open window has weighed on this rank, in plain numbers. Waits for the device if they are there."""
        numbers = {name: getattr(self, f"_{name}") for name in ("reference", "sum", "last")} | {"unit": self.unit}
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in numbers.items()}
        return plain | {"num_parts": self._num_parts, "deferred": self._deferred, "explicit": self._explicit}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], *, counts_micro_batches: bool) -> None:
        """Go on with the states that all ranks had: this rank's, or a share of all where they were more or fewer.

        `counts_micro_batches`: without `weight=` a micro-batch weighs 1 on every rank, however many there are.
        """
        same = len(states) == self._world.size
        mine = states[self._world.rank if same else 0]
        self.unit, self._last, self._explicit = mine["unit"], mine["last"], mine["explicit"]
        self._num_parts, self._reference = mine["num_parts"], mine["reference"]
        self._deferred, self._sum = mine["deferred"], mine["sum"]
        if self._reference is not None:
            self._left = self._reference - sum(state["sum"] for state in states)
        if not same:
            self._deferred = any(state["deferred"] for state in states)
            self._sum = sum(state["sum"] for state in states) / self._world.size
            if counts_micro_batches and not self._explicit and self._reference is not None:
                scale = self._world.size / len(states)
                self._reference, self._sum = self._reference * scale, self._sum * scale

    def _given(self, weight: float | Tensor, cursor: Cursor | None, again: bool) -> float | Tensor:
        """An explicit weight as it counts here, with a reference for it."""
        if cursor is not None and cursor.is_ghost:
            weight = 0.0
        if self._explicit is None:
            self._deferred = self._num_parts > 1
            self._reference = None if self.unit is None else self.unit * self._num_parts
        if again and not _on_device(weight) and float(weight) != float(self._last):
            raise StepError(
                f"backward() got weight={weight} after weight={self._last} in the same micro-batch. The losses of one "
                "micro-batch share its weight: add them up, or put each in an accumulate() of its own."
            )
        self._last = weight
        if not self._deferred:  # alone in its window: a mean over itself, whatever it counts
            self._reference = 1.0
            return float(weight > 0) if isinstance(weight, float) else (weight > 0).to(weight)
        if self._reference is None:
            mean = collectives.sum_scalar(weight, self._world, _CALL) / self._world.size
            if isinstance(weight, Tensor) and weight.device.type == "xla":  # a read would cut the window's program
                self.unit = torch.where(mean > 0, mean, torch.ones_like(mean))
            elif mean > 0:
                self.unit = float(mean)
            self._reference = None if self.unit is None else self.unit * self._num_parts
        return weight


def _checked(weight: float | Tensor) -> float | Tensor:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise StepError(f"weight has shape {tuple(weight.shape)}; expected one number, such as the count of tokens")
        if _on_device(weight):  # looking at it would wait for the device
            dtype = torch.float32 if weight.device.type == "mps" else torch.float64
            return weight.detach().reshape(()).to(dtype)
        weight = weight.item()
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
        raise StepError(f"weight is {weight!r}; expected a finite number >= 0, such as the count of tokens")
    return float(weight)


def _on_device(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) and weight.device.type != "cpu"
