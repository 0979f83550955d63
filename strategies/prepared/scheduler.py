"""The scheduler that `prepare` returns: one step per optimizer step that was really taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from .. import collectives
from ..errors import CollectiveError, PrepareError
from .view import View, make_view

if TYPE_CHECKING:
    from ..accumulation import Accumulation
    from .optimizer import OptimizerLink


class PreparedScheduler(View):
    """What comes before the user's own methods in a prepared scheduler."""

    __slots__ = ()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, unless the optimizer held its last step back (an open window) or skipped it (overflow).

        A call after no call of the optimizer's step at all is passed on, as torch would.
        """
        link = self._link
        optimizer = link.optimizer
        if optimizer.num_steps != link.num_followed or not (optimizer.last_call == "held" or optimizer.is_held):
            link.step(*args, **kwargs)


class SchedulerLink:
    """What a prepared scheduler knows: the user's scheduler, its optimizer, and the step it has followed."""

    def __init__(self, original: Any, optimizer: OptimizerLink) -> None:
        self.original = original
        self.optimizer = optimizer
        self.num_followed = optimizer.num_steps

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Follow the optimizer."""
        self.num_followed = self.optimizer.num_steps
        if isinstance(self.original, ReduceLROnPlateau):
            self._check_metric(*args, **kwargs)
        self.original.step(*args, **kwargs)

    def _check_metric(self, metrics: Any, *_: Any, **__: Any) -> None:
        """Ranks that see different metrics would go on with different learning rates."""
        seen = collectives.all_gather_objects(float(metrics), self.optimizer.accumulation.world)
        if any(value != seen[0] and not (value != value and seen[0] != seen[0]) for value in seen):
            raise CollectiveError(
                f"ReduceLROnPlateau got a different metric on each rank ({', '.join(map(str, seen))}), so that their "
                'learning rates would part. Give accelerator.reduce(metric, reduction="mean") on every rank.'
            )


def prepare_scheduler(scheduler: Any, accumulation: Accumulation) -> Any:
    """`scheduler` behind a view that is still an instance of its class. Its optimizer must be prepared."""
    for optimizer in accumulation.optimizers:
        # The scheduler may have been built from the user's optimizer or from the view that prepare returned.
        inner = getattr(getattr(scheduler.optimizer, "_link", None), "original", scheduler.optimizer)
        if optimizer.original is inner:
            link = SchedulerLink(scheduler, optimizer)
            accumulation.schedulers.append(link)
            return make_view(scheduler, PreparedScheduler, link)
    raise PrepareError(
        f"{type(scheduler).__name__} schedules a {type(scheduler.optimizer).__name__} that is not prepared. "
        "Give its optimizer to the same prepare(), or to an earlier one."
    )
