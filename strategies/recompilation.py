"""Notice that a recorded program had to be compiled again, and say why and where."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .reads import ReadingLines, line_of_the_loop
from .tree import describe

_log = logging.getLogger("accelerator")

_WARM_UP_STEPS = 4  # the optimizer makes its state in the first, explicit weights settle in the third
_SHAPES_WITHOUT_WARNING = 2  # of a full window and the last one
_CHANGES_WITHOUT_WARNING = 2  # a schedule reaches 0 or 1, which are numbers of the program and not of its input
_MOST_SHAPES = 1000  # remembered


class Recompilations:
    """Counts, for one Accelerator, what its programs cost: compilations, runs, shapes of batches.

    Warns once for each cause, after the first steps.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._known: dict[tuple[str, ...], int] = {}  # shapes of the batches of a window, and how many windows had them
        self._window: list[str] = []  # shapes of this window's batches so far
        self._last_was_new = False
        self._is_left = False
        self._begun: tuple[int, int] | None = None  # programs compiled and values read when the first of them was taken
        self._reads = 0
        self._observer: ReadingLines | None = None  # of the window after one that read
        self._changes = 0
        self._warned: set[str] = set()

    def note_batch(self, batch: Any) -> None:
        """Note the shapes of a batch that the loop is about to take; one taken without gradients is not trained on."""
        if not torch.is_grad_enabled():
            return
        if not self._window:
            self._begun = _num_compiled(), _num_read()
            looks = self._reads and self.num_steps > _WARM_UP_STEPS and "read" not in self._warned
            if looks and self._observer is None:
                self._observer = ReadingLines()
                self._observer.begin()
        self._window.append(describe(batch))

    def leave_window(self) -> None:
        """Leave this window out: it was saved or restored while it is open, which reads, and cuts its program."""
        self._is_left = True

    def before_run(self) -> None:
        """Look at what was read since the window's first batch was taken: nothing, in a loop that only records."""
        if not torch.is_grad_enabled():
            return
        self._reads = _num_read() - self._begun[1] if self._begun is not None and not self._is_left else 0
        if self._observer is not None and self._observer.end():
            self._tell_of_reads(self._observer.lines)
            self._observer = None

    def after_run(self) -> None:
        """Look at what this step compiled."""
        if not torch.is_grad_enabled():  # evaluation reads what it likes
            self._begun = (_num_compiled(), _num_read()) if self._window else None
            return
        compiled = _num_compiled() - self._begun[0] if self._begun is not None else 0
        window, self._window, self._begun = tuple(self._window), [], None
        if self._is_left:
            self._is_left = False
            return
        # A loader that reads one batch ahead shows a new shape one step early.
        is_new, self._last_was_new = window not in self._known or self._last_was_new, window not in self._known
        if len(self._known) < _MOST_SHAPES:
            self._known[window] = self._known.get(window, 0) + 1
        self.num_steps += 1
        if self.num_steps <= _WARM_UP_STEPS:
            return
        if compiled and is_new and len(self._known) > _SHAPES_WITHOUT_WARNING:
            latest = list(self._known.items())[-3:]
            listed = "; ".join(f"{' then '.join(shapes)} ({count} times)" for shapes, count in latest)
            self._warn(
                "shape",
                "windows have had batches of %d different shapes so far, and each is compiled anew: ..., %s. Pad "
                "batches to a few lengths, or use drop_last=True",
                len(self._known),
                listed,
            )
        elif compiled and not is_new and not self._reads:
            self._changes += 1
            if self._changes > _CHANGES_WITHOUT_WARNING:
                self._warn(
                    "number",
                    "%d of %d steps were compiled anew although their batches have shapes that are compiled already: a "
                    "Python number that enters the program has changed (the length of a slice, a 0 or 1), or an if "
                    "went the other way. Make the number a tensor on the device",
                    self._changes,
                    self.num_steps,
                )

    def _tell_of_reads(self, lines: list[str]) -> None:
        if self._reads:
            where = ", ".join(sorted(set(lines))) or "something (print, perhaps)"
            self._warn(
                "read",
                "%s read a value from the device inside a window, as .item(), float(), print and an if on a tensor do. "
                "Each splits the step's program and waits for it. Keep such values as tensors (.detach()), and read "
                "them after the window",
                where,
            )

    def _warn(self, cause: str, words: str, *values: object) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            _log.warning(f"{words}. The window ended at %s", *values, line_of_the_loop())


def _num_compiled() -> int:
    """Programs compiled in this process so far, counted where it happens."""
    import torch_xla.debug.metrics as metrics

    return metrics.counter_value("UncachedCompile") or 0


def _num_read() -> int:
    """Values read from devices in this process so far, counted where it happens. Costs up to 70 us."""
    import torch_xla.debug.metrics as metrics

    reads = metrics.metric_data("TransferFromDeviceTime")
    return reads[0] if reads else 0
