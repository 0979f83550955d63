"""Notice that a recorded program had to be compiled again, and say why and where."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reads import ReadingLines, line_of_the_loop
from .tree import describe

_log = logging.getLogger("accelerator")

_WARM_UP_STEPS = 4  # the optimizer makes its state in the first, explicit weights settle in the third
_SHAPES_WITHOUT_WARNING = 2  # of a full window and the last one
_CHANGES_WITHOUT_WARNING = 2  # a schedule reaches 0 or 1, which are numbers of the program and not of its input
_MOST_SHAPES = 1000  # remembered
_COUNTED_WINDOWS = 32  # after one that copied more than usual: a loop may read in every tenth only
_OBSERVED_WINDOWS = 100  # at most, after one that read


@dataclass(frozen=True)
class _Counts:
    """Programs compiled, tensors copied, values read; the last where reads are counted."""

    compiled: int
    copies: int
    reads: int


class Recompilations:
    """Counts, for one Accelerator, what its programs cost: compilations, runs, shapes of batches.

    Warns once for each cause, after the first steps. Every window is counted cheaply, by the copies between devices
    and the host; reads alone are counted in the windows that follow one with more copies than a window that was seen
    to read nothing. From a window that read on, operations are looked at, until one is seen to read.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._known: dict[tuple[Hashable, ...], int] = {}  # how many windows had batches of these shapes
        self._words: dict[Hashable, str] = {}  # for the shapes of a batch
        self._window: list[Hashable] = []  # shapes of this window's batches so far
        self._last_was_new = False
        self._is_left = False
        self._begun: _Counts | None = None  # when the first batch of the window was taken
        self._usual = -1  # copies in a window that read nothing
        self._reads = 0
        self._counted = 0  # windows left in which reads are counted
        self._observed = 0  # windows left in which operations are looked at, unless a line is found before
        self._observer: ReadingLines | None = None
        self._changes = 0
        self._warned: set[str] = set()

    def note_batch(self, batch: Any) -> None:
        """Note the shapes of a batch that the loop is about to take; one taken without gradients is not trained on."""
        if not torch.is_grad_enabled():
            return
        if not self._window:
            if self._observed and self._observer is None:
                self._observer = ReadingLines(_num_read)
                self._observer.begin()
            self._begun = self._count()
        shapes = _shapes_of(batch)
        if shapes not in self._words and len(self._words) < _MOST_SHAPES:
            self._words[shapes] = describe(batch)
        self._window.append(shapes)

    def leave_window(self) -> None:
        """Leave this window out: it was saved or restored while it is open, which reads, and cuts its program."""
        self._is_left = True

    def before_run(self) -> None:
        """Look at what was read since the window's first batch was taken: nothing, in a loop that only records."""
        if not torch.is_grad_enabled():
            return
        if self._begun is None or self._is_left:
            self._reads = 0
        else:
            self._look(self._begun)
        if self._observer is not None and self._observer.end():
            if self._reads:
                self._tell_of_reads(self._observer)
            self._observer = None

    def after_run(self) -> None:
        """Look at what this step compiled."""
        if not torch.is_grad_enabled():  # evaluation reads what it likes
            self._begun = self._count() if self._window else None
            if self._observer is not None:
                self._observer.forget()
            return
        compiled = _num_compiled() - self._begun.compiled if self._begun is not None else 0
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
            listed = "; ".join(
                f"{' then '.join(self._words.get(one, '...') for one in shapes)} ({count} times)"
                for shapes, count in latest
            )
            self._warn(
                "shape",
                "windows have had batches of %d different shapes so far, and each is compiled anew: ..., %s. Pad "
                "batches to a few lengths, or use drop_last=True",
                len(self._known),
                listed,
            )
        elif compiled and not is_new and not self._reads and not self._observed:  # to be looked at changes a program
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

    def _count(self) -> _Counts:
        return _Counts(_num_compiled(), _num_copies(), _num_read() if self._counted or self._observed else 0)

    def _look(self, begun: _Counts) -> None:
        copies = _num_copies() - begun.copies
        if self._counted or self._observed:
            self._reads = _num_read() - begun.reads
            self._counted, self._observed = max(0, self._counted - 1), max(0, self._observed - 1)
            if not self._reads:
                self._usual = max(self._usual, copies)
            elif "read" not in self._warned and not self._observed:
                self._observed = _OBSERVED_WINDOWS
        else:
            self._reads = max(0, copies - self._usual)  # at most
            if self._reads and self.num_steps >= _WARM_UP_STEPS and "read" not in self._warned:
                self._counted = _COUNTED_WINDOWS if self._usual >= 0 else 1  # of the first, nothing is known yet

    def _tell_of_reads(self, observer: ReadingLines) -> None:
        self._counted = self._observed = 0
        where = ", ".join(sorted(set(observer.lines)))
        if not where:
            where = f"something (print, perhaps) before {observer.next_line or 'the end of the window'}"
        self._warn(
            "read",
            "%s read a value from the device inside a window, as .item(), float(), print and an if on a tensor do. "
            "Each splits the step's program and waits for it. Keep such values as tensors (.detach()), and read "
            "them after the window; evaluate under torch.no_grad()",
            where,
        )

    def _warn(self, cause: str, words: str, *values: object) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            _log.warning(f"{words}. The window ended at %s", *values, line_of_the_loop())


def _shapes_of(tree: Any) -> Hashable:
    """What tells batches of different shapes apart: as `describe`, and ten times as fast."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, list | tuple):
        return tuple([_shapes_of(value) for value in tree])
    if isinstance(tree, Mapping):
        return tuple([(key, _shapes_of(value)) for key, value in tree.items()])
    return describe(tree)


def _num_compiled() -> int:
    """Programs compiled in this process so far, counted where it happens."""
    import torch_xla

    return torch_xla._XLAC._xla_counter_value("UncachedCompile") or 0


def _num_copies() -> int:
    """Tensors copied between devices and the host in this process so far, either way. Costs 1 us."""
    import torch_xla

    value_of = torch_xla._XLAC._xla_counter_value
    return (value_of("xla::_to_copy") or 0) + (value_of("xla::_to_cpu") or 0)  # the second: for operations of the CPU


def _num_read() -> int:
    """Values read from devices in this process so far, counted where it happens. Costs up to 350 us."""
    import torch_xla

    reads = torch_xla._XLAC._xla_metric_data("TransferFromDeviceTime")
    return reads[0] if reads else 0
