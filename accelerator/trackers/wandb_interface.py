"""What wandb and trackio have in common: runs, and classes for images, histograms and tables, that are called alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tracker import Histogram, Image, Table, Tracker, Value


class WandBInterface(Tracker):
    """A run of a module with the interface of wandb; `begin` sets both."""

    _module: Any
    _run: Any

    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """Log all in one."""
        self._run.log({name: self._native(value) for name, value in values.items()}, step=step)
        return ()

    def close(self) -> None:
        """Finish the run, with what is buffered."""
        self._run.finish()

    def _native(self, value: Value) -> Any:
        if isinstance(value, Image):
            return self._module.Image(value.array(), caption=value.caption)
        if isinstance(value, Histogram):
            return self._module.Histogram(np_histogram=value.counts())
        if isinstance(value, Table):
            return self._module.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        return value
