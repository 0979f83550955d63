"""What helps to find a bug in a loop: values that are not finite, ranks that differ, ranks that wait for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.accumulation import Accumulation

from .hangs import HangWatch
from .nonfinite import NonfiniteSearch

if TYPE_CHECKING:
    from ..config import Settings


class Debugging:
    """The searches that the settings of one Accelerator ask for."""

    def __init__(self, settings: Settings, accumulation: Accumulation) -> None:
        self._accumulation = accumulation
        self._nonfinite = NonfiniteSearch(accumulation) if settings.detect_nonfinite else None
        self._hangs: HangWatch | None = None
        seconds, first = settings.hang_timeout, settings.first_step_timeout
        if seconds is not None:
            first = max(300, seconds) if first is None else first
            self._hangs = HangWatch(accumulation.world, timeout=seconds, first_step_timeout=first)

    def attach(self) -> None:
        """Listen to the loop, and look into the models that were prepared since the last call."""
        for observer in (self._nonfinite, self._hangs):
            if observer is not None and observer not in self._accumulation.observers:  # new, or released
                self._accumulation.observers.append(observer)
        if self._nonfinite is not None:
            self._nonfinite.attach()

    def stop(self) -> None:
        """End what runs beside the loop, before the processes part."""
        if self._hangs is not None:
            self._hangs.stop()
