"""trackio, in its own folder (`TRACKIO_DIR`, else in the cache of the user)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .kept_id import KeptId
from .tracker import Run
from .wandb_interface import WandBInterface


@dataclass
class Trackio(WandBInterface):
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
        self._module = trackio
        self._run = trackio.init(self.project, name=name, resume="allow", embed=False)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Into the run's configuration."""
        self._run.config.update(dict(config))
