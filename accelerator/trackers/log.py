"""What `Accelerator.log` does: take values without waiting for the device, and hand them to trackers in a thread."""

from __future__ import annotations

import logging
import operator
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelerator.background import Background
from accelerator.later import Later
from strategies.errors import StepError

from .registry import name_of
from .tracker import Histogram, Image, Run, Table, Tracker, Value

_log = logging.getLogger("accelerator")


@dataclass(frozen=True)
class _Entry:
    """One call of `log`."""

    values: Later
    step: int
    time: float
    at: int  # steps that the optimizer had taken


class Log:
    """The trackers of one run on one rank. Nothing is opened before the first value."""

    def __init__(self, trackers: Sequence[Tracker], run: Run, config: Mapping[str, Any]) -> None:
        self._trackers = [tracker for tracker in trackers if run.rank == 0 or tracker.all_ranks]
        self._run = run
        self._config = _plain(config)
        self._background = Background("trackers")
        self._begun = self._closed = False
        self._held: list[_Entry] = []  # their tensors are on a device that is read later, in the loop's thread
        self._working: list[Tracker] = []
        self._told: set[str] = set()

    def log(self, values: Mapping[str, Any], step: int | None, taken: int) -> None:
        """Keep `values` for `step`, by default the `taken` steps of the optimizer. Raises `StepError` for a bad one."""
        step = taken if step is None else _whole(step)
        if not isinstance(values, Mapping):
            raise StepError(f"log() got {type(values).__name__}; expected a mapping of names to values")
        frozen = {str(name): _frozen(name, value) for name, value in values.items()}
        self._check_open()
        if not self._trackers:
            return
        self._begin()
        entry = _Entry(Later(frozen), step, time.time(), taken)
        while self._held and self._held[0].at < taken:
            self._pass_on(self._held.pop(0))
        if entry.values.is_copied and not self._held:
            self._pass_on(entry)
        else:
            self._held.append(entry)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration of the script, as it is now."""
        self._check_open()
        if self._trackers:
            self._begin()
            plain = {str(key): _plain(value) for key, value in config.items()}
            self._submit(lambda tracker: tracker.log_config(plain))

    def resumed(self, step: int) -> None:
        """The run goes on after `step` of the optimizer."""
        if self._begun:
            self._submit(lambda tracker: tracker.resume(step))
        self._run = replace(self._run, resumed=step)

    def close(self) -> None:
        """Write what is left, and close. May be called twice."""
        for entry in self._held:
            self._pass_on(entry)
        self._held.clear()
        if self._begun:
            self._submit(lambda tracker: tracker.close())
        self._background.close()
        self._trackers = []
        self._begun, self._closed = False, True

    def _check_open(self) -> None:
        if self._closed:
            raise StepError("log() came after end_training(), which closed the trackers. Call it before.")

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            run = self._run
            self._background.submit(lambda: self._open(run))

    def _open(self, run: Run) -> None:
        for tracker in self._trackers:
            if self._tries(tracker, lambda tracker: tracker.begin(run)):
                self._working.append(tracker)
                self._tries(tracker, lambda tracker: tracker.log_config(self._config))

    def _submit(self, call: Callable[[Tracker], None]) -> None:
        self._background.submit(lambda: self._for_each(call))

    def _for_each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._working:
            self._tries(tracker, call)

    def _tries(self, tracker: Tracker, call: Callable[[Tracker], None]) -> bool:
        try:
            call(tracker)
        except BaseException as error:  # of other people's packages, SystemExit too: training goes on without them
            name, what = name_of(tracker), f"{type(error).__name__}: {error}"
            cause = re.sub(r"0x[0-9a-f]+|\d+", "", what)  # the same one at another step, or of another object
            self._warn_once(f"{name} {cause}", f"the tracker {name!r} failed, and training goes on: {what}")
            return False
        return True

    def _warn_once(self, key: str, words: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _log.warning("%s", words)

    def _pass_on(self, entry: _Entry) -> None:
        if not entry.values.is_copied:
            entry.values.read()
        self._background.submit(lambda: self._write(entry))

    def _write(self, entry: _Entry) -> None:
        values: dict[str, Value] = entry.values.read()

        def keep(tracker: Tracker) -> None:
            tracker.optimizer_steps = entry.at
            for name in tracker.log(values, entry.step, entry.time):
                kind, who = type(values[name]).__name__, name_of(tracker)
                self._warn_once(f"{who} {kind}", f"{who} keeps nothing of the kind {kind}: {name!r} is not in it")

        self._for_each(keep)


def _frozen(name: Any, value: Any) -> Any:
    """`value` as it is now: numbers of the host at once, those of a device to be read later."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise StepError(
                f"log() got {name!r} of shape {tuple(value.shape)}; expected one number. Take its mean(), or log "
                "Histogram(it)."
            )
        if not value.is_complex():
            return value.detach().item() if value.device.type == "cpu" else value.detach()
    if isinstance(value, Image):
        pixels = _copied(value.pixels)
        if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3))):
            raise StepError(
                f"log() got the Image {name!r} of shape {pixels.shape}; expected (height, width) or (height, width, "
                "3). Of torch's (3, height, width), permute(1, 2, 0) makes that."
            )
        return Image(pixels, value.caption)
    if isinstance(value, Histogram):
        if value.num_bins < 1:
            raise StepError(f"log() got the Histogram {name!r} with num_bins={value.num_bins!r}; expected at least 1")
        return Histogram(_copied(value.values), value.num_bins)
    if isinstance(value, Table):
        return Table([str(name) for name in value.columns], [[_plain(cell) for cell in row] for row in value.rows])
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise StepError(f"log() got {name!r}, an integer of {value.bit_length()} bits; expected one that a float holds")
    if isinstance(value, bool | int | float | str):
        return value
    raise StepError(
        f"log() got {name!r} of type {type(value).__name__}; expected a number, a tensor of one, text, Image, "
        "Histogram or Table"
    )


def _whole(step: Any) -> int:
    """`step` as an integer, of NumPy too. Raises `StepError` for what is none, or below 0."""
    try:
        found = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        found = -1
    if found < 0:
        raise StepError(f"log() got step={step!r}; expected an integer >= 0, or none for the optimizer steps taken")
    return found


def _plain(value: Any) -> Any:
    """A copy that every tracker can keep: numbers, text, lists and dictionaries of them; else the text of `value`."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _copied(values: Any) -> Any:
    """An array of its own on the host. Of a device this waits, as its caller must know."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        values = values.numpy()
    return np.array(values)
