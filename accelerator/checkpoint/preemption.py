"""When a checkpoint is due: every so many steps or minutes, or because a signal says that this job is about to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from strategies import World, collectives
from strategies.errors import ConfigurationError

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later
_SECONDS_BETWEEN_TALKS = 0.25
_MOST_CALLS_BETWEEN_TALKS = 1000


class Signals:
    """Notes the signals that ask for an end, from the first `watch` to `close`, which puts back what was there."""

    def __init__(self) -> None:
        self.received = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def watch(self, names: Sequence[str]) -> None:
        """Note these signals from now on; a handler that the script has set is still called.

        Raises `ConfigurationError` for an unknown one, and outside the main thread, where Python can set none.
        """
        for name in names:
            number = getattr(signal, name, None) if name.startswith("SIG") else None
            if not isinstance(number, signal.Signals):
                raise ConfigurationError(f"signals names {name!r}; expected names such as 'SIGTERM' and 'SIGUSR1'")
            if number in self._before:
                continue
            if threading.current_thread() is not threading.main_thread():
                raise ConfigurationError(
                    "checkpoint_due() was called first outside the main thread, where no signal can be watched. Call "
                    "it there, or with signals=()."
                )
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        before = self._before.get(number)
        if os.getpid() != self._pid:  # a process forked from this one, such as a loader's worker
            signal.signal(number, before if callable(before) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = True
        if callable(before):
            before(number, frame)

    def close(self) -> None:
        """Put back the handlers that were there, unless the script has set others since."""
        if threading.current_thread() is threading.main_thread() and os.getpid() == self._pid:
            for number, before in self._before.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()


class Timetable:
    """Says on all ranks at once whether a checkpoint is due, talking to the others about four times a second.

    Steps are counted alike everywhere and need no talk. Signals and the clock (rank 0's) do; between two talks a call
    compares a few integers. How many calls there are until the next one follows from the pace of rank 0.
    """

    def __init__(self, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._world = world
        self._clock = clock
        self.signals = Signals()
        self.preempted = False  # agreed: a signal arrived on some rank
        self._saved_since = False  # a checkpoint was written since
        self._asked_step = 0  # for which one was due by steps, saved or loaded, last
        self._saved_at = self._talked_at = clock()
        self._calls = 0
        self._calls_until_talk = 1

    def saved(self, step: int) -> None:
        """A checkpoint is on its way."""
        self._asked_step, self._saved_at, self._saved_since = step, self._clock(), self.preempted

    def loaded(self, step: int) -> None:
        """The run goes on from a checkpoint of this step."""
        self._asked_step, self._saved_at = step, self._clock()

    def due(self, step: int, *, every_steps: int | None, every_minutes: float | None) -> bool:
        """Whether one is due at this step. Collective: every rank calls it at every step."""
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name} is {value}; expected a number above 0")
        due = every_steps is not None and step // every_steps > self._asked_step // every_steps
        if due:  # once for each multiple, also for one that was passed between two calls
            self._asked_step = step
        self._calls += 1
        if self._calls >= self._calls_until_talk:
            due |= self._talk(every_minutes)
        return due or (self.preempted and not self._saved_since)

    def _talk(self, every_minutes: float | None) -> bool:
        now = self._clock()
        late = every_minutes is not None and now - self._saved_at >= 60 * every_minutes
        if self._world.size == 1:
            self.preempted |= self.signals.received
            return late
        pace = max(now - self._talked_at, 1e-9) / self._calls
        calls = min(max(int(_SECONDS_BETWEEN_TALKS / pace), 1), _MOST_CALLS_BETWEEN_TALKS)
        said = collectives.meet("checkpoint_due", self._world, calls << 2 | late << 1 | self.signals.received)
        self.preempted |= any(one & 1 for one in said)
        self._talked_at, self._calls, self._calls_until_talk = now, 0, said[0] >> 2
        return bool(said[0] & 2)
