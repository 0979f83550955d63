"""`Accelerator.profile`: torch's profiler over a few steps of the loop, a trace for each rank."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from strategies.errors import ConfigurationError
from strategies.observer import Observer

if TYPE_CHECKING:
    from strategies.accumulation import Accumulation
    from strategies.window import Window

_log = logging.getLogger("accelerator")


class _Steps(Observer):
    """Moves the profiler on where a window closes."""

    def __init__(self, profiler: profile) -> None:
        self._profiler = profiler

    def micro_batch_ended(self, window: Window) -> None:
        """One step of the schedule for each optimizer step."""
        if window.closing:
            with warnings.catch_warnings():  # each round's events are written before they are cleared
                warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
                self._profiler.step()


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Optimizer steps left out, warmed up and recorded, and how often; 0 is without end."""

    wait: int
    warmup: int
    active: int
    repeat: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 1 if name == "active" else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name} is {value!r}; expected an integer >= {least}")


def profiled(
    accumulation: Accumulation, folder: Path | None, rounds: Rounds, options: Mapping[str, Any]
) -> AbstractContextManager[profile]:
    """See `Accelerator.profile`. Raises `ConfigurationError` where there is no folder to write to."""
    if folder is None:
        raise ConfigurationError(
            "profile() has no folder to write to: name one, profile(folder), or give Accelerator(project_dir=...)"
        )
    return _profiled(accumulation, folder, rounds, options)


@contextmanager
def _profiled(
    accumulation: Accumulation, folder: Path, rounds: Rounds, options: Mapping[str, Any]
) -> Iterator[profile]:
    world = accumulation.world
    folder.mkdir(parents=True, exist_ok=True)

    def keep(profiler: profile) -> None:
        taken = accumulation.steps_taken
        path, number = folder / f"rank{world.rank}-step{taken}.json.gz", 1
        while path.exists():
            number += 1
            path = folder / f"rank{world.rank}-step{taken}-{number}.json.gz"
        profiler.export_chrome_trace(str(path))

    activities: Iterable[ProfilerActivity] = [ProfilerActivity.CPU]
    if world.device.type not in ("cpu", "xla"):
        activities = [*activities, *_of_device(world.device.type)]
    plan = schedule(**asdict(rounds))
    with (
        profile(activities=activities, schedule=plan, on_trace_ready=keep, **options) as profiler,
        _memory_history(world.device, folder / f"rank{world.rank}-out-of-memory.pickle"),
    ):
        steps = _Steps(profiler)
        accumulation.observers.append(steps)
        try:
            yield profiler
        finally:
            if steps in accumulation.observers:
                accumulation.observers.remove(steps)


def _of_device(kind: str) -> list[ProfilerActivity]:
    found = getattr(ProfilerActivity, kind.upper(), None)
    if found is None:
        _log.warning("torch's profiler has no activity for %r: only the host is in the trace", kind)
    return [found] if found is not None else []


@contextmanager
def _memory_history(device: torch.device, path: Path) -> Iterator[None]:
    """Record allocations inside the block, where torch can, and write them to `path` if memory runs out there."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.memory._dump_snapshot(str(path))
        _log.warning("out of memory: what was allocated, and from where, is in %s (pytorch.org/memory_viz)", path)
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
