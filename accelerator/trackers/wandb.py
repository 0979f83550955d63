"""Weights & Biases, offline unless `WANDB_MODE` or the script says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .kept_id import KeptId
from .tracker import Run
from .wandb_interface import WandBInterface


@dataclass
class WandB(WandBInterface):
    """A run in `wandb` in the folder of the run; `wandb sync` sends it later. Keeps every kind of value.

    A run that is resumed keeps its id, and what it already has of a step.
    """

    project: str = "torch-accelerator"
    mode: str | None = None
    """`"online"`, `"offline"` or `"disabled"`; else that of `WANDB_MODE`, else offline."""

    def begin(self, run: Run) -> None:
        """Start the run: wandb starts a process of its own for that, which takes seconds."""
        import wandb

        self._module = wandb
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
