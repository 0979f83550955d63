"""What `Accelerator.log` does: take values without waiting for the device, and hand them to trackers in a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        self._config = dict(config)
        self._background = Background("trackers")
        self._begun = False
        self._held: list[_Entry] = []  # their tensors are on a device that is read later, in the loop's thread
        self._working: list[Tracker] = []
        self._told: set[str] = set()

    def log(self, values: Mapping[str, Any], step: int | None, taken: int) -> None:
        """Keep `values` for `step`, by default the `taken` steps of the optimizer. Raises `StepError` for a bad one."""
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise StepError(f"log() got step={step!r}; expected an integer >= 0, or none for the optimizer steps taken")
        frozen = {str(name): _frozen(name, value) for name, value in values.items()}
        if not self._trackers:
            return
        self._begin()
        entry = _Entry(Later(frozen), taken if step is None else step, time.time(), taken)
        while self._held and self._held[0].at < taken:
            self._pass_on(self._held.pop(0))
        if entry.values.is_copied and not self._held:
            self._pass_on(entry)
        else:
            self._held.append(entry)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration of the script."""
        if self._trackers:
            self._begin()
            self._submit(lambda tracker: tracker.log_config(config))

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
        self._begun = False

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
        except Exception as error:  # of other people's packages: training goes on without them
            name = name_of(tracker)
            self._warn_once(name, f"the tracker {name!r} failed, and training goes on: {type(error).__name__}: {error}")
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
        value = value.detach()
        return value.item() if value.device.type == "cpu" else value
    if isinstance(value, Image):
        return Image(_copied(value.pixels), value.caption)
    if isinstance(value, Histogram):
        return Histogram(_copied(value.values), value.num_bins)
    if isinstance(value, bool | int | float | str | Table):
        return value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):  # a scalar of NumPy
        return value.item()
    raise StepError(
        f"log() got {name!r} of type {type(value).__name__}; expected a number, a tensor of one, text, Image, "
        "Histogram or Table"
    )


def _copied(values: Any) -> Any:
    """An array of its own on the host. Of a device this waits, as its caller must know."""
    import numpy as np

    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        values = values.numpy()
    return np.array(values)
