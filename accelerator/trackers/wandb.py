"""Weights & Biases, offline unless `WANDB_MODE` or the script says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .kept_id import KeptId
from .tracker import Histogram, Image, Run, Table, Tracker, Value


@dataclass
class WandB(Tracker):
    """A run in `wandb` in the folder of the run; `wandb sync` sends it later. Keeps every kind of value.

    A run that is resumed keeps its id, and what it already has of a step.
    """

    project: str = "torch-accelerator"
    mode: str | None = None
    """`"online"`, `"offline"` or `"disabled"`; else that of `WANDB_MODE`, else offline."""

    def begin(self, run: Run) -> None:
        """Start the run: wandb starts a process of its own for that, which takes seconds."""
        import wandb

        self._wandb = wandb
        kept = KeptId(run, "wandb")
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.project,
            name=run.name,
            id=kept.value or kept.make(),
            dir=run.folder,
            mode=self.mode or os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type, unused-ignore]
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Into the run's configuration."""
        self._run.config.update(dict(config), allow_val_change=True)

    def log(self, values: Mapping[str, Value], step: int, time: float) -> Sequence[str]:
        """Log all in one."""
        self._run.log({name: self._native(value) for name, value in values.items()}, step=step)
        return ()

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()

    def _native(self, value: Value) -> Any:
        if isinstance(value, Image):
            return self._wandb.Image(value.array(), caption=value.caption)
        if isinstance(value, Histogram):
            return self._wandb.Histogram(np_histogram=value.counts())
        if isinstance(value, Table):
            return self._wandb.Table(columns=list(value.columns), data=[list(row) for row in value.rows])
        return value
