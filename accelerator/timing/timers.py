"""An observer that adds up where the loop's time goes, and writes a line about it at most once a second."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from accelerator.background import Background
from accelerator.later import Later
from accelerator.lines import LineFile
from strategies import World
from strategies.base import Exchange
from strategies.observer import Observer

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from strategies.prepared.optimizer import OptimizerLink
    from strategies.sources import Cursor
    from strategies.window import Window

PHASES = ("data", "forward", "backward", "closing_backward", "reduce", "clip", "optimizer", "checkpoint", "collectives")
INTERVAL_SECONDS = 1.0
_log = logging.getLogger("accelerator")


class Timers(Observer):
    """Seconds of the host by phase, on one rank, in `timing/rank<rank>.jsonl` of the run's folder.

    `data`: waiting for a batch that is then trained on. `forward`: from the start of a micro-batch to `backward`.
    `backward`, `closing_backward`: of a micro-batch that leaves its window open, and of one that closes it, where
    ranks exchange gradients. `reduce`: from there until the gradients are final. `clip`, `optimizer`,
    `checkpoint`: those. `collectives`: that the script calls, wherever it does. Nothing is synchronised: on a device
    that runs behind the host, these are the host's times.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        steps_taken: Callable[[], int],
        optimizers: Sequence[OptimizerLink],
        plan: Callable[[], Iterable[Sequence[str]]],
        exchanges: Callable[[], Iterable[Exchange | None]] = tuple,
        count_flops: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._world = world
        self._steps_taken = steps_taken
        self._optimizers = optimizers
        self._plan = plan
        self._exchanges = exchanges
        self._clock = clock
        self._file = LineFile(folder / "timing" / f"rank{world.rank}.jsonl")
        self._background = Background("timers")
        self._flops = _flop_counter() if count_flops else None
        self._counting = False
        self._held: list[tuple[dict[str, Any], Later]] = []  # lines whose numbers are still on a device
        self._has_begun = self._is_broken = False
        self._wanted = self._mark = self._met = clock()
        self._reset(self._mark)
        self._batch: tuple[float, int] | None = None  # wait and samples of a batch that is not yet trained on
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None
        _log.addFilter(self._note_warning)

    def _reset(self, now: float) -> None:
        self._since = now
        self._data = self._forward = self._backward = self._closing = 0.0
        self._reduce = self._clip = self._optimizer = self._checkpoint = self._collectives = 0.0
        self._micro_batches = self._windows = self._samples = 0

    # -- the loop: kept short, since it is all that a step pays ---------------------------------------------

    def batch_wanted(self, loader: DataLoader[object]) -> None:
        """Start of a wait."""
        self._wanted = self._clock()

    def batch_taken(self, cursor: Cursor, batch: object) -> None:
        """End of it; whether the batch is trained on is not known yet."""
        self._batch = (self._clock() - self._wanted, cursor.samples)

    def micro_batch_begun(self, window: Window) -> None:
        """Start of forward."""
        if self._batch is not None:
            self._data += self._batch[0]
            self._samples += self._batch[1]
            self._batch = None
        if self._flops is not None and not self._counting:
            self._counting = True
            self._flops.__enter__()
        self._mark = self._clock()

    def backward_begun(self, window: Window, loss: Tensor) -> None:
        """End of forward."""
        now = self._clock()
        self._forward += now - self._mark
        self._mark = now
        self._loss = loss

    def backward_ended(self, window: Window, loss: Tensor) -> None:
        """End of backward."""
        now = self._clock()
        if window.closing:
            self._closing += now - self._mark
        else:
            self._backward += now - self._mark
        self._mark = now
        if self._counting and self._flops is not None:
            self._stop_counting(self._flops)

    def gradients_ready(self, optimizer: OptimizerLink) -> None:
        """End of reducing and rescaling."""
        now = self._clock()
        self._reduce += now - self._mark
        self._mark = now

    def gradients_clipped(self, norm: Tensor) -> None:
        """End of clipping."""
        now = self._clock()
        self._clip += now - self._mark
        self._mark = now
        self._norm = norm

    def update_begun(self, optimizer: OptimizerLink) -> None:
        """Start of the update."""
        self._mark = self._clock()

    def update_ended(self, optimizer: OptimizerLink, taken: bool) -> None:
        """End of it."""
        now = self._clock()
        self._optimizer += now - self._mark
        self._mark = now
        if not taken:
            self.event("skipped step", text="float16 overflow")

    def micro_batch_ended(self, window: Window) -> None:
        """Perhaps a line."""
        self._micro_batches += 1
        if window.closing:
            self._windows += 1
            if self._mark - self._since >= INTERVAL_SECONDS:  # the last look at the clock
                self._write(self._mark)

    def collective_begun(self) -> None:
        """Start of one."""
        self._met = self._clock()

    def collective_ended(self) -> None:
        """End of it, and no part of the phase that it came in."""
        seconds = self._clock() - self._met
        self._collectives += seconds
        self._mark += seconds

    def raised(self, error: BaseException) -> None:
        """An event; what was counted of the step stays out."""
        if self._counting and self._flops is not None:
            self._stop_counting(self._flops)
        self.event("exception", text=f"{type(error).__name__}: {error}"[:500])

    # -- around it -----------------------------------------------------------------------------------------

    def event(self, name: str, **more: Any) -> None:
        """Note something that happened, with the step and the time."""
        self._submit([{"event": name, "step": self._steps_taken(), "time": time.time(), **more}])

    def saved(self, seconds: float, folder: Path) -> None:
        """A checkpoint was written, which held the loop for so long."""
        self._checkpoint += seconds
        self.event("checkpoint", seconds=round(seconds, 4), text=str(folder))

    def resumed(self, step: int) -> None:
        """The run goes on after `step`."""
        self._in_background(lambda: self._file.resume(step))

    def close(self) -> None:
        """Write what is left. May be called twice."""
        _log.removeFilter(self._note_warning)
        if self._micro_batches or self._checkpoint:
            self._write(self._clock())
        self._loss = self._norm = None
        self._write_held()
        self._in_background(self._file.close)
        self._background.close()

    def _write(self, now: float) -> None:
        before = [self._data, self._forward, self._backward, self._closing]
        phases = [*before, self._reduce, self._clip, self._optimizer, self._checkpoint, self._collectives]
        line: dict[str, Any] = {
            "step": self._steps_taken(),
            "time": time.time(),
            "seconds": round(now - self._since, 6),
            "phases": {name: round(value, 6) for name, value in zip(PHASES, phases, strict=True) if value},
            "micro_batches": self._micro_batches,
            "windows": self._windows,
            "samples": self._samples,
            "memory": _memory(self._world.device),
            "exchanges": [exchange and list(exchange) for exchange in self._exchanges()],
            "lr": [float(link.original.param_groups[0]["lr"]) for link in self._optimizers],
        }
        numbers = {"loss": self._loss, "grad_norm": self._norm}
        later = Later({name: value for name, value in numbers.items() if value is not None})
        self._loss = self._norm = None
        self._write_held()
        self._held.append((line, later))
        if later.is_copied:
            self._write_held()
        self._reset(now)

    def _write_held(self) -> None:
        for line, later in self._held:
            if not later.is_copied:
                later.read()  # a second old: the device is done with it
            self._submit([line], later)
        self._held.clear()

    def _submit(self, lines: list[dict[str, Any]], later: Later | None = None) -> None:
        if not self._has_begun:
            self._has_begun = True
            lines = [*self._header(), *lines]

        def write() -> None:
            self._file.write([*lines[:-1], {**lines[-1], **(later.read() if later is not None else {})}])

        self._in_background(write)

    def _in_background(self, call: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                if not self._is_broken:
                    call()
            except Exception as error:  # a full disk, say: training goes on without
                self._is_broken = True
                _log.warning("the timers stop, and training goes on: %s: %s", type(error).__name__, error)

        self._background.submit(guarded)

    def _header(self) -> list[dict[str, Any]]:
        about = {"rank": self._world.rank, "size": self._world.size, "device": str(self._world.device)}
        versions = {"torch": torch.__version__, "python": platform.python_version(), "host": platform.node()}
        header: list[dict[str, Any]] = [{"run": {**about, **versions, "time": time.time()}}]
        if self._world.is_main:
            header.append({"plan": [list(row) for row in self._plan()]})
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if restarts:
            header.append(
                {"event": "restart", "step": self._steps_taken(), "time": time.time(), "text": f"number {restarts}"}
            )
        return header

    def _stop_counting(self, flops: FlopCounterMode) -> None:
        flops.__exit__(None, None, None)
        self._counting, self._flops = False, None
        self._submit([{"flops": {"micro_batch": flops.get_total_flops(), "samples": self._samples}}])
        self._mark = self._clock()  # counting slows the micro-batch down
        self._reset(self._mark)

    def _note_warning(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            self.event("warning", text=record.getMessage()[:500])
        return True


def _flop_counter() -> FlopCounterMode:
    from torch.utils.flop_counter import FlopCounterMode  # costs time that importing us must not

    return FlopCounterMode(display=False)


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes: resident of this process now; on the device allocated now, and at most so far."""
    found = {}
    try:
        with open("/proc/self/statm") as file:
            found["resident"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        pass
    current = torch.accelerator.current_accelerator()
    if current is not None and device.type == current.type:
        found["device"] = torch.accelerator.memory_allocated(device)
        found["device_peak"] = torch.accelerator.max_memory_allocated(device)
    return found
