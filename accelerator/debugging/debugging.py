"""What helps to find a bug in a loop: values that are not finite, ranks that differ, ranks that wait for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.accumulation import Accumulation

from .nonfinite import NonfiniteSearch

if TYPE_CHECKING:
    from ..config import Settings


class Debugging:
    """The searches that the settings of one Accelerator ask for."""

    def __init__(self, settings: Settings, accumulation: Accumulation) -> None:
        self._accumulation = accumulation
        self._nonfinite = NonfiniteSearch(accumulation) if settings.detect_nonfinite else None

    def attach(self) -> None:
        """Look into the models that were prepared since the last call."""
        if self._nonfinite is not None:
            if self._nonfinite not in self._accumulation.observers:  # new, or released with what was prepared
                self._accumulation.observers.append(self._nonfinite)
            self._nonfinite.attach()
