"""What is kept of a run, for people to look at: what the loop logs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from strategies.accumulation import Accumulation
from strategies.errors import ConfigurationError

from .config import NotGiven, Resolved
from .config.settings import TABLES
from .trackers import Log, Run, Tracker, name_of, resolve


def names_of(trackers: Any) -> Any:
    """The trackers given in code as a setting: their names. What is no list is left to the check of settings."""
    if isinstance(trackers, str) or not isinstance(trackers, Sequence):
        return trackers
    return tuple(name_of(tracker) if isinstance(tracker, Tracker) else tracker for tracker in trackers)


def chosen_trackers(resolved: Resolved, in_code: Sequence[str | Tracker] | NotGiven) -> list[Tracker]:
    """The trackers that are configured. Raises `ConfigurationError` if one is missing or has no place to write."""
    settings, origin = resolved.settings, resolved.origins["trackers"]
    found = resolve(settings.trackers if isinstance(in_code, NotGiven) else in_code, origin)
    if settings.project_dir is None:
        homeless = [name_of(tracker) for tracker in found if tracker.needs_folder]
        if homeless and origin != "default":
            raise _no_place(homeless, origin)
    else:
        _check_writable(Path(settings.project_dir), resolved.origins["project_dir"])
    return found


class Record:
    """What one Accelerator keeps of its run."""

    def __init__(self, resolved: Resolved, trackers: Sequence[Tracker], accumulation: Accumulation) -> None:
        settings, world = resolved.settings, accumulation.world
        folder = Path(settings.project_dir) if settings.project_dir is not None else None
        self._accumulation = accumulation
        self._homeless = [name_of(tracker) for tracker in trackers if folder is None and tracker.needs_folder]
        config = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in TABLES}
        self._log = Log(trackers, Run(folder, world.rank, world.size), {**config, "processes": world.size})

    @property
    def steps_taken(self) -> int:
        """Optimizer steps, of the optimizer that has taken most."""
        return max((link.num_steps for link in self._accumulation.optimizers), default=0)

    def log(self, values: Mapping[str, Any], step: int | None, config: Mapping[str, Any] | None) -> None:
        """See `Accelerator.log`."""
        if self._homeless:
            raise _no_place(self._homeless, "default")
        if config is not None:
            self._log.log_config(config)
        if values or config is None:
            self._log.log(values, step, self.steps_taken)

    def resumed(self) -> None:
        """A checkpoint was loaded: the run goes on after its step."""
        self._log.resumed(self.steps_taken)

    def close(self) -> None:
        """Write what is left."""
        self._log.close()


def _no_place(names: Sequence[str], origin: str) -> ConfigurationError:
    return ConfigurationError(
        f"trackers names {', '.join(names)} ({origin}), which write into project_dir, and there is none. Give "
        "Accelerator(project_dir=...), or trackers=() to log nothing."
    )


def _check_writable(folder: Path, origin: str) -> None:
    """Raise `ConfigurationError` unless the folder is there, or can be made, and takes files."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is no folder" if not existing.is_dir() else "may not be written to"
        raise ConfigurationError(
            f"project_dir is {str(folder)!r} ({origin}), but {str(existing)!r} {what}. Name a folder that this user "
            "may write to."
        )
