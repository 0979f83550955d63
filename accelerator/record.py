"""What is kept of a run, for people to look at: what the loop logs, where its time goes, and what happens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from strategies.accumulation import Accumulation
from strategies.base import Exchange
from strategies.errors import ConfigurationError

from .batch_arithmetic import BatchArithmetic
from .checkpoint.remote import is_url
from .config import NotGiven, Resolved, Settings
from .config.settings import TABLES
from .explain import Explanation, explain
from .timing import Timers
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
    for name in ("timers", "count_flops"):
        asked = getattr(settings, name) and resolved.origins[name] != "default"
        if asked and (settings.project_dir is None or not settings.timers):
            missing = "project_dir" if settings.project_dir is None else "timers"
            raise ConfigurationError(
                f"{name} is true ({resolved.origins[name]}), but there is no {missing}, which it needs. Give it, or "
                f"set {name} to false."
            )
    return found


class Record:
    """What one Accelerator keeps of its run."""

    def __init__(
        self,
        resolved: Resolved,
        trackers: Sequence[Tracker],
        accumulation: Accumulation,
        strategy_name: str,
        arithmetic: BatchArithmetic,
    ) -> None:
        settings, world = resolved.settings, accumulation.world
        folder = Path(settings.project_dir) if settings.project_dir is not None else None
        self._accumulation = accumulation
        self._homeless = [name_of(tracker) for tracker in trackers if folder is None and tracker.needs_folder]
        config = values_of(settings)
        self._log = Log(trackers, Run(folder, world.rank, world.size), {**config, "processes": world.size})
        self._timers: Timers | None = None
        if folder is not None and settings.timers:
            self._timers = Timers(
                folder,
                world,
                steps_taken=lambda: accumulation.steps_taken,
                optimizers=accumulation.optimizers,
                plan=lambda: rows_of(explain(resolved, strategy_name, accumulation, arithmetic)),
                exchanges=lambda: exchanges_of(accumulation),
                count_flops=settings.count_flops,
            )
        self.watch()

    def watch(self) -> None:
        """Look at the loop. Again after the Accelerator let go of its observers."""
        if self._timers is not None and self._timers not in self._accumulation.observers:
            self._accumulation.observers.append(self._timers)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps, of the optimizer that has taken most."""
        return self._accumulation.steps_taken

    def saving(self, save: Callable[[], Path]) -> Path:
        """What `save` returns, the folder of a checkpoint, having measured for how long the loop waited for it."""
        start = time.perf_counter()
        target = save()
        if self._timers is not None:
            self._timers.saved(time.perf_counter() - start, target)
        return target

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
        if self._timers is not None:
            self._timers.resumed(self.steps_taken)

    def close(self) -> None:
        """Write what is left."""
        self._log.close()
        if self._timers is not None:
            self._timers.close()


def exchanges_of(accumulation: Accumulation) -> list[Exchange | None]:
    """What was measured last of the exchange of gradients, for each model in the order of `prepare`, if it was."""
    return [accumulation.strategy.last_exchange(model.wrapped) for model in accumulation.models]


def values_of(settings: Settings) -> dict[str, Any]:
    """The settings by name, but for those of strategies."""
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in TABLES}


def rows_of(explanation: Explanation) -> list[tuple[str, str, str, str]]:
    """The plan as rows of text."""
    return [(row.name, row.asked, row.got, row.origin) for row in explanation.rows]


def _no_place(names: Sequence[str], origin: str) -> ConfigurationError:
    return ConfigurationError(
        f"trackers names {', '.join(names)} ({origin}), which write into project_dir, and there is none. Give "
        "Accelerator(project_dir=...), or trackers=() to log nothing."
    )


def _check_writable(folder: Path, origin: str) -> None:
    """Raise `ConfigurationError` unless the folder is there, or can be made, and takes files."""
    if is_url(str(folder)):
        raise ConfigurationError(
            f"project_dir is {str(folder)!r} ({origin}); expected a folder on a disk, since checkpoints are put in "
            "their place by a rename, which no URL offers. Copy them to a store with its own tool."
        )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is no folder" if not existing.is_dir() else "may not be written to"
        raise ConfigurationError(
            f"project_dir is {str(folder)!r} ({origin}), but {str(existing)!r} {what}. Name a folder that this user "
            "may write to."
        )
