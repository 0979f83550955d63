"""What helps to find a bug in a loop: values that are not finite, ranks that differ, ranks that wait for ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from strategies.accumulation import Accumulation
from strategies.errors import ConfigurationError

from . import replicas
from .hangs import HangWatch
from .nonfinite import NonfiniteSearch
from .statistics import Watch

if TYPE_CHECKING:
    from ..config import Settings


class Debugging:
    """The searches that the settings of one Accelerator ask for."""

    def __init__(self, settings: Settings, accumulation: Accumulation) -> None:
        self._accumulation = accumulation
        self._nonfinite = NonfiniteSearch(accumulation) if settings.detect_nonfinite else None
        self._hangs: HangWatch | None = None
        notice, seconds, first = settings.hang_notice, settings.hang_timeout, settings.first_step_timeout
        if seconds is not None:
            first = max(300, seconds) if first is None else first
            self._hangs = HangWatch(accumulation, notice=notice, timeout=seconds, first_step_timeout=first)
        elif notice and accumulation.world.size > 1:
            self._hangs = HangWatch(accumulation, notice=notice)

    def attach(self) -> None:
        """Listen to the loop, and look into the models that were prepared since the last call."""
        for observer in (self._nonfinite, self._hangs if self._hangs is not None and self._hangs.ends else None):
            if observer is not None and observer not in self._accumulation.observers:  # new, or released
                self._accumulation.observers.append(observer)
        if self._nonfinite is not None:
            self._nonfinite.attach()

    def verify_replicas(self, every: int | None) -> None:
        """Compare what ranks hold now, or after each step that `every` divides."""
        if every is None:
            replicas.verify(self._accumulation, self._accumulation.models)
        else:
            _refuse_below_one(every)
            self._accumulation.observers.append(replicas.ReplicaCheck(self._accumulation, every))

    def watch(self, model: nn.Module, every: int, log: Callable[[Mapping[str, Any]], None]) -> None:
        """Give `log` statistics of `model` for each step that `every` divides."""
        _refuse_below_one(every)
        self._accumulation.observers.append(Watch(self._accumulation, self._accumulation.link(model), every, log))

    def stop(self) -> None:
        """End what runs beside the loop, before the processes part."""
        if self._hangs is not None:
            self._hangs.stop()


def _refuse_below_one(every: int) -> None:
    if every < 1:
        raise ConfigurationError(f"every is {every}; expected a number of steps >= 1")
