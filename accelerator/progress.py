"""A bar over a loop on the main process: loss, samples per second and the time that is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from strategies.errors import ConfigurationError
from strategies.observer import Observer

from .later import Later

if TYPE_CHECKING:
    from strategies.accumulation import Accumulation
    from strategies.sources import Cursor
    from strategies.window import Window

T = TypeVar("T")
Style = Literal["bar", "lines", "none"]
SECONDS_OF_BAR, SECONDS_OF_LINES = 0.25, 10.0


class _Watch(Observer):
    """Remembers the last loss, and counts samples that were trained on."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.samples = 0
        self._batch = 0

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """A batch, perhaps to train on."""
        self._batch = cursor.samples

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """Keep it; nothing is read."""
        self.loss = loss

    def micro_batch_ended(self, window: Window) -> None:
        """Count."""
        self.samples += self._batch
        self._batch = 0


class _Meter:
    """Loss and speed in words, read from the device no oftener than they are asked for, and one time late."""

    def __init__(self, watch: _Watch, size: int) -> None:
        self._watch, self._size = watch, size
        self._start = time.perf_counter()
        self._pending: Later | None = None
        self._loss: float | None = None

    def words(self) -> str:
        """`loss 0.123  4500 samples/s`, of the whole loop so far; samples of all ranks, taken to do as many each."""
        if self._pending is not None:
            self._loss = self._pending.read()["loss"]
            self._pending = None
        if self._watch.loss is not None:
            self._pending = Later({"loss": self._watch.loss.detach()})
            self._watch.loss = None
            if isinstance(self._pending.values["loss"], float):  # on the host: nothing to wait for
                self._loss, self._pending = self._pending.values["loss"], None
        speed = self._watch.samples * self._size / max(time.perf_counter() - self._start, 1e-9)
        parts = [f"loss {self._loss:.4g}" if self._loss is not None else "", f"{speed:,.0f} samples/s" if speed else ""]
        return "  ".join(filter(None, parts))


def progress(
    items: Iterable[T], accumulation: Accumulation, *, description: str, total: int | None, style: Style | None
) -> Iterator[T]:
    """See `Accelerator.progress`."""
    if style not in (None, "bar", "lines", "none"):
        raise ConfigurationError(f"style is {style!r}; expected 'bar', 'lines', 'none', or nothing to choose by itself")
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]  # just asked
    chosen = (style or _suited()) if accumulation.world.is_main else "none"
    if chosen == "none":
        return iter(items)
    return _shown(items, accumulation, description, total, chosen)


def _suited() -> Style:
    """A bar on a terminal, nothing in CI, else plain lines."""
    if os.environ.get("CI"):
        return "none"
    return "bar" if sys.stderr.isatty() else "lines"


def _shown(
    items: Iterable[T], accumulation: Accumulation, description: str, total: int | None, style: Style
) -> Iterator[T]:
    watch = _Watch()
    meter = _Meter(watch, accumulation.world.size)
    accumulation.observers.append(watch)
    with ExitStack() as stack:
        stack.callback(lambda: accumulation.observers.remove(watch) if watch in accumulation.observers else None)
        show = stack.enter_context(_Bar(description, total)) if style == "bar" else _Lines(description, total)
        count, seen = 0, time.perf_counter()
        stack.callback(lambda: show.at(count, meter.words(), last=True))
        for item in items:
            yield item
            count += 1
            now = time.perf_counter()
            if now - seen >= show.seconds:
                seen = now
                show.at(count, meter.words())


class _Bar:
    seconds = SECONDS_OF_BAR

    def __init__(self, description: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        words = TextColumn("{task.fields[words]}")
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), words, TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(description, total=total, words="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def at(self, count: int, words: str, *, last: bool = False) -> None:
        """Draw."""
        self._progress.update(self._task, completed=count, words=words)


class _Lines:
    seconds = SECONDS_OF_LINES

    def __init__(self, description: str, total: int | None) -> None:
        self._description, self._total, self._start = description, total, time.perf_counter()

    def at(self, count: int, words: str, *, last: bool = False) -> None:
        """Print a line."""
        seconds = time.perf_counter() - self._start
        of = f"/{self._total}" if self._total is not None else ""
        left = f"{seconds / count * (self._total - count):.0f} s left" if self._total and count and not last else ""
        done = f"{seconds:.1f} s" if last else left
        parts = [self._description, f"{count}{of}", words, done]
        print("  ".join(filter(None, parts)), file=sys.stderr, flush=True)
