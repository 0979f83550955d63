"""trackio, in its own folder (`TRACKIO_DIR`, else in the cache of the user)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .kept_id import KeptId
from .tracker import Histogram, Image, Run, Table, Tracker, Value


@dataclass
class Trackio(Tracker):
    """One trackio run; `trackio show` opens its dashboard. Keeps every kind of value.

    A run that is resumed goes on under its name, and keeps what it has: points of steps that are logged again are there
    twice.
    """

    project: str = "torch-accelerator"

    def begin(self, run: Run) -> None:
        """Start or resume the run."""
        import trackio

        kept = KeptId(run, "trackio")
        name = kept.value or kept.make(run.name)
        self._trackio = trackio
        self._run = trackio.init(self.project, name=name, resume="allow", embed=False)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Into the run's configuration."""
        self._run.config.update(dict(config))

    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """Log all in one."""
        self._run.log({name: self._native(value) for name, value in values.items()}, step=step)
        return ()

    def close(self) -> None:
        """Write what is buffered."""
        self._run.finish()

    def _native(self, value: Value) -> Any:
        if isinstance(value, Image):
            return self._trackio.Image(value.array(), caption=value.caption)
        if isinstance(value, Histogram):
            return self._trackio.Histogram(np_histogram=value.counts())
        if isinstance(value, Table):
            return self._trackio.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        return value
